"""Names of tensors in safetensors files: which matrix each belongs to, and which of its tensors it is.

>>> split_name("model.layers.0.mlp.down_proj.weight_scale_inv")
('model.layers.0.mlp.down_proj', 'weight_scale_inv')
"""

from __future__ import annotations

import re

from ..errors import ModelError

# Endings of a matrix's tensors: those that hold its weights, those beside them, and those that nothing here needs.
WEIGHTS = ("weight", "weight_packed", "blocks", "packed", "qweight", "W_q")
_BESIDE = (
    *("weight_scale_inv", "weight_scale_2", "weight_scale", "weight_global_scale", "weight_zero_point", "weight_shape"),
    *("weight_g_idx", "scale_inv", "scale", "qscale_weight", "scales", "global_scale", "scale_2", "qzeros", "g_idx"),
)
_UNUSED = ("input_scale", "input_global_scale", "activation_scale", "k_scale", "v_scale", "weight_zp", "perm")
_ENDINGS = tuple(sorted((*WEIGHTS, *_BESIDE, *_UNUSED), key=len, reverse=True))
_FOREIGN = {  # endings of methods that are refused, where the config does not name them
    "quant_map": "bitsandbytes",
    "absmax": "bitsandbytes",
    "SCB": "bitsandbytes",
    "codebooks": "AQLM",
    "centroids": "VPTQ",
    "Qidxs": "QuIP#",
    "trellis": "EXL3",
    "q_weight": "EXL2",
}
_HQQ = re.compile(r"(.+)\.(W_q|meta\.(?:scale_q|zero_q|scale|zero|meta_(?:scale|zero)\.(?:scale|zero)))")


def split_name(name: str) -> tuple[str, str]:
    """A tensor's name as the matrix that it may belong to, and which of its tensors it is ("weight" by default).

    Raises:
        ModelError: it belongs to a method that is refused.
    """
    if (of_hqq := split_hqq(name)) is not None:
        return of_hqq
    last = name.rpartition(".")[2]
    if last in _FOREIGN:
        raise ModelError(f"{name} is of {_FOREIGN[last]}, which Moestro does not read; use another checkpoint")
    for ending in _ENDINGS:
        if last == ending:
            return name[: -len(ending) - 1], ending
    for ending in _ENDINGS:  # of stacked experts: gate_up_proj_blocks, w13_weight_scale
        if last.endswith((f"proj_{ending}", f"_weight_{ending}")):
            return name[: -len(ending) - 1], ending
    return name, "weight"


def split_hqq(name: str) -> tuple[str, str] | None:
    """A tensor's name as the matrix that it belongs to, and which of its tensors it is; None for other names."""
    found = _HQQ.fullmatch(name)
    return None if found is None else (found[1], found[2])
