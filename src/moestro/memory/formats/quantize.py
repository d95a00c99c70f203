"""int8 and int4: weights that come as floats, rounded to whole numbers with a scale for each row and group."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .codes import Coded
from .hqq_solver import solve_hqq


def quantize_int8(matrix: Tensor, group: int) -> Coded:
    """[R, K] -> signed bytes: the largest of a group is 127 scales."""
    groups = _groups(matrix, group)
    most = groups.abs().amax(-1, keepdim=True)
    # The smallest of float16 are whole steps of 2**-24: rounded up, so that no weight has to be cut.
    scale = torch.where(most < 127 * 2**-14, (most / 127 * 2**24).ceil() / 2**24, most / 127).half()
    whole = (groups / scale.float()).nan_to_num(0.0, 0.0, 0.0).round().clamp(-127, 127).to(torch.int8)
    return Coded(whole.view(torch.uint8).flatten(1)[:, : matrix.shape[1]], scale.squeeze(-1))


def quantize_int4(matrix: Tensor, group: int, *, fit: bool = True) -> Coded:
    """[R, K] -> whole numbers in [0, 16), a scale and a zero for each group, found by half-quadratic quantization."""
    whole, scale, zero = solve_hqq(_groups(matrix, group), bits=4, fit=fit)
    codes = whole.to(torch.uint8).flatten(1)[:, : matrix.shape[1]]
    return Coded(codes, scale.squeeze(-1), zero.squeeze(-1))


def _groups(matrix: Tensor, group: int) -> Tensor:
    """[R, K] -> float32 [R, G, group], filled up with zeros."""
    groups: Tensor = pad(matrix.float(), (0, -matrix.shape[1] % group)).unflatten(1, (-1, group))
    return groups
