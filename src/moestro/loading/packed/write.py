"""Write a loaded model as a packed folder: its experts and dense panels as they lie in memory, and all else beside.

The folder appears under its name when it is whole (`atomic.py`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...compute.checksum import bytes_of, crc32c
from ...decode.dense import Packed, PackedLinear
from ...engine.conductor import Conductor
from ...engine.families import expert_modules
from ...errors import ModelError, MoestroError, RequestError, first_line
from ...planning.budget import format_bytes
from ..build import home
from .atomic import new_folder
from .kept_layers import KeptLayers
from .manifest import DENSE_FILE, MANIFEST, REST_FILE, Asked, Dense, File, Layer, Manifest, expert_file
from .read import DTYPES, read_manifest
from .restore import ORDER
from .run_file import RunFile, write_all

_LINE = 64  # bytes, as torch aligns tensors: sums of numbers that lie otherwise may differ in the last bit
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_packed(
    model: Any,
    target: Path,
    *,
    source: Mapping[str, Any],
    asked: Asked,
    beside: Callable[[Path], None],
    kept: KeptLayers | None = None,
) -> Manifest:
    """Write a model that `moestro.load` made, on any device.

    Args:
        target: the folder, which may be a packed one, to be replaced.
        source: what the model is of, for moestro.json. asked: the options that made its weights.
        beside: writes config.json, the tokenizer and the like into a folder.
        kept: the layers of experts that were written while the model loaded.

    Raises:
        RequestError: something else is there, or the disk is full. ModelError: it has a tensor that cannot be kept.
    """
    refuse_replacing(target)
    rest, matrices, n_bytes = _rest_of(model), list(_packed_of(model)), bytes_of_model(model)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{target} cannot be written: {first_line(error)}; name another folder") from error
    free = shutil.disk_usage(target.parent).free + (0 if kept is None else kept.n_bytes)
    if n_bytes > free:
        raise RequestError(
            f"{target} needs {format_bytes(n_bytes)}, and its disk has {format_bytes(free)} free; free "
            f"{format_bytes(n_bytes - free)} more, or name a folder on another disk"
        )
    with new_folder(target, refuse_replacing) as folder:
        beside(folder)
        layers = _write_experts(model, folder, kept)
        dense = _write_matrices(matrices, folder)
        runs = *(run for layer in layers for run in layer.experts), *(one.run for one in dense)
        _write_rest(folder / REST_FILE, rest)
        manifest = Manifest(
            source=source,
            asked=asked,
            dtype=str(model.config.dtype or torch.get_default_dtype()).removeprefix("torch."),
            layers=layers,
            dense=dense,
            files=_files_of(folder, {run.file for run in runs}),
            is_marked=hasattr(model.config, "_is_quantized"),
            made_by=version("moestro"),
        )
        _write_file(folder / MANIFEST, manifest.text(crc32c))
    if kept is not None:
        kept.remove()
    return manifest


def bytes_of_model(model: Any) -> int:
    """The bytes of a loaded model's weights, about those of its packed folder."""
    dense = sum(module.matrix.packed.nbytes for _, module in _packed_of(model))
    return int(model.moestro.spec.expert_bytes) + dense + sum(tensor.nbytes for tensor in _rest_of(model).values())


def refuse_replacing(target: Path) -> None:
    """Refuse to put a packed folder in the place of something else.

    Raises:
        RequestError: there is a file, or a folder with other files than a packed one has.
    """
    if not target.exists() and not target.is_symlink():
        return
    names = {path.relative_to(target).as_posix() for path in target.rglob("*")} if target.is_dir() else {"."}
    if not names and not target.is_symlink():
        return
    try:
        if target.is_symlink() or not (target / MANIFEST).is_file():
            raise RequestError("it is no packed folder")
        known = {MANIFEST, *read_manifest(target).files}
        known |= {parent.as_posix() for name in known for parent in Path(name).parents}
        if others := sorted(names - known):
            raise RequestError(f"it has {others[0]} besides")
    except MoestroError as error:
        raise RequestError(f"{target} is there and will not be replaced ({error}); name another folder") from error


