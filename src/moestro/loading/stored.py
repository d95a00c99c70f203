"""Load a checkpoint that is quantized already: its experts keep their bits, repacked straight from the file's bytes.

Transformers builds the model and computes everything but the experts; nothing goes through a dequantized layer. Linear
layers outside the experts, the head and the embedding keep their form too; what our kernels do not compute, and all of
them with --no-pack-dense, is dequantized to the model's dtype, matrix by matrix.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from ..compute.repack import format_of, pack_stored, pack_stored_matrix
from ..decode.dense import DenseFormats, StoredWeight, packable
from ..devices import make_device
from ..engine.conductor import Conductor
from ..engine.families import FamilyLayout, expert_modules
from ..errors import CheckpointError, ModelError, first_line
from ..memory.formats import FLOAT_FORMATS, ORDERS, ExpertFormat, MatrixFormat, expert_format_named
from ..memory.formats.raw import RawMatrix
from ..memory.store import on_host
from ..planning.options import METHOD
from ..planning.spelling import spelled
from ..progress import counted
from .build import StoredFormats, attach, dense_formats, home, pack_rest
from .checkpoint import refuse_code, refuse_groups
from .config import MoestroConfig
from .sources import ExpertWeights, Part, Source, Weights, floats_of
from .timing import spent

logger = logging.getLogger("moestro")


def load_stored(
    name: str, source: Source, hf_config: Any, auto: Any, config: MoestroConfig, dtype: Any, trust_remote_code: bool
) -> Any:
    """A model whose experts are kept as its checkpoint has them.

    Args:
        name: of the model, for messages. hf_config: the source's. auto: the auto class that makes it.
        dtype: of the rest; a torch dtype, or "auto" for the config's.

    Raises:
        MoestroError: one line on what was found, what was needed and what to do.
    """
    if (config.expert_bits or config.bits) is not None:
        raise ModelError(
            f"{name} is quantized already, and its experts keep their own bits; leave {spelled('bits')} and "
            f"{spelled('expert_bits')} out"
        )
    stated = getattr(hf_config.get_text_config(), "dtype", None) or torch.bfloat16
    model = empty_model(name, auto, hf_config, stated if dtype == "auto" else dtype, trust_remote_code)
    model.set_experts_implementation(METHOD)
    weights = source.weights(model)
    device = make_device(config.device, config.link_gbps)
    modules = expert_modules(model)
    counts = {module: FamilyLayout.of(module, modules[module]).experts for module in modules}
    top_k = getattr(hf_config.get_text_config(), "num_experts_per_tok", None)
    refuse_groups(name, hf_config.get_text_config())
    if isinstance(top_k, int) and not 1 <= top_k <= min(counts.values(), default=top_k):
        raise CheckpointError(f"{name}: its config routes each token to {top_k} of {min(counts.values())} experts")
    experts = [_layer_format(weights, module, counts[module]) for module in modules]
    dense = dict(weights.dense())
    is_quantized = any(fmt.is_quantized for of in experts for fmt in of.matrices.values())
    if source.method and not is_quantized and not any(_is_quantized(value) for value in dense.values()):
        raise CheckpointError(
            f"the config.json of {name} says that it is quantized ({source.method}), but none of its tensors is; "
            "take quantization_config out of it"
        )
    stored = StoredFormats(experts, _kept_formats(model, dense, config))
    conductor = attach(model, config, device, stored)
    formats = dense_formats(model, config, device, stored)
    _say_what_keeps_its_bits(name, model, stored, formats, config)
    kept = _kept_weights(model, dense, stored, formats, conductor.cpu.threads)
    _fill_dense(model, dense, device.torch_device)
    with spent("packing"):
        _fill_experts(model, conductor, weights)
    model.initialize_weights()  # buffers that no checkpoint has; experts' parameters are on the meta device
    model.tie_weights()
    for layer in modules.values():
        for part in layer._moestro.layout.parameters:
            del layer._parameters[part]
    pack_rest(model, config, device, stored=stored, weights=kept)
    take_generation_config(model, Path(name))
    return model.requires_grad_(False).eval()


def _say_what_keeps_its_bits(
    name: str, model: Any, stored: StoredFormats, formats: DenseFormats | None, config: MoestroConfig
) -> None:
    """Warn of bits that were asked for where all weights of the kind are quantized already."""
    others = () if formats is None else packable(model, formats)
    has_others = {layer.is_head for layer in others if layer.name not in stored.dense}
    for option, bits, of_head in (("dense_bits", config.dense_bits, False), ("head_bits", config.head_bits, True)):
        if bits is not None and of_head not in has_others:
            given = spelled(option, bits)
            logger.warning("%s changes nothing here: these weights of %s keep their own bits", given, name)


def _is_quantized(value: Tensor | Part) -> bool:
    return isinstance(value, Part) and not isinstance(value.raw, Tensor)


def _kept_formats(model: Any, dense: Mapping[str, Tensor | Part], config: MoestroConfig) -> dict[str, MatrixFormat]:
    """The formats of dense weights that keep their form: quantized ones, and floats unless bits were asked for."""
    heads = {id(layer.weight) for layer in (model.get_output_embeddings(), model.get_input_embeddings()) if layer}
    formats = {}
    for name, parameter in model.named_parameters():
        if (value := dense.get(name)) is None or parameter.dim() != 2:
            continue
        bits = config.head_bits if id(parameter) in heads else config.dense_bits
        raw = value.raw if isinstance(value, Part) else value
        if isinstance(raw, RawMatrix) or (bits is None and raw.dtype in FLOAT_FORMATS):
            formats[name] = format_of(raw)
    return formats


def _kept_weights(
    model: Any,
    dense: dict[str, Tensor | Part],
    stored: StoredFormats,
    formats: DenseFormats | None,
    threads: int,
) -> dict[str, StoredWeight]:
    """Take out of `dense` the weights that are packed from their own bytes."""
    kept = {}
    for layer in () if formats is None else packable(model, formats):
        if layer.name in stored.dense:
            value = dense.pop(layer.name)
            part = Part(value) if isinstance(value, Tensor) else value
            layer.weight._is_hf_initialized = True  # type: ignore[attr-defined]
            write = functools.partial(
                pack_stored_matrix, raw=part.raw, rows=part.rows, columns=part.columns, threads=threads
            )
            kept[layer.name] = StoredWeight(write, part.columns)
    return kept


def empty_model(name: str, auto: Any, config: Any, dtype: Any, trust_remote_code: bool) -> Any:
    """The model of a config on the meta device.

    Raises:
        ModelError: it needs code that is not trusted. CheckpointError: the config describes no model.
    """
    try:
        with torch.device("meta"):
            return auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config may hold anything
        refuse_code(name, error)
        raise CheckpointError(
            f"Transformers makes no model from the config of {name} ({type(error).__name__}: {first_line(error)})"
        ) from error


def _layer_format(weights: Weights, module: str, experts: int) -> ExpertFormat:
    """The format that holds each of a layer's experts, of which some may have one order of columns and some two."""
    first = _format_of(weights.expert(module, 0))
    if not first.orders:
        return first
    found = (_format_of(weights.expert(module, expert)) for expert in range(1, experts))
    return max((first, *found), key=lambda fmt: fmt.orders)


