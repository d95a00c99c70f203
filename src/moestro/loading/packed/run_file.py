"""Writes a file of runs of bytes, each of which begins on a page; `runs.py` reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ...compute.checksum import bytes_of, crc32c
from .manifest import ALIGN_BYTES, Run


class RunFile:
    """A new file of runs; a context, at whose end it is closed."""

    def __init__(self, folder: Path, name: str) -> None:
        self._name, self._at = name, 0
        self._file: Any = open(folder / name, "wb", buffering=0)  # noqa: SIM115  # closed at the context's end

    def write(self, tensor: Tensor) -> Run:
        """Write bytes, uint8, on any device; returns where they are."""
        host = tensor.detach().to("cpu").contiguous()
        run = Run(self._name, self._at, host.nbytes, crc32c(host))
        fill = bytes(-host.nbytes % ALIGN_BYTES)
        write_all(self._file, bytes_of(host))
        write_all(self._file, memoryview(fill))
        self._at += host.nbytes + len(fill)
        return run

    def __enter__(self) -> RunFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def write_all(file: Any, view: memoryview) -> None:
    """Write all of a view to an unbuffered file, which may take a part at a time."""
    view = view.cast("B") if view.nbytes else view
    while view:
        view = view[file.write(view) :]
