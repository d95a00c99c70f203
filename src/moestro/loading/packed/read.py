"""A packed folder, opened: its moestro.json and small files are checked, and its runs can be read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...compute.checksum import crc32c
from ...errors import CheckpointError, RequestError, first_line
from ...memory.store import map_memory
from ...planning.spelling import spelled
from .manifest import AGAIN, MANIFEST, REST_FILE, Asked, Manifest, Run, filled_up, parse_manifest
from .runs import RunReader, Wanted, open_checked

_MOST_BYTES = 1 << 30  # of moestro.json
_LINE = 64  # bytes, as torch aligns tensors
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class PackedFolder:
    """A packed folder whose moestro.json and small files are whole.

    Args:
        model: as the user named it, for messages. folder: where it is.
        weights: False where the files of weights need not be there.

    Raises:
        CheckpointError: a file is damaged, absent, or of another size. ModelError: another version made it.
    """

    def __init__(self, model: str, folder: Path, *, weights: bool = True) -> None:
        self.model, self.folder = model, folder
        self.manifest = read_manifest(folder)
        for name, file in self.manifest.files.items():
            if not weights and (file.crc is None or name == REST_FILE):
                continue
            with open_checked(folder, name, file) as opened:
                if file.crc is not None and name != REST_FILE and crc32c(_all_of(opened)) != file.crc:
                    raise CheckpointError(f"{folder / name} is damaged: it is not what was written there; {AGAIN}")

    def refuse_others(self, asked: Asked, dtype: str | None) -> None:
        """Refuse options that the weights here do not have.

        Args:
            asked: the options that were given, None where one was not. dtype: likewise, as torch names it.

        Raises:
            RequestError: one of them is not so.
        """
        made = self.manifest.asked
        for name in ("expert_bits", "dense_bits", "head_bits", "transcode"):
            found, wanted = getattr(made, name), getattr(asked, name)
            if wanted not in (None, found):
                has = "as its checkpoint had them" if found is None else f"with {found}"
                set_too = "" if name == "transcode" else f" (which {spelled('bits')} sets, too)"
                raise RequestError(
                    f"{self.model} is packed {has}, not with {spelled(name, wanted)}{set_too}; leave it out, or pack "
                    "the checkpoint with it"
                )
        if made.fit is not None and asked.fit not in (None, made.fit):
            raise RequestError(
                f"{self.model} is packed with {spelled('fit', made.fit)}, not {asked.fit}; leave {spelled('fit')} "
                "out, or pack the checkpoint with it"
            )
        if dtype not in (None, self.manifest.dtype):
            raise RequestError(
                f"{self.model} is packed in {self.manifest.dtype}, not {dtype}; leave {spelled('dtype')} out, or "
                "pack the checkpoint with it"
            )

    def reader(self, threads: int) -> RunReader:
        """Its files of weights, open for reading by so many threads."""
        files = self.manifest.files
        return RunReader(self.folder, {n: f for n, f in files.items() if f.crc is None or n == REST_FILE}, threads)

    def rest(self, reader: RunReader) -> dict[str, Tensor]:
        """The tensors of rest.safetensors by name: views of one memory that the file is read into.

        Raises:
            CheckpointError: it is damaged.
        """
        file = self.manifest.files[REST_FILE]
        assert file.crc is not None
        memory = map_memory(file.n_bytes)
        reader.read([Wanted(Run(REST_FILE, 0, file.n_bytes, file.crc), "the file", memory)])
        try:
            size = int.from_bytes(memory[:8].numpy().tobytes(), "little")
            entries = json.loads(memory[8 : 8 + size].numpy().tobytes())
            return {name: _tensor(memory[8 + size :], one) for name, one in entries.items()}
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.folder / REST_FILE} is no safetensors ({first_line(error)}); {AGAIN}"
            ) from error


def verify_packed(folder: Path, threads: int, done: Callable[[int], Any] = lambda n_bytes: None) -> Manifest:
    """Read all of a packed folder and check all checksums; nothing is kept.

    Args:
        done: told the bytes of each run that was read.

    Raises:
        As `PackedFolder` and `RunReader.read`.
    """
    opened = PackedFolder(str(folder), folder)
    with opened.reader(threads) as reader:
        opened.rest(reader)
        for _, run, what in runs_of(opened.manifest):
            reader.read([Wanted(run, what, torch.empty(run.n_bytes, dtype=torch.uint8))], done)
    return opened.manifest


def runs_of(manifest: Manifest) -> Iterable[tuple[tuple[int, int] | str, Run, str]]:
    """All runs, each with its layer and expert or the name of its matrix, and in words."""
    for number, layer in enumerate(manifest.layers):
        for expert, run in enumerate(layer.experts):
            yield (number, expert), run, f"expert {expert} of {layer.module}"
    for one in manifest.dense:
        yield one.name, one.run, one.name


def read_manifest(folder: Path) -> Manifest:
    """The moestro.json of a folder.

    Raises:
        CheckpointError: it is damaged or cannot be read. ModelError: another version made it.
    """
    path = folder / MANIFEST
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
    manifest = parse_manifest(str(folder), text, crc32c)
    covered = dict.fromkeys((name for name, file in manifest.files.items() if file.crc is None), 0)
    for _, run, _ in runs_of(manifest):
        covered[run.file] = covered.get(run.file, 0) + filled_up(run.n_bytes)
    if REST_FILE not in manifest.files or any(n != manifest.files[name].n_bytes for name, n in covered.items()):
        raise CheckpointError(f"{folder}: its {MANIFEST} does not say what all bytes of its files are; {AGAIN}")
    return manifest


def _all_of(opened: Any) -> bytes:
    parts = []
    while part := opened.read(1 << 24):
        parts.append(part)
    return b"".join(parts)


def _tensor(memory: Tensor, entry: dict[str, Any]) -> Tensor:
    """A tensor of a safetensors file, a view of its data where that is aligned as torch's own."""
    dtype, (start, stop) = DTYPES[entry["dtype"]], entry["data_offsets"]
    if not 0 <= start <= stop <= memory.numel():
        raise ValueError(f"bytes {start} to {stop} of {memory.numel()}")
    part = memory[start:stop]
    part = part if part.data_ptr() % _LINE == 0 else part.clone()  # or torch's sums may differ in the last bit
    return part.view(dtype).view(entry["shape"])