def _write_experts(model: Any, folder: Path, kept: KeptLayers | None) -> tuple[Layer, ...]:
    """Write the experts of each layer to a file of its own, or take over the one that was written while it loaded."""
    conductor: Conductor = model.moestro
    layers = []
    for number, name in enumerate(expert_modules(model)):
        math, count = conductor.math[number], conductor.spec.layers[number].experts
        runs = None if kept is None else kept.take_over(number, folder)
        if runs is None:
            with RunFile(folder, expert_file(number)) as file:
                runs = tuple(file.write(home(conductor, number, expert)) for expert in range(count))
        shape = math.shape
        sizes = shape.hidden, shape.neurons, shape.has_gate, shape.has_bias
        layers.append(Layer(name, math.format.name, math.format.block, *sizes, runs))
    return tuple(layers)


def _packed_of(model: Any) -> Iterator[tuple[str, Packed]]:
    """Each packed matrix once, under the name by which a model without weights has it (`dense.packable`)."""
    tied = getattr(model, "all_tied_weights_keys", {})
    seen = set()
    for name, module in model.named_modules():
        if isinstance(module, Packed) and id(module.matrix.packed) not in seen:
            seen.add(id(module.matrix.packed))
            yield tied.get(f"{name}.weight", f"{name}.weight"), module


def _write_matrices(matrices: list[tuple[str, Packed]], folder: Path) -> tuple[Dense, ...]:
    if not matrices:
        return ()
    with RunFile(folder, DENSE_FILE) as file:
        return tuple(_write_matrix(name, module, file) for name, module in matrices)


def _write_matrix(name: str, module: Packed, file: RunFile) -> Dense:
    matrix = module.matrix
    dtype = str(module.weight_dtype).removeprefix("torch.")
    size = int(matrix.rows), int(matrix.columns)  # inkling counts its features with a tensor
    return Dense(name, matrix.fmt.name, *size, dtype, matrix.order is not None, file.write(matrix.packed))


def _rest_of(model: Any) -> dict[str, Tensor]:
    """All parameters and buffers that are not packed, those too that a state dict leaves out, and orders of columns."""
    rest = dict((*model.named_parameters(), *model.named_buffers()))
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) and (bias := module.matrix.bias) is not None:
            own = bias.to(module.weight_dtype)
            rest[f"{name}.bias"] = own if torch.equal(own.float(), bias) else bias
    orders = {name: module.matrix.order for name, module in _packed_of(model)}
    rest |= {f"{ORDER}{name}": order for name, order in orders.items() if order is not None}
    for name, tensor in rest.items():
        if tensor.dtype not in _NAMES:
            raise ModelError(f"{name} is of {tensor.dtype}, which a packed folder does not keep")
    return rest


def _write_rest(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as a safetensors file, those of wide numbers first, so that all are aligned."""
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    entries, at = {}, 0
    for name in names:
        tensor = tensors[name]
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % _LINE)
    with path.open("wb", buffering=0) as file:
        write_all(file, memoryview(len(header).to_bytes(8, "little") + header))
        for name in names:
            flat = tensors[name].detach().to("cpu").contiguous().view(-1)
            write_all(file, bytes_of(flat.view(torch.uint8)))


def _write_file(path: Path, contents: bytes) -> None:
    with path.open("wb", buffering=0) as file:
        write_all(file, memoryview(contents))
        os.fsync(file.fileno())


def _files_of(folder: Path, of_runs: set[str]) -> dict[str, File]:
    """All files of a folder, flushed to the disk, with the checksums of those that have no runs."""
    found = {}
    for path in sorted(one for one in folder.rglob("*") if one.is_file()):
        name = path.relative_to(folder).as_posix()
        crc, size = 0, 0
        with path.open("r+b") as file:  # as fsync wants it on Windows
            while name not in of_runs and (part := file.read(1 << 24)):
                crc, size = crc32c(part, crc), size + len(part)
            os.fsync(file.fileno())
        found[name] = File(path.stat().st_size) if name in of_runs else File(size, crc)
    return found
