"""Load unquantized safetensors from the mapped files: experts straight into the store, dense layers into their panels.

The result is what Transformers' `from_pretrained` with our quantizer gives, bit for bit, and takes a fraction of its
time: no tensor is copied on the way, none is converted that keeps its dtype. `sources/plain.py` proves beforehand that
each weight is where Transformers would take it from. What cannot be proven is left to `from_pretrained` (`Unproven`);
docs/design.md lists these checkpoints.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..compute.experts import ExpertMath
from ..compute.repack import pack_stored_experts, pack_stored_matrix
from ..decode.dense import DenseFormats, StoredWeight, packable
from ..engine.families import expert_modules
from ..errors import MoestroError, first_line, in_tensor
from ..memory.formats import FLOAT_FORMATS, ExpertFormat, ExpertShape, MatrixFormat
from ..memory.store import on_host
from ..progress import counted
from .build import dense_formats, home
from .checkpoint import weight_files
from .config import MoestroConfig
from .packed.kept_layers import KeptLayers
from .plug import MoestroQuantizer
from .sources import ExpertWeights
from .sources.plain import PlainWeights, Unproven, first_dtype
from .stored import empty_model, give_buffers_memory, take_generation_config
from .timing import spent

logger = logging.getLogger("moestro")

_AT_ONCE_BYTES = 1 << 26  # of experts, between which no thread waits for another
_DTYPES = {name: dtype for dtype, name in FLOAT_FORMATS.items()}


def load_plain(
    name: str,
    auto: Any,
    hf_config: Any,
    config: MoestroConfig,
    dtype: Any,
    trust_remote_code: bool,
    kept: KeptLayers | None = None,
) -> tuple[Any, list[str]]:
    """A model of a folder of unquantized safetensors.

    Args:
        name: the folder. auto: the auto class that makes the model. hf_config: its Transformers config.
        dtype: a torch dtype, or "auto" for the checkpoint's.
        kept: keeps layers that had to be quantized, and has those that a load before this one kept.

    Returns:
        The model, and the tensors that the checkpoint has and the model has no place for.

    Raises:
        Unproven: this checkpoint is for `from_pretrained`.
        MoestroError: one line on what was found, what was needed and what to do.
    """
    folder = Path(name)
    _refuse_what_transformers_reads(folder, hf_config, trust_remote_code)
    hf_config = copy.deepcopy(hf_config)
    hf_config.name_or_path = name
    dtype = _stated_dtype(folder, hf_config) if dtype == "auto" else dtype
    model = _made_on_meta(name, auto, hf_config, dtype, trust_remote_code)
    weights = _proven(model, folder)
    quantizer = MoestroQuantizer(config)
    model.hf_quantizer = quantizer
    quantizer.preprocess_model(model=model, dtype=dtype)
    threads, device = model.moestro.cpu.threads, quantizer.device
    fast = config.skips_fit
    packed = _packed_weights(model, weights, dense_formats(model, config, device), threads, fast)
    _fill_dense(model, weights.dense, device.torch_device)
    _fill_experts(model, weights, kept, fast)
    model.initialize_weights()  # buffers that no checkpoint has; experts' parameters are on the meta device
    model.tie_weights()
    model.set_use_kernels(False)
    take_generation_config(model, folder)
    quantizer.are_packed(packed)
    quantizer.postprocess_model(model)
    return model.eval(), weights.unexpected


def _refuse_what_transformers_reads(folder: Path, config: Any, trust_remote_code: bool) -> None:
    """Leave to Transformers what its loader reads in a way of its own.

    Raises:
        Unproven: saying what.
    """
    if trust_remote_code and (getattr(config, "auto_map", None) or (folder / "custom_generate").exists()):
        raise Unproven("the checkpoint brings code of its own")
    files = weight_files(folder)
    if not files or any(file.suffix != ".safetensors" for file in files):
        raise Unproven("its weights are pickles" if files else "it has no file of weights under a usual name")
    if any(folder.glob("shard-*-model-*-of-*.safetensors")):
        raise Unproven("it is a distributed checkpoint")
    if getattr(config, "transformers_weights", None) is not None or getattr(config, "fusion_config", None) is not None:
        raise Unproven("its config names a file of weights, or modules to fuse")
    if any((folder / extra).exists() for extra in getattr(type(config), "extra_files", ())):
        raise Unproven("some of its weights are in files beside the others")


def _made_on_meta(name: str, auto: Any, config: Any, dtype: Any, trust_remote_code: bool) -> Any:
    """The model without weights.

    Raises:
        Unproven: there is none, which Transformers' loader says in its own words, or it is of a class of the user's.
    """
    try:
        model = empty_model(name, auto, config, dtype, trust_remote_code)
    except MoestroError as error:
        raise Unproven(str(error)) from error
    if model.is_custom_code():
        raise Unproven(f"{type(model).__name__} is no class of Transformers' own")
    return model


def _proven(model: Any, folder: Path) -> PlainWeights:
    """The weights of a folder, each of which is surely where Transformers would take it from.

    Raises:
        Unproven: saying why not.
    """
    try:
        return PlainWeights(model, folder)
    except Unproven:
        raise
    except Exception as error:  # names and conversions are of any family, and conversions are any code
        raise Unproven(f"{type(error).__name__}: {first_line(error)}") from error


def _stated_dtype(folder: Path, config: Any) -> torch.dtype:
    """The dtype of a checkpoint as Transformers finds it: its config's, its index's, or its first tensor's.

    Raises:
        Unproven: none of these says one.
    """
    found = getattr(config, "dtype", None)
    index = folder / "model.safetensors.index.json"
    if found is None and index.exists() and not (folder / "model.safetensors").exists():
        found = json.loads(index.read_bytes()).get("metadata", {}).get("dtype")
    found = first_dtype(folder) if found is None else found
    found = getattr(torch, found, None) if isinstance(found, str) else found
    if not isinstance(found, torch.dtype):
        raise Unproven("neither its config nor its files say a dtype")
    return found


def _packed_weights(
    model: Any, weights: PlainWeights, formats: DenseFormats | None, threads: int, fast: bool
) -> dict[str, StoredWeight]:
    """Take out of the dense weights those that go into panels, which the model itself gets no values of."""
    kept = {}
    for layer in () if formats is None else packable(model, formats):
        if (read := weights.dense.pop(layer.name, None)) is None:
            continue
        write = functools.partial(_write_matrix, read=read, fmt=layer.fmt, threads=threads, fast=fast)
        kept[layer.name] = StoredWeight(write)
        dtype = weights.dtype_of(layer.name)
        if layer.weight.dtype != dtype:
            layer.weight.data = layer.weight.data.to(dtype)  # on the meta device
        layer.weight._is_hf_initialized = True  # type: ignore[attr-defined]
    return kept


def _write_matrix(panels: Tensor, *, read: Callable[[], Tensor], fmt: MatrixFormat, threads: int, fast: bool) -> None:
    """Fill the panels of a format, uint8 [matrix_bytes], with a matrix. fast: as in `MatrixFormat.pack`."""
    matrix = read()
    if fmt.is_float:
        pack_stored_matrix(panels, matrix.to(_DTYPES[fmt.name]), None, None, threads=threads)
    else:
        fmt.pack_blocks(matrix[None], panels[None], fast=fast)


def _fill_dense(model: Any, dense: dict[str, Callable[[], Tensor]], device: torch.device) -> None:
    """Give a model's parameters and buffers their values, taken out of `dense` one by one, and its buffers memory."""
    while dense:
        name, read = dense.popitem()
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        value = read().to(device, copy=True)  # the file may go
        if leaf in module._buffers:
            module._buffers[leaf] = value
        else:
            value = module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        value._is_hf_initialized = True  # type: ignore[attr-defined]
    give_buffers_memory(model, device)


