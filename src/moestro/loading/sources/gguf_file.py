"""GGUF files on this machine: their metadata, and their tensors as views of the mapped files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, ModelError, first_line
from ..gguf_header import parse_gguf
from ..once import once

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_DTYPES |= {"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}


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
    gguf_package()
    whole = GgufFile({}, {})
    for path in split_files(paths):
        part = once(("gguf", path), lambda path=path: _read_file(path))  # type: ignore[misc]
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


def _read_file(path: Path) -> GgufFile:
    try:
        size = path.stat().st_size
        mapped = torch.empty(0, dtype=torch.uint8)
        if size:
            mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read ({first_line(error)})") from error
    header = parse_gguf(str(path), memoryview(mapped.numpy()), size)  # type: ignore[arg-type]
    tensors = {}
    for entry in header.tensors:
        data, dtype = mapped[entry.start : entry.start + entry.n_bytes], _DTYPES.get(entry.type)
        data = data.view(*entry.shape[:-1], -1) if dtype is None else data.view(dtype).view(entry.shape)
        tensors[entry.name] = GgufTensor(entry.shape, entry.type, data)
    return GgufFile(dict(header.metadata), tensors)
