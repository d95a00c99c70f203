"""Reads runs of bytes of a packed folder straight to where they belong, by several threads, and checks each.

A checksum is made of a piece just after it was read, while the CPU's caches have it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from torch import Tensor

from ...compute.checksum import bytes_of, combined, crc32c
from ...errors import CheckpointError, first_line
from .manifest import AGAIN, ALIGN_BYTES, File, Run

logger = logging.getLogger("moestro")

_PIECE_BYTES = 1 << 21  # read, then summed while the caches have it
_READERS = 2  # for each thread that computes, since a reader also waits for the disk
_SHARE_BYTES = 8 << 20  # of one run, for a thread


@dataclass(frozen=True, slots=True)
class Wanted:
    """A run, what it is in words, and where it goes: uint8 [n_bytes], contiguous on the CPU."""

    run: Run
    what: str
    target: Tensor


class RunReader:
    """The files of a folder, open for reading; a context.

    Args:
        folder: where they are. files: by name, with the bytes that they must have.
        threads: of the CPU, each of which has two readers.

    Raises:
        CheckpointError: a file is absent, or of another size.
    """

    def __init__(self, folder: Path, files: dict[str, File], threads: int) -> None:
        self._folder, self._files = folder, dict[str, BinaryIO]()
        self._pool = ThreadPoolExecutor(_READERS * threads, thread_name_prefix="moestro-read")
        self._filled = {name for name, file in files.items() if file.crc is None}  # whose runs are filled up
        self._seek = threading.Lock()  # where files can only be read from where they are
        self._read_s, self._check_s, self._n_bytes = 0.0, 0.0, 0
        self._start_s = time.perf_counter()
        try:
            for name, file in files.items():
                self._files[name] = open_checked(folder, name, file)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RunReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
        if kind is None and self._n_bytes:
            took_s = time.perf_counter() - self._start_s
            share = self._check_s / max(self._read_s + self._check_s, 1e-9)
            logger.info(
                "read %d bytes of %s in %.2f s; checksums took %.1f %% of the threads' time",
                self._n_bytes,
                self._folder,
                took_s,
                100 * share,
            )

    def close(self) -> None:
        """Close the files; no thread reads them any longer."""
        self._pool.shutdown(cancel_futures=True)
        for file in self._files.values():
            file.close()

    def read(self, wanted: Iterable[Wanted], done: Callable[[int], Any] = lambda n_bytes: None) -> None:
        """Read runs, each to its place.

        Args:
            done: told the bytes of each run when it is there.

        Raises:
            CheckpointError: a checksum, or what fills the run up, is not as it should be.
        """
        started = [(one, [self._pool.submit(self._share, one, *share) for share in _shares(one.run)]) for one in wanted]
        try:
            for one, shares in started:
                self._check(one, shares)
                done(one.run.n_bytes)
        except BaseException:
            for _, shares in started:
                for share in shares:
                    share.cancel()
            raise

    def _check(self, one: Wanted, shares: Sequence[Future[tuple[int, int]]]) -> None:
        crc = 0
        for share in shares:
            found, n_bytes = share.result()
            crc = combined(crc, found, n_bytes)
        if crc != one.run.crc:
            raise CheckpointError(
                f"{self._folder / one.run.file} is damaged: {one.what}, {one.run.n_bytes} bytes at {one.run.offset}, "
                f"is not what was written there; {AGAIN}"
            )

    def _share(self, one: Wanted, start: int, stop: int) -> tuple[int, int]:
        """Read bytes [start, stop) of a run; returns their checksum and number."""
        view, crc, run = bytes_of(one.target), 0, one.run
        read_s = check_s = 0.0
        for at in range(start, stop, _PIECE_BYTES):
            end = min(at + _PIECE_BYTES, stop)
            began_s = time.perf_counter()
            self._read_into(run.file, view[at:end], run.offset + at)
            read_s += (between_s := time.perf_counter()) - began_s
            crc = crc32c(one.target[at:end], crc)
            check_s += time.perf_counter() - between_s
        if stop == run.n_bytes and run.file in self._filled:
            self._check_fill(one)
        with self._seek:
            self._read_s, self._check_s = self._read_s + read_s, self._check_s + check_s
            self._n_bytes += stop - start
        return crc, stop - start

    def _check_fill(self, one: Wanted) -> None:
        fill = bytearray(-one.run.n_bytes % ALIGN_BYTES)
        self._read_into(one.run.file, memoryview(fill), one.run.offset + one.run.n_bytes)
        if any(fill):
            raise CheckpointError(
                f"{self._folder / one.run.file} is damaged: what fills {one.what} up is not zeros; {AGAIN}"
            )

    def _read_into(self, name: str, view: memoryview, offset: int) -> None:
        file = self._files[name]
        try:
            while view:
                if hasattr(os, "preadv"):
                    count = os.preadv(file.fileno(), [view], offset)
                else:
                    with self._seek:
                        file.seek(offset)
                        count = file.readinto(view)  # type: ignore[attr-defined]
                if not count:
                    raise CheckpointError(f"{self._folder / name} was cut short while it was read; {AGAIN}")
                view, offset = view[count:], offset + count
        except OSError as error:
            raise CheckpointError(f"{self._folder / name} cannot be read: {first_line(error)}") from error


def open_checked(folder: Path, name: str, file: File) -> BinaryIO:
    """A file of a packed folder, open for reading, without a buffer.

    Raises:
        CheckpointError: it is absent, cannot be read, or has another size.
    """
    try:
        opened: BinaryIO = open(folder / name, "rb", buffering=0)  # noqa: SIM115  # closed by the caller
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} lacks {name}; {AGAIN}") from error
    except OSError as error:
        raise CheckpointError(f"{folder / name} cannot be read: {first_line(error)}") from error
    size = os.fstat(opened.fileno()).st_size
    if size != file.n_bytes:
        opened.close()
        raise CheckpointError(f"{folder / name} has {size} bytes instead of {file.n_bytes}; {AGAIN}")
    return opened


def _shares(run: Run) -> list[tuple[int, int]]:
    """Where each thread's share of a run begins and ends; an empty run is one."""
    starts = range(0, run.n_bytes, _SHARE_BYTES) if run.n_bytes else range(1)
    return [(start, min(start + _SHARE_BYTES, run.n_bytes)) for start in starts]
