"""Half-quadratic quantization: whole numbers, and for each group the scale and zero that fit its weights.

Badri & Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023). A group's scale spans its
extremes. Its zero is improved in turns with the whole numbers: each time it becomes the mean of the zeros that the
weights want, after the largest errors were shrunk (norm 0.7, beta 10), so that a few weights may be far off. Start,
steps and end are those of the `hqq` package 0.2.8 (`Quantizer.quantize`, axis 1), but for what `solve_in_torch` names.

This is the plain-torch solver. `solve_hqq` takes the one that `use_solver` was given, which `moestro.compute.cpu` calls
with the compiled kernels' solver: this folder does not know those.

    >>> fitted = solve_hqq(torch.linspace(-1, 1, 64).view(2, 32), bits=2, group=16)
    >>> fitted.codes.shape, fitted.scales.shape
    (torch.Size([2, 32]), torch.Size([2, 2]))

Legend: R rows, K columns, G groups of a row, the last one filled up with weights of 0.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import CheckpointError
from ...planning.spelling import spelled

SOLVER_GROUPS = (16, 32, 64, 128)  # columns
SOLVER_BITS = (2, 3, 4, 5, 6, 8)
ITERATIONS = 20  # at most
_SHRINK, _POWER = 0.1, -0.3  # an error e shrinks to |e| - |e|**-0.3 / 10: the norm 0.7 with beta 10
_LEAST_SCALE = 1 / 2e4  # the package takes no finer steps; groups with finer ones keep the zero that they start with
_LEAST_RANGE = 1e-30  # groups of a smaller range hold one weight


class Fitted(NamedTuple):
    """A quantized matrix: weight = (code - zero) * scale.

    codes: uint8 [R, G * group]. scales, zeros: float32 [R, G]. A group of zeros has a scale of 0.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor


class Solver(Protocol):
    """Quantizes a matrix [R, K] of any float dtype on the CPU, as `solve_hqq` does."""

    def __call__(self, matrix: Tensor, /, *, bits: int, group: int, fit: bool) -> Fitted: ...


def use_solver(solver: Solver) -> None:
    """Solve with this from now on, for matrices on the CPU."""
    global _solver
    _solver = solver


def solve_hqq(matrix: Tensor, *, bits: int, group: int, fit: bool = True) -> Fitted:
    """Quantize a matrix.

    Args:
        matrix: [R, K] of any float dtype, on any device.
        bits: 2, 3, 4, 5, 6 or 8. group: columns that share a scale: 16, 32, 64 or 128.
        fit: improve the zeros; without it those of the extremes.

    Raises:
        CheckpointError: a weight is NaN or infinite.
    """
    if bits not in SOLVER_BITS or group not in SOLVER_GROUPS:
        raise ValueError(f"nothing here quantizes to {bits} bits in groups of {group} columns")
    solver = _solver if matrix.device.type == "cpu" else solve_in_torch
    return solver(matrix, bits=bits, group=group, fit=fit)


@torch.no_grad()
def solve_in_torch(matrix: Tensor, *, bits: int, group: int, fit: bool) -> Fitted:
    """As `solve_hqq`, in plain torch and float32 on the matrix's device.

    Iteration ends when the mean error of the whole matrix falls no more, so what becomes of a group depends on the
    others. The package takes no scale below 1 / 20,000, which destroys groups of smaller weights. Here these keep the
    scale and zero of their extremes, groups of equal weights are exact, and the errors of both are not counted.
    """
    rows, columns = matrix.shape
    check_finite(matrix)
    weights = pad(matrix.float(), (0, -columns % group)).reshape(-1, group)
    levels = 2**bits - 1
    scale, inverse, zero, is_still = _start(weights, levels, rounded_zero=bits == 4)
    scaled = weights * inverse  # in steps
    if fit and rows:
        zero = _improve(scaled, levels, scale, inverse, zero, is_still)
    codes = _nearest(scaled, zero, levels).to(torch.uint8)
    sides = (each.view(rows, -(-columns // group)) for each in (scale, zero))
    return Fitted(codes.view(rows, -(-columns // group) * group), *sides)


def check_finite(matrix: Tensor) -> None:
    """Refuse weights that cannot be quantized.

    Raises:
        CheckpointError: one is NaN or infinite.
    """
    if bool((faults := ~matrix.isfinite()).any()):
        row, column = faults.nonzero()[0].tolist()
        raise CheckpointError(
            f"a weight is {float(matrix[row, column])}, in row {row} and column {column} of its matrix, but only "
            f"finite ones can be quantized; download the checkpoint again, or load it with {spelled('bits', 16)}"
        )


def _start(weights: Tensor, levels: int, *, rounded_zero: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of groups [n, group] the scale, its inverse, the first zero, and whether this one stays; [n, 1] each."""
    low, high = weights.amin(1, keepdim=True), weights.amax(1, keepdim=True)
    span = high - low
    inverse = 1 / span * levels  # in this order, which decides ties of the first zero as the package does
    inverse = torch.where(inverse == 0, levels / 2 / (high / 2 - low / 2), inverse)  # the range is no float32
    scale, zero = 1 / inverse, -low * inverse
    is_still = span <= levels * _LEAST_SCALE
    if rounded_zero:
        zero = torch.where(is_still, zero, zero.round())
    is_one, is_zero = span < _LEAST_RANGE, low.abs() < _LEAST_RANGE  # one weight: (0 - zero) * scale
    scale = torch.where(is_one, torch.where(is_zero, 0.0, low.abs()), scale)
    inverse = torch.where(is_one, torch.where(is_zero, 0.0, 1 / low.abs()), inverse)
    zero = torch.where(is_one, torch.where(is_zero, 0.0, -low.sign()), zero)
    return scale, inverse, zero, is_still


def _improve(scaled: Tensor, levels: int, scale: Tensor, inverse: Tensor, zero: Tensor, is_still: Tensor) -> Tensor:
    """The zeros [n, 1] of the last iteration, the one that found no smaller error included."""
    best = torch.tensor(torch.inf, device=scaled.device)
    for _ in range(ITERATIONS):
        own = _nearest(scaled, zero, levels) - scaled  # the zero that each weight alone would want
        error = zero - own
        sums = error.abs().sum(1, keepdim=True).double() * torch.where(is_still, 0.0, scale)
        mean = (sums.sum() / scaled.numel()).float()
        wanted = (own + _shrunk(error, scale, inverse)).mean(1, keepdim=True)
        zero = torch.where(is_still, zero, wanted)
        if not bool(mean < best):
            break
        best = mean
    return zero


def _nearest(scaled: Tensor, zero: Tensor, levels: int) -> Tensor:
    return (scaled + zero).round().clamp(0, levels)


def _shrunk(error: Tensor, scale: Tensor, inverse: Tensor) -> Tensor:
    """What is left of errors in steps [n, group] after shrinking, in steps."""
    size = error.abs()
    taken = _SHRINK * (size * scale).clamp(min=1e-3).pow(_POWER) * inverse
    return (size - taken).clamp(min=0).mul(error.sign())


_solver: Solver = solve_in_torch
