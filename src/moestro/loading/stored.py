"""Load a checkpoint that is quantized already: its experts keep their bits, repacked straight from the file's bytes.

Transformers builds the model and computes everything but the experts; nothing goes through a dequantized layer. What is
quantized outside the experts is dequantized to the model's dtype, matrix by matrix, and packed as other dense layers.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.utils.logging import tqdm

from ..compute.repack import format_of, pack_stored
from ..devices import make_device
from ..engine.conductor import Conductor
from ..engine.families import FamilyLayout, expert_modules
from ..errors import CheckpointError, ModelError, first_line
from ..memory.formats import ORDERS, ExpertFormat, expert_format_named
from ..memory.formats.codes import values
from ..memory.formats.raw import read_raw
from ..planning.options import METHOD
from .build import attach, home, pack_rest
from .checkpoint import refuse_code, refuse_groups
from .config import MoestroConfig
from .sources import ExpertWeights, Part, Source, Weights

logger = logging.getLogger("moestro")


def load_stored(
    name: str, source: Source, auto: Any, config: MoestroConfig, dtype: Any, trust_remote_code: bool
) -> Any:
    """A model whose experts are kept as its checkpoint has them.

    Args:
        name: of the model, for messages. auto: the auto class that makes it.
        dtype: of the rest; a torch dtype, or "auto" for the config's.

    Raises:
        MoestroError: one line on what was found, what was needed and what to do.
    """
    if (config.expert_bits or config.bits) is not None:
        raise ModelError(
            f"{name} is quantized already, and its experts keep their own bits; leave --bits and --expert-bits out"
        )
    hf_config = source.config()
    stated = getattr(hf_config.get_text_config(), "dtype", None) or torch.bfloat16
    model = _empty_model(name, auto, hf_config, stated if dtype == "auto" else dtype, trust_remote_code)
    model.set_experts_implementation(METHOD)
    weights = source.weights(model)
    device = make_device(config.device, config.link_gbps)
    modules = expert_modules(model)
    experts = {module: FamilyLayout.of(module, modules[module]).experts for module in modules}
    top_k = getattr(hf_config.get_text_config(), "num_experts_per_tok", None)
    refuse_groups(name, hf_config.get_text_config())
    if isinstance(top_k, int) and not 1 <= top_k <= min(experts.values(), default=top_k):
        raise CheckpointError(f"{name}: its config routes each token to {top_k} of {min(experts.values())} experts")
    formats = [_layer_format(weights, module, experts[module]) for module in modules]
    conductor = attach(model, config, device, formats)
    is_quantized = _fill_dense(model, weights, device.torch_device)
    if source.method and not is_quantized and not any(m.is_quantized for f in formats for m in f.matrices.values()):
        raise CheckpointError(
            f"the config.json of {name} says that it is quantized ({source.method}), but none of its tensors is; "
            "take quantization_config out of it"
        )
    _fill_experts(model, conductor, weights)
    for layer in modules.values():
        for part in layer._moestro.layout.parameters:
            del layer._parameters[part]
    model.initialize_weights()
    model.tie_weights()
    pack_rest(model, config, device)
    _take_generation_config(model, Path(name))
    return model.requires_grad_(False).eval()


def _empty_model(name: str, auto: Any, config: Any, dtype: Any, trust_remote_code: bool) -> Any:
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
    for index, module in enumerate(tqdm(expert_modules(model), desc="Packing experts", unit="layer")):
        math = conductor.math[index]
        for expert in range(conductor.spec.layers[index].experts):
            stored = weights.expert(module, expert)
            found = _format_of(stored)
            if found.matrices != math.format.matrices or found.orders > math.format.orders:
                raise ModelError(
                    f"{module} has experts in several formats: {math.format.name}, and {found.name} in expert {expert}"
                )
            parts = {part: (one.raw, one.rows, one.columns) for part, one in stored.matrices.items()}
            target = home(conductor, index, expert)
            packed = target if target.device.type == "cpu" else torch.empty_like(target, device="cpu")
            pack_stored(packed, math.format, math.shape, parts, threads=conductor.cpu.threads)
            math.format.pack(packed, math.shape, stored.biases)
            if packed is not target:
                target.copy_(packed)


def _fill_dense(model: Any, weights: Weights, device: torch.device) -> bool:
    """Give the model's parameters their values, and its buffers memory; returns whether any value was quantized."""
    is_quantized = False
    for name, value in weights.dense():
        is_quantized |= isinstance(value, Part) and not isinstance(value.raw, Tensor)
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._buffers:
            buffer = module._buffers[leaf] = _plain(value).to(device, module._buffers[leaf].dtype)
            buffer._is_hf_initialized = True  # type: ignore[attr-defined]
            continue
        parameter = nn.Parameter(_plain(value).to(device, module._parameters[leaf].dtype), requires_grad=False)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        module._parameters[leaf] = parameter
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[leaf] = torch.empty_like(buffer, device=device)
    return is_quantized


def _plain(value: Tensor | Part) -> Tensor:
    """The weights of a dense layer as floats; a copy, so that the file may go."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value.raw, Tensor):
        return value.raw.clone()
    coded = read_raw(value.raw, value.rows, value.columns)
    dense = values(value.raw.fmt, coded)
    if value.columns is None:
        return dense
    back = torch.empty_like(dense)
    back[:, value.columns] = dense
    return back


def _take_generation_config(model: Any, folder: Path) -> None:
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