def _format_of(expert: ExpertWeights) -> ExpertFormat:
    """The format that an expert is stored in, with room for the orders of gate's and up's columns (act-order).

    One object for equal ones.
    """
    names = {part: format_of(one.raw).name for part, one in expert.matrices.items()}
    orders = [expert.matrices[part].columns for part in ("gate", "up") if part in expert.matrices]
    kept = [order for order in orders if order is not None]
    is_one = len(kept) == len(orders) and all(torch.equal(order, kept[0]) for order in kept)
    ending = ORDERS[0 if not kept else 1 if is_one else 2]
    return expert_format_named("+".join((names.get("gate", names["up"]), names["up"], names["down"])) + ending)


def _fill_experts(model: Any, conductor: Conductor, weights: Weights) -> None:
    for index, module in enumerate(counted(expert_modules(model), "packing experts", "layers")):
        math = conductor.math[index]
        for expert in range(conductor.spec.layers[index].experts):
            stored = weights.expert(module, expert)
            found = _format_of(stored)
            if found.matrices != math.format.matrices or found.orders > math.format.orders:
                raise ModelError(
                    f"{module} has experts in several formats: {math.format.name}, and {found.name} in expert {expert}"
                )
            parts = {part: (one.raw, one.rows, one.columns) for part, one in stored.matrices.items()}
            with on_host(home(conductor, index, expert)) as packed:
                pack_stored(packed, math.format, math.shape, parts, threads=conductor.cpu.threads)
                math.format.pack(packed, math.shape, stored.biases)


def _fill_dense(model: Any, dense: dict[str, Tensor | Part], device: torch.device) -> None:
    """Give the model's parameters their values, taken out of `dense` one by one, and its buffers memory."""
    while dense:
        name, value = dense.popitem()
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._buffers:
            buffer = module._buffers[leaf] = floats_of(value).to(device, module._buffers[leaf].dtype)
            buffer._is_hf_initialized = True  # type: ignore[attr-defined]
            continue
        parameter = nn.Parameter(floats_of(value).to(device, module._parameters[leaf].dtype), requires_grad=False)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        module._parameters[leaf] = parameter
    give_buffers_memory(model, device)


def give_buffers_memory(model: Any, device: torch.device) -> None:
    """Give a model's buffers that are on the meta device memory that is not filled yet."""
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[leaf] = torch.empty_like(buffer, device=device)


def take_generation_config(model: Any, folder: Path) -> None:
    """Read a folder's generation_config.json, or what its config.json says of generation, as `from_pretrained` does."""
    if not model.can_generate():
        return
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    elif (folder / "config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True
        )
