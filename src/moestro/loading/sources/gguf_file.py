"""The container that llama.cpp reads: metadata, a table of tensors, and their bytes, in one file or several.

Every length is checked against the file before it is followed, so a damaged file is one line and never a wait.

Layout (versions 2 and 3, little-endian): magic, version u32, tensors u64, entries u64; each entry a key, a type and a
value; each tensor a name, dimensions (the fastest first), a type and an offset into the data, which begins at the
next multiple of `general.alignment`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import CheckpointError, ModelError

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 28: torch.float64}
_INTEGERS = {24: torch.int8, 25: torch.int16, 26: torch.int32, 27: torch.int64}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of a file.

    shape: outermost dimension first, in weights.
    type: as llama.cpp names it, "Q4_K" or "F16".
    data: of floats and integers, that dtype in `shape`; else uint8 [..., bytes of a row]; a view of the mapped file.
    """

    shape: tuple[int, ...]
    type: str
    data: Tensor


@dataclass(slots=True)
class GgufFile:
    """The metadata of the first file, and the tensors of all."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf(paths: Sequence[Path]) -> GgufFile:
    """Read one file, or the parts of one that was split.

    Raises:
        CheckpointError: one is damaged, cut short or missing.
        ModelError: `gguf` is not installed; a tensor's type is not known.
    """
    whole = GgufFile({}, {})
    for path in split_files(paths):
        part = _Reader(path).read()
        whole.metadata = whole.metadata or part.metadata
        if twice := whole.tensors.keys() & part.tensors.keys():
            raise CheckpointError(f"{path} holds {min(twice)} a second time; the files do not belong together")
        whole.tensors |= part.tensors
    count = whole.metadata.get("split.tensors.count")
    if isinstance(count, int) and count not in (0, len(whole.tensors)):
        raise CheckpointError(
            f"{paths[0]} and its parts hold {len(whole.tensors)} of {count} tensors; download it again"
        )
    return whole


def split_files(paths: Sequence[Path]) -> list[Path]:
    """All parts of a file that was split in parts named NAME-00001-of-00003.gguf, from one or more of them.

    Raises:
        CheckpointError: a part is missing. ModelError: files of several models.
    """
    stem, mark, count = paths[0].stem.rpartition("-of-")
    if not mark or not count.isdigit() or not 0 < int(count) < 100000 or not stem[-5:].isdigit():
        if len(paths) > 1:
            raise ModelError(f"{paths[0].parent} holds {len(paths)} .gguf files; name one, such as {paths[0].name}")
        return list(paths)
    parts = [paths[0].with_name(f"{stem[:-5]}{i:05d}-of-{count}.gguf") for i in range(1, int(count) + 1)]
    if missing := [part for part in parts if not part.exists()]:
        raise CheckpointError(f"{missing[0].name} is missing beside {paths[0]}; download all {len(parts)} parts")
    if others := set(paths) - set(parts):
        raise ModelError(f"{paths[0].parent} holds more than one model: name {parts[0].name} or {min(others).name}")
    return parts


def gguf_package() -> Any:
    """The `gguf` package, llama.cpp's own tables of types and names.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ModelError("reading .gguf files needs the gguf package: pip install 'moestro[gguf]'") from error
    return gguf


class _Reader:
    """Reads one file from its first byte on."""

    def __init__(self, path: Path) -> None:
        self._path, self._size, self._at = path, path.stat().st_size, 0
        if self._size < 24:
            raise CheckpointError(f"{path} is no GGUF file: it has {self._size} bytes")
        self._bytes = torch.from_file(str(path), shared=False, size=self._size, dtype=torch.uint8)
        self._buffer = memoryview(self._bytes.numpy())  # type: ignore[arg-type]
        self._types = {int(kind): (kind.name, sizes) for kind, sizes in gguf_package().GGML_QUANT_SIZES.items()}

    def read(self) -> GgufFile:
        if bytes(self._take(4)) != b"GGUF":
            raise CheckpointError(f"{self._path} is no GGUF file: it does not begin with GGUF")
        version = self._number("I")
        if version not in (2, 3):
            swapped = version in (2 << 24, 3 << 24)
            what = "big-endian" if swapped else f"version {version}"
            raise CheckpointError(
                f"{self._path} is a {what} GGUF file; Moestro reads little-endian ones of versions 2 and 3"
            )
        tensors, entries = self._number("Q"), self._number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(self._count(entries, 12)):
            key = self._string()
            metadata[key] = self._value(self._number("I"), key)
        infos = [self._info() for _ in range(self._count(tensors, 24))]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise CheckpointError(
                f"{self._path} says that its tensors begin at multiples of {alignment}; it is damaged"
            )
        start = -(-self._at // alignment) * alignment
        return GgufFile(metadata, {info[0]: self._tensor(start, *info) for info in infos})

    def _tensor(self, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        if kind not in self._types:
            raise ModelError(f"{self._path}: {name} is of type {kind}, which no format of the gguf package has")
        type_name, (block, block_bytes) = self._types[kind]
        if not shape or shape[-1] % block:
            raise CheckpointError(
                f"{self._path}: {name} is {list(shape)} in {type_name}, whose blocks of {block} do not divide it"
            )
        row_bytes = shape[-1] // block * block_bytes
        first, size = start + offset, prod(shape[:-1]) * row_bytes
        if offset % 8 or size > self._size - first:
            raise CheckpointError(f"{self._path} is damaged or cut short: {name} ends beyond it; download it again")
        data = self._bytes[first : first + size]
        dtype = _FLOATS.get(kind, _INTEGERS.get(kind))
        data = data.view(*shape[:-1], row_bytes) if dtype is None else data.view(dtype).view(shape)
        return GgufTensor(shape, type_name, data)

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimensions = self._number("I")
        if not 0 < dimensions <= 4:
            raise self._damaged(f"{name!r} has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        if 0 in shape:
            raise self._damaged(f"{name!r} is {list(shape)}")
        return name, shape, self._number("I"), self._number("Q")

    def _value(self, kind: int, key: str) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._damaged(f"{key!r} is of type {kind}")
        inner, count = self._number("I"), self._number("Q")
        if inner in _NUMBERS:
            width = struct.calcsize(f"<{_NUMBERS[inner]}")
            return list(struct.unpack(f"<{self._count(count, width)}{_NUMBERS[inner]}", self._take(count * width)))
        if inner != _STRING:
            raise self._damaged(f"{key!r} is an array of type {inner}")
        return [self._string() for _ in range(self._count(count, 8))]

    def _count(self, count: int, least_bytes: int) -> int:
        """A number of things that take some bytes each, if the rest of the file can hold them."""
        if count > (self._size - self._at) // least_bytes:
            raise self._damaged(f"it says that {count} things follow")
        return count

    def _string(self) -> str:
        try:
            return str(self._take(self._number("Q")), "utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged("a text is no UTF-8") from error

    def _number(self, kind: str) -> Any:
        number = struct.unpack(f"<{kind}", self._take(struct.calcsize(f"<{kind}")))[0]
        # The shortest decimal of a float32 is what a config had: 1e-06, not 9.999999974752427e-07.
        return float(str(np.float32(number))) if kind == "f" else number

    def _take(self, size: int) -> memoryview:
        if size > self._size - self._at:
            raise self._damaged("it ends too early")
        self._at += size
        return self._buffer[self._at - size : self._at]

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is damaged or cut short at byte {self._at} ({what}); download it again")
