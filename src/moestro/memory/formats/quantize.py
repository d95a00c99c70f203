"""int8 and int4: weights that come as floats, rounded to whole numbers with a scale for each row and group."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import CheckpointError
from .codes import Coded
from .hqq_solver import solve_hqq

_MOST_HALF = 65504.0  # of float16
_LEAST_HALF = 2.0**-14  # below it float16 has whole steps of 2**-24
_MOST_ZERO = 2048.0  # up to it float16 has all whole numbers


def quantize_int8(matrix: Tensor, group: int) -> Coded:
    """[R, K] -> signed bytes: the largest of a group is 127 scales."""
    groups = _groups(matrix, group)
    most = groups.abs().amax(-1, keepdim=True)
    # The smallest of float16 are whole steps of 2**-24: rounded up, so that no weight has to be cut.
    scale = torch.where(most < 127 * 2**-14, (most / 127 * 2**24).ceil() / 2**24, most / 127).half()
    whole = (groups / scale.float()).nan_to_num(0.0, 0.0, 0.0).round().clamp(-127, 127).to(torch.int8)
    return Coded(whole.view(torch.uint8).flatten(1)[:, : matrix.shape[1]], scale.squeeze(-1))


def quantize_int4(matrix: Tensor, group: int, *, fit: bool = True) -> Coded:
    """[R, K] -> whole numbers in [0, 16), a scale and a zero for each group, found by half-quadratic quantization.

    Raises:
        CheckpointError: a weight is NaN or infinite, or a group spans more than a float16 scale covers.
    """
    codes, scales, zeros = solve_hqq(matrix, bits=4, group=group, fit=fit)
    # Whose scale or zero float16 would change too much.
    is_odd = (scales < _LEAST_HALF) | (scales > _MOST_HALF) | (zeros.abs() > _MOST_ZERO)
    if bool(is_odd.any()):
        own = _groups(matrix, group)[is_odd]  # [n, group]
        of_odd = _in_half(own, levels=15)
        codes.view(*scales.shape, group)[is_odd], scales[is_odd], zeros[is_odd] = of_odd
    return Coded(codes[:, : matrix.shape[1]], scales.half(), zeros.half())


def _in_half(groups: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 of groups [n, group], with scales and whole zeros [n] that float16 holds.

    Raises:
        CheckpointError: a group spans more than the largest scale covers.
    """
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    most = groups.abs().amax(1, keepdim=True)
    wanted = torch.maximum(high / levels - low / levels, most / (_MOST_ZERO - 1))
    widest = wanted.argmax()
    if wanted[widest] > _MOST_HALF:
        raise CheckpointError(
            f"weights of a group lie between {float(low[widest]):.3g} and {float(high[widest]):.3g}, but {levels + 1} "
            f"numbers with a float16 scale cover {levels * _MOST_HALF:,.0f}; load the checkpoint with --bits 16"
        )
    scale = torch.where(wanted < _LEAST_HALF, (wanted * 2**24).ceil() / 2**24, wanted).half().float()
    safe = scale.clamp(min=2**-24)
    zero = (-low / safe).round().clamp(-_MOST_ZERO, _MOST_ZERO)
    codes = (groups / safe + zero).round().clamp(0, levels).to(torch.uint8)
    return codes, scale.squeeze(1), zero.squeeze(1)


def _groups(matrix: Tensor, group: int) -> Tensor:
    """[R, K] -> float32 [R, G, group], filled up with zeros."""
    groups: Tensor = pad(matrix.float(), (0, -matrix.shape[1] % group)).unflatten(1, (-1, group))
    return groups
