"""Random weights in the forms that checkpoints come in, to measure the speed of models of real shapes with them.

Which format each matrix has there; memory/random_bytes.py draws the bytes.
"""

from __future__ import annotations

from typing import Any

import torch

from ..engine.families import FamilyLayout, expert_modules
from ..errors import RequestError
from ..memory.formats import expert_format_named, format_asked_for, format_named
from .build import StoredFormats

# What llama.cpp's quantizer writes under these names, and FP8 as DeepSeek and Qwen publish it.
MIXES = ("q4_k_m", "mxfp4", "q8_0", "fp8")


def stored_formats(model: Any, name: str) -> StoredFormats:
    """The formats of a model whose checkpoint is in one form; the embedding and routers stay floats.

    Args:
        model: on the meta device. name: one of MIXES, or a format for all matrices.

    Raises:
        RequestError: there is no such form.
    """
    linears = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    head = next((name for name in linears if model.get_submodule(name) is model.get_output_embeddings()), None)
    layers = len(expert_modules(model))
    if name == "q4_k_m":
        many = [has_more_bits(layer, layers) for layer in range(layers)]
        experts = [expert_format_named("q4_k+q4_k+q6_k" if more else "q4_k") for more in many]
        dense = {one: format_named("q6_k" if _is_six_bit(one, many) or one == head else "q4_k") for one in linears}
    else:
        experts = [format_asked_for(name)] * layers
        kind = experts[0].matrices["down"]
        beside = format_named("q8_0") if name == "mxfp4" else kind
        dense = {one: beside for one in linears if not (name == "fp8" and one == head)}
        whole = [fmt.divides(model.get_submodule(one).out_features) for one, fmt in dense.items()]
        shapes = [FamilyLayout.of(one, module).shape for one, module in expert_modules(model).items()]
        if not all((*whole, *(experts[0].divides(shape) for shape in shapes))):
            raise RequestError(
                f"{name} has groups of {kind.group} rows, which do not divide all matrices of this shape"
            )
    return StoredFormats(experts, {f"{one}.weight": fmt for one, fmt in dense.items()})


def has_more_bits(layer: int, layers: int) -> bool:
    """Whether llama.cpp's Q4_K_M takes 6 bits for a layer's down and value matrices (`use_more_bits`)."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _is_six_bit(name: str, many: list[bool]) -> bool:
    """Whether a linear layer is a value or down matrix of a layer with more bits."""
    parts = name.split(".")
    layer = next((int(part) for part in parts if part.isdigit()), None)
    return layer is not None and layer < len(many) and many[layer] and parts[-1] in ("v_proj", "down_proj")
