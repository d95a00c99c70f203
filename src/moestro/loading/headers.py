"""Headers of weights files: names, types and shapes of their tensors, from the first bytes, here or on the hub.

Reads no weight. Knows the files' layout, not what tensors mean. Needs the standard library alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import CheckpointError
from .gguf_header import NeedMore, parse_gguf
from .hub import Wanted

_FIRST_BYTES = 1 << 18  # of a GGUF file, which says nowhere how long its header is
_LENGTH_BYTES = 8  # of a safetensors file, which begins with that: no byte of a weight is asked for
_MOST_BYTES = 1 << 28  # of a header; the largest vocabularies take some 2**24


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor of a file: its type, as the file names it, its shape, slowest dimension first, and its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of a file and what else its header says."""

    tensors: tuple[TensorHeader, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)


def read_header(wanted: Wanted, name: str) -> Header:
    """The header of a .safetensors or .gguf file.

    Raises:
        CheckpointError: it is none, or the file is cut short. MoestroError: it cannot be read. One line.
    """
    data, size = b"", wanted.sizes[name]
    is_gguf = name.lower().endswith(".gguf")
    need = _FIRST_BYTES if is_gguf else _LENGTH_BYTES
    while True:
        data += wanted.read(name, len(data), need)
        try:
            if is_gguf:
                return _gguf(f"{wanted.model}: {name}", data, size)
            return _parse_safetensors(data, size)
        except NeedMore as short:
            if len(data) >= size or need >= _MOST_BYTES:
                raise CheckpointError(f"{wanted.model}: {name} is damaged or cut short ({size} bytes)") from short
            need = min(max(short.need, 4 * need) if is_gguf else short.need, _MOST_BYTES)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{wanted.model}: {name} has no header that can be read ({error})") from error


def _gguf(name: str, data: bytes, size: int) -> Header:
    found = parse_gguf(name, data, size)
    tensors = (TensorHeader(one.name, one.type, one.shape, one.n_bytes) for one in found.tensors)
    return Header(tuple(tensors), found.metadata)


def _parse_safetensors(data: bytes, size: int) -> Header:
    if len(data) < 8:
        raise NeedMore(8)
    end = 8 + int.from_bytes(data[:8], "little")
    if end > min(size, _MOST_BYTES):
        raise ValueError(f"it says that it is {end - 8} bytes long, in a file of {size}")
    if len(data) < end:
        raise NeedMore(end)
    entries = json.loads(data[8:end])
    entries.pop("__metadata__", None)
    tensors = []
    for name, entry in entries.items():
        first, last = map(int, entry["data_offsets"])
        if not 0 <= first <= last <= size - end:
            raise ValueError(f"{name} ends at {end + last}, in a file of {size}; it may be cut short")
        tensors.append(TensorHeader(name, str(entry["dtype"]), tuple(map(int, entry["shape"])), last - first))
    return Header(tuple(tensors))


def prefix_of(names: Iterable[str], indexed: Iterable[str]) -> str:
    """What the index has before the names of a file that leaves it out, as those of mixtral-offloading's experts do."""
    wanted, found = set(indexed), list(names)
    if not wanted.isdisjoint(found):
        return ""
    before = Counter(one.removesuffix(name) for name in found for one in wanted if one.endswith(f".{name}"))
    return max(before, key=lambda prefix: before[prefix], default="")
