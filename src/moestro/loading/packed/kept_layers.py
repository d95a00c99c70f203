"""Layers of experts that are written to the disk while a model is quantized: a load that was ended goes on from there.

They lie in a folder beside the packed folder that they become a part of. A layer is the file of runs that the packed
folder will have, and a record of its checksums, which is written last. What has no record, or other checksums, or was
made of something else, is quantized again. One process at a time writes there, as a lock says that ends with it; others
keep nothing.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import Timeout
from huggingface_hub.utils import WeakFileLock
from torch import Tensor

from ...errors import CheckpointError, MoestroError, first_line
from ...memory.store import on_host
from ...progress import is_quiet
from .manifest import AGAIN, File, Run, expert_file, filled_up
from .run_file import RunFile
from .runs import RunReader, Wanted

logger = logging.getLogger("moestro")

SUFFIX = ".layers"  # of the folder's name


class KeptLayers:
    """The layers that are kept in a folder; made by `kept_layers`.

    Args:
        folder: it need not exist. key: of all that the layers' bytes depend on. is_on: whether to keep any.
        make_room: for so many bytes; False where there is none.
    """

    def __init__(self, folder: Path, key: str, is_on: bool, make_room: Callable[[int], bool]) -> None:
        self._folder, self._key, self._is_on, self._make_room = folder, key, is_on, make_room
        self._threads, self._layers = 1, 0
        self.has_begun, self.has_room = False, True
        self._runs = dict[int, tuple[Run, ...]]()  # of each layer that is kept

    @property
    def n_bytes(self) -> int:
        """Of the files of all layers that are kept."""
        return sum(_size_of(runs) for runs in self._runs.values())

    @property
    def progress(self) -> str | None:
        """What is kept, in words; None if nothing is."""
        if not self._runs:
            return None
        return f"{len(self._runs)} of {self._layers} layers are quantized and kept in {self._folder}"

    def begin(self, layers: int, n_bytes: int, threads: int) -> None:
        """Keep layers from now on, if there is room.

        Args:
            layers: of the model. n_bytes: of all of them. threads: that read layers back.
        """
        self._layers, self._threads, self.has_begun = layers, threads, True
        try:
            self.has_room = self._make_room(n_bytes)
            self._is_on = self._is_on and self.has_room
            if self._is_on:
                self._folder.mkdir(parents=True, exist_ok=True)
        except (OSError, MoestroError) as error:
            self._stop(error)

    def restore(self, layer: int, experts: Sequence[Tensor]) -> bool:
        """Read a layer back, if it is kept and whole.

        Args:
            experts: where each goes, uint8 [expert_bytes], on any device.
        """
        runs = self._recorded(layer, experts) if self._is_on else None
        if runs is None:
            return False
        files = {expert_file(layer): File(_size_of(runs))}
        try:
            with ExitStack() as targets, RunReader(self._folder, files, self._threads) as reader:
                places = [targets.enter_context(on_host(target)) for target in experts]
                reader.read([Wanted(run, f"expert {n}", places[n]) for n, run in enumerate(runs)])
        except CheckpointError as error:
            logger.warning("layer %d is quantized again: %s", layer, str(error).removesuffix(f"; {AGAIN}"))
            return False
        self._runs[layer] = runs
        return True

    def keep(self, layer: int, experts: Sequence[Tensor]) -> None:
        """Write a layer. What prevents it is one line of the log, after which no more is written."""
        if not self._is_on:
            return
        record = self._record(layer)
        try:
            for path in (record, self._folder / expert_file(layer)):  # a packed folder may have the old file, too
                path.unlink(missing_ok=True)
            with RunFile(self._folder, expert_file(layer)) as file:
                runs = tuple(file.write(expert) for expert in experts)
            new = record.with_suffix(".new")
            new.write_text(json.dumps({"key": self._key, "crc32c": [run.crc for run in runs]}))
            new.replace(record)
        except OSError as error:
            self._stop(error)
        else:
            self._runs[layer] = runs

    def take_over(self, layer: int, folder: Path) -> tuple[Run, ...] | None:
        """Give a layer's file to a folder on the same disk, too; returns its runs, or None if it is not kept."""
        runs, name = self._runs.get(layer), expert_file(layer)
        if runs is None:
            return None
        try:
            os.link(self._folder / name, folder / name)
        except OSError:  # a file system without links
            shutil.copyfile(self._folder / name, folder / name)
        return runs

    def remove(self) -> None:
        """Remove what is kept."""
        if self._is_on:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._runs.clear()

    def _recorded(self, layer: int, experts: Sequence[Tensor]) -> tuple[Run, ...] | None:
        try:
            record = json.loads(self._record(layer).read_bytes())
            sums = [int(crc) for crc in record["crc32c"]]
            if record["key"] != self._key or len(sums) != len(experts):
                return None
        except (OSError, ValueError, TypeError, KeyError):
            return None
        runs, at = [], 0
        for crc, expert in zip(sums, experts, strict=True):
            runs.append(Run(expert_file(layer), at, expert.nbytes, crc))
            at += filled_up(expert.nbytes)
        return tuple(runs)

    def _record(self, layer: int) -> Path:
        return (self._folder / expert_file(layer)).with_suffix(".json")

    def _stop(self, error: Exception) -> None:
        logger.warning("layers are no longer kept in %s while they are quantized: %s", self._folder, first_line(error))
        self._is_on = False


@contextmanager
def kept_layers(folder: Path, key: str, make_room: Callable[[int], bool]) -> Iterator[KeptLayers]:
    """Keep the layers of a load inside the block; says what is kept if the block is ended by an error or by Ctrl-C.

    Args:
        folder, key, make_room: as in `KeptLayers`.
    """
    lock = folder.with_name(f".{folder.name}.lock")
    with ExitStack() as held:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(WeakFileLock(lock, timeout=0.1))
            held.callback(_unlink, lock)
            is_on = True
        except (Timeout, OSError):  # another process is at it, or nothing can be written there
            is_on = False
        kept = KeptLayers(folder, key, is_on, make_room)
        try:
            yield kept
        except BaseException:
            if kept.progress is not None and not is_quiet():
                print(f"{kept.progress}; the same command goes on from there", file=sys.stderr, flush=True)
            raise


def _size_of(runs: Sequence[Run]) -> int:
    return runs[-1].offset + filled_up(runs[-1].n_bytes)


def _unlink(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
