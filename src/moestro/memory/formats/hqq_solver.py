"""Half-quadratic quantization by the `hqq` package's own solver: scales and zeros that fit the weights best.

Badri & Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023). About half a million
weights a second and core.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST_SCALE = 1 / 2e4  # of a group; the package takes no finer steps


def solve_hqq(groups: Tensor, *, bits: int, fit: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize groups of weights, float32 [..., group].

    Args:
        fit: iterate; without it the scale and zero of the extremes.

    Returns:
        whole numbers in [0, 2**bits) as float32 [..., group], and scale and zero as float16 [..., 1]:
        weight = (whole - zero) * scale.
    """
    from hqq.core.quantize import Quantizer  # here, because importing it takes a second

    flat = groups.reshape(-1, groups.shape[-1])
    # inference_mode inside the package would give tensors that cannot be changed outside of it.
    whole, meta = Quantizer.quantize(
        flat,
        nbits=bits,
        group_size=flat.shape[1],
        axis=1,
        round_zero=bits == 4,
        optimize=fit,
        bitpack=False,
        device=str(flat.device),
    )
    scale, zero = meta["scale"].float(), meta["zero"].float()
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    narrow = high - low <= (2**bits - 1) * _LEAST_SCALE
    if bool(narrow.any()):
        own_scale = ((high - low) / (2**bits - 1)).half().float()
        # A group of equal weights: q = 0, and zero * scale is the weight.
        own_scale = torch.where(own_scale > 0, own_scale, low.abs().half().float())
        safe = own_scale.clamp(min=2**-24)
        own_zero = (-low / safe).clamp(-(2.0**15), 2.0**15).half().float()
        scale, zero = torch.where(narrow, own_scale, scale), torch.where(narrow, own_zero, zero)
        own_whole = (flat / safe + own_zero).round().clamp(0, 2**bits - 1)
        whole = torch.where(narrow, own_whole, whole.float())
    shape = (*groups.shape[:-1], 1)
    return whole.float().view_as(groups).clone(), scale.half().view(shape), zero.half().view(shape)
