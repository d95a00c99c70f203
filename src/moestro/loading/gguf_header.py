"""GGUF, the container that llama.cpp reads: its metadata and its table of tensors, from a file's first bytes.

One parser for files here, which are mapped whole, and for files on the hub, of which ranges are asked for. Every length
is checked against the file's size before it is followed, so a damaged file is one line and never a wait. Knows nothing
of weights. Needs the standard library alone.

Layout (versions 2 and 3, little-endian; llama.cpp's docs/gguf.md): magic, version u32, tensors u64, entries u64; each
entry a key, a type and a value; each tensor a name, dimensions (the fastest first), a type and an offset into the data,
which begins at the next multiple of `general.alignment`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ..errors import CheckpointError, ModelError

GGML_TYPES = {  # number: (name, weights of a block, bytes of a block)
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
# Types that --transcode 8 turns into int8, since no format here keeps them.
TRANSCODED = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0")
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LEAST_BYTES = 24  # of a file


class NeedMore(Exception):
    """More of the file is needed: its first `need` bytes at least."""

    def __init__(self, need: int) -> None:
        super().__init__(need)
        self.need = need


@dataclass(frozen=True, slots=True)
class GgufEntry:
    """One tensor of a file.

    type: as llama.cpp names it, "Q4_K" or "F16". shape: outermost dimension first, in weights.
    start, n_bytes: where its bytes begin in the file, and how many there are.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The metadata of a file, and its tensors."""

    metadata: Mapping[str, Any]
    tensors: tuple[GgufEntry, ...]


def parse_gguf(name: str, data: bytes | bytearray | memoryview, size: int) -> GgufHeader:
    """Read the header of a GGUF file.

    Args:
        name: of the file, for errors.
        data: its first bytes, or all of them.
        size: of the whole file, in bytes.

    Raises:
        NeedMore: the header is longer than `data`, as far as `data` says.
        CheckpointError: it is no GGUF file, or damaged, or cut short.
        ModelError: a tensor is of a type that is not known.
    """
    return _Reader(name, data, size).read()


class _Reader:
    """Reads one file from its first byte on."""

    def __init__(self, name: str, data: bytes | bytearray | memoryview, size: int) -> None:
        self._name, self._data, self._size, self._at = name, memoryview(data), size, 0
        if size < _LEAST_BYTES:
            raise CheckpointError(f"{name} is no GGUF file: it has {size} bytes, and is damaged or cut short")

    def read(self) -> GgufHeader:
        if (magic := bytes(self._take(4))) != b"GGUF":
            raise CheckpointError(f"{self._name} is no GGUF file: it begins with {magic!r} instead of b'GGUF'")
        version = self._number("I")
        if version not in (2, 3):
            swapped = version in (2 << 24, 3 << 24)
            what = "a big-endian GGUF file" if swapped else f"a file of GGUF version {version}"
            raise CheckpointError(f"{self._name} is {what}; Moestro reads little-endian ones of versions 2 and 3")
        tensors, entries = self._number("Q"), self._number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(self._count(entries, 12)):
            key = self._string()
            metadata[key] = self._value(self._number("I"), key)
        infos = [self._info() for _ in range(self._count(tensors, 24))]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise CheckpointError(
                f"{self._name} says that its tensors begin at multiples of {alignment}; it is damaged"
            )
        start = -(-self._at // alignment) * alignment
        found = [self._entry(start, *info) for info in infos]
        if len({entry.name for entry in found}) < len(found):
            raise self._damaged("two tensors have one name")
        return GgufHeader(metadata, tuple(found))

    def _entry(self, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufEntry:
        if kind not in GGML_TYPES:
            raise ModelError(f"{self._name}: {name} is of type {kind}, which is not known")
        type_name, block, block_bytes = GGML_TYPES[kind]
        if shape[-1] % block:
            raise CheckpointError(
                f"{self._name}: {name} is {list(shape)} in {type_name}, whose blocks of {block} do not divide it"
            )
        n_bytes = prod(shape) // block * block_bytes
        if offset % 8 or n_bytes > self._size - start - offset:
            raise CheckpointError(f"{self._name} is damaged or cut short: {name} ends beyond it; download it again")
        return GgufEntry(name, type_name, shape, start + offset, n_bytes)

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
        """A number of things that take some bytes each, if the rest of the file can hold them.

        Where the rest of the data cannot, more is asked for at once.
        """
        if count > (self._size - self._at) // least_bytes:
            raise self._damaged(f"it says that {count} things follow")
        if self._at + count * least_bytes > len(self._data):
            raise NeedMore(self._at + count * least_bytes)
        return count

    def _string(self) -> str:
        try:
            return str(self._take(self._number("Q")), "utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged("a text is no UTF-8") from error

    def _number(self, kind: str) -> Any:
        number = struct.unpack(f"<{kind}", self._take(struct.calcsize(f"<{kind}")))[0]
        return _shortest(number) if kind == "f" else number

    def _take(self, size: int) -> memoryview:
        if size > self._size - self._at:
            raise self._damaged("it ends too early")
        if self._at + size > len(self._data):
            raise NeedMore(self._at + size)
        self._at += size
        return self._data[self._at - size : self._at]

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._name} is damaged or cut short at byte {self._at} ({what}); download it again")


def _shortest(number: float) -> float:
    """Of a float32, the shortest decimal that stands for it, which is what a config had: 1e-06."""
    for digits in range(1, 10):
        short = float(f"{number:.{digits}g}")
        try:
            if struct.pack("<f", short) == struct.pack("<f", number):
                return short
        except OverflowError:  # rounded up beyond the largest
            continue
    return number
