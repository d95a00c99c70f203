"""Measures how fast a folder's disk reads a large file, past the page cache where the system can do that."""

from __future__ import annotations

import mmap
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from time import perf_counter

_BYTES = 256 * 2**20
_PIECE_BYTES = 8 * 2**20
_AT_ONCE = 4  # readers
_ROOM = 4  # times the file, which must be free, or nothing is written
_WRITE_LIMIT_S = 3.0  # after which the file is as long as it has become
_LEAST_PIECES = 4


def measure_disk(folder: Path, n_bytes: int = _BYTES) -> float | None:
    """GB/s that the disk of a folder reads.

    Returns:
        None where it has no room for a file to read, or cannot be read past the page cache.
    """
    direct = getattr(os, "O_DIRECT", 0)
    if not direct and sys.platform != "darwin":  # all would come from RAM
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < _ROOM * n_bytes:
            return None
        with _file(folder, n_bytes) as (path, pieces):
            return _read(path, pieces, direct)
    except OSError:
        return None


@contextmanager
def _file(folder: Path, n_bytes: int) -> Iterator[tuple[Path, int]]:
    """A file of random bytes, and how many pieces it has, which is gone at the end."""
    path, piece, pieces = folder / f".disk-{token_hex(4)}", os.urandom(_PIECE_BYTES), 0
    start_s = perf_counter()
    try:
        with path.open("wb", buffering=0) as file:
            for _ in range(n_bytes // _PIECE_BYTES):
                file.write(piece)
                os.fsync(file.fileno())
                pieces += 1
                if pieces >= _LEAST_PIECES and perf_counter() - start_s > _WRITE_LIMIT_S:
                    break
        yield path, pieces
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _read(path: Path, pieces: int, direct: int) -> float:
    descriptor = os.open(path, os.O_RDONLY | direct)
    try:
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
        buffers = [mmap.mmap(-1, _PIECE_BYTES) for _ in range(_AT_ONCE)]  # whole pages, as direct reads need

        def read(reader: int) -> int:
            places = range(reader, pieces, _AT_ONCE)
            return sum(os.preadv(descriptor, [buffers[reader]], place * _PIECE_BYTES) for place in places)

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            start_s = perf_counter()
            done = sum(pool.map(read, range(_AT_ONCE)))
            return done / (perf_counter() - start_s) / 1e9
    finally:
        os.close(descriptor)
