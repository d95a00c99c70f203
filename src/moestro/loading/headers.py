"""Headers of weights files: names, types and shapes of their tensors, from the first bytes, here or on the hub.

Reads no weight. Knows the files' layout, not what tensors mean. Needs the standard library alone.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import CheckpointError
from .hub import Wanted

_FIRST_BYTES = 1 << 18
_MOST_BYTES = 1 << 28  # of a header; the largest vocabularies take some 2**24
_MOST = 1 << 20  # tensors or entries; more are no counts but damage

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
_VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor of a file: its type, as the file names it, its shape, slowest dimension first, and its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of a file and what else its header says; of arrays of texts, only their length."""

    tensors: tuple[TensorHeader, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)


def read_header(wanted: Wanted, name: str) -> Header:
    """The header of a .safetensors or .gguf file.

    Raises:
        CheckpointError: it is none, or the file is cut short. MoestroError: it cannot be read. One line.
    """
    data, size = b"", wanted.sizes[name]
    need = _FIRST_BYTES
    parse = _parse_gguf if name.lower().endswith(".gguf") else _parse_safetensors
    while True:
        data += wanted.read(name, len(data), need)
        try:
            return parse(data, size)
        except _Short as short:
            if len(data) >= size or need >= _MOST_BYTES:
                raise CheckpointError(f"{wanted.model}: {name} is damaged or cut short ({size} bytes)") from short
            need = max(short.need, 4 * need)
        except (ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
            raise CheckpointError(f"{wanted.model}: {name} has no header that can be read ({error})") from error


class _Short(Exception):
    """More of the file is needed: its first `need` bytes at least."""

    def __init__(self, need: int) -> None:
        super().__init__(need)
        self.need = need


def _parse_safetensors(data: bytes, size: int) -> Header:
    if len(data) < 8:
        raise _Short(8)
    end = 8 + int.from_bytes(data[:8], "little")
    if end > min(size, _MOST_BYTES):
        raise ValueError(f"it says that it is {end - 8} bytes long, in a file of {size}")
    if len(data) < end:
        raise _Short(end)
    entries = json.loads(data[8:end])
    entries.pop("__metadata__", None)
    tensors = []
    for name, entry in entries.items():
        first, last = map(int, entry["data_offsets"])
        if not 0 <= first <= last <= size - end:
            raise ValueError(f"{name} ends at {end + last}, in a file of {size}; it may be cut short")
        tensors.append(TensorHeader(name, str(entry["dtype"]), tuple(map(int, entry["shape"])), last - first))
    return Header(tuple(tensors))


class _Reader:
    """Reads a GGUF header's values one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def skip(self, n_bytes: int) -> int:
        """Go on by so many bytes; where they begin."""
        start, self.at = self.at, self.at + n_bytes
        if self.at > len(self.data):
            raise _Short(self.at)
        return start

    def number(self, code: str) -> Any:
        return struct.unpack_from(f"<{code}", self.data, self.skip(struct.calcsize(f"<{code}")))[0]

    def count(self) -> int:
        found = int(self.number("Q"))
        if found > _MOST:
            raise ValueError(f"a count of {found}")
        return found

    def text(self) -> str:
        n_bytes = self.count()
        start = self.skip(n_bytes)
        return self.data[start : self.at].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """A value of a metadata's kind; of an array of texts, its length."""
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self.number(_VALUES[kind])
        of, count = self.number("I"), int(self.number("Q"))
        if of == _TEXT:
            if count > len(self.data):
                raise _Short(8 * count)
            for _ in range(count):
                self.skip(self.count())
            return count
        code = _VALUES[of]
        start = self.skip(count * struct.calcsize(f"<{code}"))
        return list(struct.unpack_from(f"<{count}{code}", self.data, start))


def _parse_gguf(data: bytes, size: int) -> Header:
    reader = _Reader(data)
    reader.skip(4)
    if data[:4] != b"GGUF":
        raise ValueError(f"it begins with {data[:4]!r} instead of b'GGUF'")
    version = reader.number("I")
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version}; there are 2 and 3, little-endian")
    n_tensors, n_entries = reader.count(), reader.count()
    metadata = {}
    for _ in range(n_entries):
        name = reader.text()
        metadata[name] = reader.value(reader.number("I"))
    tensors, end = [], 0
    for _ in range(n_tensors):
        name, n_dimensions = reader.text(), reader.number("I")
        if n_dimensions > 4:
            raise ValueError(f"{name} has {n_dimensions} dimensions")
        shape = tuple(int(reader.number("Q")) for _ in range(n_dimensions))[::-1]
        kind, offset = reader.number("I"), int(reader.number("Q"))
        if kind not in GGML_TYPES:
            raise ValueError(f"{name} is of type {kind}, which is not known")
        dtype, of_block, block_bytes = GGML_TYPES[kind]
        if shape and shape[-1] % of_block:
            raise ValueError(f"{name} has rows of {shape[-1]} weights, which blocks of {of_block} do not divide")
        n_bytes = math.prod(shape) // of_block * block_bytes
        tensors.append(TensorHeader(name, dtype, shape, n_bytes))
        end = max(end, offset + n_bytes)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"an alignment of {alignment}")
    start = -(-reader.at // alignment) * alignment
    if start + end > size:
        raise ValueError(f"its tensors end at {start + end}, in a file of {size}; it is cut short")
    return Header(tuple(tensors), metadata)