def _fill_experts(model: Any, weights: PlainWeights, kept: KeptLayers | None, fast: bool) -> None:
    """Pack each expert from the files into its home, in RAM or in a slot. Layers that are kept are read instead.

    Args:
        fast: as in `MatrixFormat.pack`.
    """
    conductor = model.moestro
    if kept is not None and not all(_is_float(math.format) for math in conductor.math):
        kept.begin(len(conductor.math), conductor.spec.expert_bytes, conductor.cpu.threads)
    for index, module in enumerate(counted(expert_modules(model), "packing experts", "layers")):
        math = conductor.math[index]
        homes = [home(conductor, index, each) for each in range(conductor.spec.layers[index].experts)]
        kept_here = None if _is_float(math.format) else kept  # plain weights are as fast to read again
        if kept_here is not None and kept_here.restore(index, homes):
            continue
        weights.fetch(module)
        with spent("packing"):
            _fill_layer(module, homes, weights, math, conductor.cpu.threads, fast)
        logger.debug("packed %s, %d experts of %d bytes", module, len(homes), homes[0].nbytes)
        if kept_here is not None:
            kept_here.keep(index, homes)


def _fill_layer(
    module: str, homes: list[Tensor], weights: PlainWeights, math: ExpertMath, threads: int, fast: bool
) -> None:
    step = max(1, _AT_ONCE_BYTES // homes[0].nbytes)
    for first in range(0, len(homes), step):
        with ExitStack() as targets:
            some = [
                (targets.enter_context(on_host(target)), weights.expert(module, first + number))
                for number, target in enumerate(homes[first : first + step])
            ]
            names = [f"{module}, expert {first + number}" for number in range(len(some))]
            _write_experts(names, some, math.format, math.shape, threads, fast)


def _is_float(fmt: ExpertFormat) -> bool:
    return all(matrix.is_float for matrix in fmt.matrices.values())


def _write_experts(
    names: list[str],
    experts: list[tuple[Tensor, ExpertWeights]],
    fmt: ExpertFormat,
    shape: ExpertShape,
    threads: int,
    fast: bool,
) -> None:
    """Fill experts' bytes, uint8 [expert_bytes] each. Floats that keep their dtype are read where the file has them.

    Raises:
        CheckpointError: a weight cannot be quantized; with the name of its expert and matrix.
    """
    views: list[dict[str, Tensor]] = [{p: one.raw for p, one in each.matrices.items()} for _, each in experts]  # type: ignore[misc]
    if _is_float(fmt):
        dtypes = {part: _DTYPES[matrix.name] for part, matrix in fmt.matrices.items()}
        stored = [{part: (view.to(dtypes[part]), None, None) for part, view in each.items()} for each in views]
        pack_stored_experts(zip((packed for packed, _ in experts), stored, strict=True), fmt, shape, threads=threads)
        views = [{} for _ in experts]
    for name, (packed, weights), left in zip(names, experts, views, strict=True):
        for part, tensor in (left | weights.biases).items():
            with in_tensor(f"{name}, {part}"):
                fmt.pack(packed, shape, {part: tensor}, fast=fast)
