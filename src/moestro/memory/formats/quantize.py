"""Weights that come as floats, rounded to whole numbers with a scale (and a zero) for each row and group.

int8 has the largest of a group at 127. Fewer bits are fitted by half-quadratic quantization (`hqq_solver.py`), of which
hqq4, hqq3 and hqq2 also keep scales and zeros in bytes, as Eliseev & Mazur do (arXiv 2312.17238, 4.2: quantized scales
and zeros). Theirs are relative to a super-group's range; ours to a power of two for each row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import CheckpointError
from ...planning.descriptor import Descriptor
from ...planning.spelling import spelled
from .codes import Coded, pack_codes
from .hqq_solver import Fitted, check_finite, solve_hqq

_MOST_BYTE = 255
_MOST_HALF = 65504.0  # of float16
_LEAST_HALF = 2.0**-14  # below it float16 has whole steps of 2**-24
_MOST_ZERO = 2048.0  # up to it float16 has all whole numbers


def quantize_int8(matrix: Tensor, group: int) -> Coded:
    """[R, K] -> signed bytes: the largest of a group is 127 scales.

    Raises:
        CheckpointError: a weight is NaN or infinite, or larger than a float16 scale covers.
    """
    check_finite(matrix)
    groups = _groups(matrix, group)
    most = groups.abs().amax(-1, keepdim=True)
    # The smallest of float16 are whole steps of 2**-24: rounded up, so that no weight has to be cut.
    scale = torch.where(most < 127 * 2**-14, (most / 127 * 2**24).ceil() / 2**24, most / 127).half()
    if bool(scale.isinf().any()):
        raise CheckpointError(
            f"a weight has a size of {float(most.max()):.3g}, but signed bytes with a float16 scale reach "
            f"{127 * _MOST_HALF:,.0f}; load the checkpoint with {spelled('bits', 16)}"
        )
    whole = (groups / scale.float()).nan_to_num(0.0, 0.0, 0.0).round().clamp(-127, 127).to(torch.int8)
    return Coded(whole.view(torch.uint8).flatten(1)[:, : matrix.shape[1]], scale.squeeze(-1))


def pack_int8(blocks: Tensor, fmt: Descriptor, out: Tensor) -> None:
    """Write the panels of `quantize_int8` of blocks [N, R, K] of any strides to `out`, as `write_int8_in_torch`."""
    on_host = {blocks.device.type, out.device.type} == {"cpu"}
    (_byte_writer if on_host else write_int8_in_torch)(blocks, fmt, out)


def write_int8_in_torch(blocks: Tensor, fmt: Descriptor, out: Tensor, /) -> None:
    """Write the panels of matrices [N, R, K] in signed bytes to a view uint8 [N, bytes of a matrix]."""
    for block, to in zip(blocks, out, strict=True):
        to.copy_(pack_codes(fmt, quantize_int8(block, fmt.group)).flatten())


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
            f"numbers with a float16 scale cover {levels * _MOST_HALF:,.0f}; load the checkpoint with "
            f"{spelled('bits', 16)}"
        )
    scale = torch.where(wanted < _LEAST_HALF, (wanted * 2**24).ceil() / 2**24, wanted).half().float()
    safe = scale.clamp(min=2**-24)
    zero = (-low / safe).round().clamp(-_MOST_ZERO, _MOST_ZERO)
    codes = (groups / safe + zero).round().clamp(0, levels).to(torch.uint8)
    return codes, scale.squeeze(1), zero.squeeze(1)


def quantize_hqq(matrix: Tensor, fmt: Descriptor, *, fit: bool = True) -> Coded:
    """[R, K] -> whole numbers, a scale and a zero of a byte for each group, and a power of two for each row.

    The solver's scales and zeros are rounded to what bytes hold, then weights to the whole numbers that fit these best.
    """
    return _in_bytes(matrix, fmt, solve_hqq(matrix, bits=fmt.code_bits, group=fmt.group, fit=fit))


def pack_hqq(matrix: Tensor, fmt: Descriptor, out: Tensor, *, fit: bool = True) -> None:
    """Write the panels of `quantize_hqq` to `out`, as `write_in_torch`."""
    matrix = matrix.contiguous()  # once, for solver and writer
    fitted = solve_hqq(matrix, bits=fmt.code_bits, group=fmt.group, fit=fit)
    on_host = {matrix.device.type, out.device.type} == {"cpu"}
    (_writer if on_host else write_in_torch)(matrix, fmt, fitted, out)


def write_in_torch(matrix: Tensor, fmt: Descriptor, fitted: Fitted, out: Tensor, /) -> None:
    """Write a matrix [R, K] with what the solver found for it to a view uint8 [N, bytes], some panels in each row."""
    out.copy_(pack_codes(fmt, _in_bytes(matrix, fmt, fitted)).view(len(out), -1))


Writer: TypeAlias = Callable[[Tensor, Descriptor, Fitted, Tensor], None]
ByteWriter: TypeAlias = Callable[[Tensor, Descriptor, Tensor], None]
_writer: Writer = write_in_torch
_byte_writer: ByteWriter = write_int8_in_torch


def use_writers(writer: Writer, byte_writer: ByteWriter) -> None:
    """Write panels with these from now on, for matrices on the CPU: of what the solver found, and of signed bytes."""
    global _writer, _byte_writer
    _writer, _byte_writer = writer, byte_writer


def _in_bytes(matrix: Tensor, fmt: Descriptor, fitted: Fitted) -> Coded:
    bits, most = fmt.code_bits, 2**fmt.code_bits - 1
    groups, scale, zero = _groups(matrix, fmt.group), fitted.scales[..., None], fitted.zeros[..., None]
    # A byte has zeros between the least and the largest code. Groups that want another, and those of equal weights, of
    # which the solver makes one large step, get a range that reaches from 0 to their weights.
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    from_zero = (zero < -0.5) | (zero > most + 0.5) | (low == high)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = torch.where(from_zero, (high - low) / most, scale)
    zero = torch.where(from_zero, -low / scale, zero).nan_to_num(0.0)

    largest = scale.squeeze(-1).amax(-1, keepdim=True)  # of each row
    of_byte = largest / _MOST_BYTE  # 0, which has no exponent, of the smallest subnormals
    exponent = torch.where(of_byte > 0, torch.frexp(of_byte).exponent.clamp(-127, 127), -127)
    power = torch.ldexp(torch.ones_like(largest), exponent)[..., None]
    whole_scale = (scale / power).round().clamp(0, _MOST_BYTE)
    whole_scale = torch.where((scale > 0) & (whole_scale == 0), 1, whole_scale)
    whole_zero = ((zero + 0.5) * 2 ** (8 - bits)).round().clamp(0, _MOST_BYTE)

    scale, zero = power * whole_scale, whole_zero * 2 ** (bits - 8) - 0.5
    codes = (groups / scale + zero).nan_to_num(0.0, 0.0, 0.0).round().clamp(0, most)
    scales, zeros = (each.squeeze(-1).to(torch.uint8) for each in (whole_scale, whole_zero))
    exponent = torch.where(largest > 0, exponent + 127, 0)
    of_columns = codes.to(torch.uint8).flatten(1)[:, : matrix.shape[1]]
    return Coded(of_columns, scales, zeros, d=exponent.to(torch.uint8))


def _groups(matrix: Tensor, group: int) -> Tensor:
    """[R, K] -> float32 [R, G, group], filled up with zeros."""
    groups: Tensor = pad(matrix.float(), (0, -matrix.shape[1] % group)).unflatten(1, (-1, group))
    return groups
