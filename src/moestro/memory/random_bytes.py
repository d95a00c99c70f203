"""Random weights of a number format, drawn as bytes: its scales are all alike, and any bits will do for codes.

    >>> from moestro.memory.formats import format_named
    >>> random_panels(format_named("q4_k"), 16, 256, 0.01).shape
    torch.Size([2304])

To measure speed with: weights that are neither infinite nor so small that a CPU multiplies them slowly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from math import log2

import torch
from torch import Tensor

from ..planning.descriptor import ROW, SUPER, Code, Scale, Zero
from .formats import PANEL, Coded, ExpertFormat, ExpertShape, MatrixFormat, Strided
from .formats.strided import write_matrix

_E4M3_BITS = 0xBF  # without the highest bit of the exponent: below 2, and no NaN
_LEVELS = {Scale.K4: 32, Scale.K2: 8, Scale.K6: 64, Scale.K3: 48, Scale.IQ4XS: 16}  # of a group's scale, half-way
_LARGEST = {Code.S8: 127.0, Code.E2M1: 6.0, Code.IQ4NL: 127.0, Code.E4M3: 1.875}


def random_panels(fmt: MatrixFormat, rows: int, columns: int, bound: float) -> Tensor:
    """A random matrix: uint8 [matrix_bytes], weights up to some `bound` in size."""
    if fmt.is_float:
        return fmt.pack(torch.empty(rows, columns).uniform_(-bound, bound)).flatten()
    if fmt.is_strided:
        return _between(*(write_matrix(fmt, _strided(fmt, rows, columns, bound, ones)) for ones in (False, True)))
    low, high = (fmt.write(_coded(fmt, PANEL, columns, bound, ones)).flatten() for ones in (False, True))
    panels = -(-rows // PANEL)
    return _between(low.repeat(panels), high.repeat(panels))


def random_experts(fmt: ExpertFormat, shape: ExpertShape, bound: float) -> Callable[[], Tensor]:
    """What makes one random expert after another: uint8 [expert_bytes], weights up to some `bound` in size."""
    sizes = {"gate": (shape.neurons, shape.hidden), "down": (shape.hidden, shape.neurons)}
    sizes["up"] = sizes["gate"] if shape.has_gate else sizes.pop("gate")
    ends = []
    for ones in (False, True):
        packed = torch.zeros(fmt.expert_bytes(shape), dtype=torch.uint8)
        make = _strided if fmt.is_strided else _coded
        fmt.pack_coded(
            packed, shape, {name: make(fmt.matrices[name], *size, bound, ones) for name, size in sizes.items()}
        )
        ends.append(packed)
    return functools.partial(_between, *ends)


def _between(low: Tensor, high: Tensor) -> Tensor:
    """Random bytes where two differ, bit by bit."""
    return low | torch.randint(256, low.shape, dtype=torch.uint8) & (low ^ high)


def _coded(fmt: MatrixFormat, rows: int, columns: int, bound: float, ones: bool) -> Coded:
    """A matrix of the least or the largest codes, with scales that make weights of up to `bound`."""
    largest = _LARGEST.get(fmt.code, 2**fmt.code_bits / 2)
    scale = bound / largest
    bits = _E4M3_BITS if fmt.code is Code.E4M3 else 2**fmt.code_bits - 1
    codes = torch.full((rows, columns), bits if ones else 0, dtype=torch.uint8)
    groups = 1 if fmt.group == ROW else -(-columns // fmt.group)
    sides = _scales(fmt, rows, groups, -(-columns // SUPER), scale)
    if fmt.zero in (Zero.FP16, Zero.ADD):
        value = -bound if fmt.zero is Zero.ADD else largest
        sides["zeros"] = torch.full((rows, groups), value, dtype=torch.float16)
    elif fmt.zero is Zero.INT:
        sides["zeros"] = torch.full((rows, groups), int(largest), dtype=torch.uint8)
    return Coded(codes, **sides)


def _strided(fmt: MatrixFormat, rows: int, columns: int, bound: float, ones: bool) -> Strided:
    """As `_coded`, of groups of rows."""
    largest = 2**fmt.code_bits / 2
    codes = torch.full((rows, columns), 2**fmt.code_bits - 1 if ones else 0, dtype=torch.uint8)
    sides = torch.full((rows // fmt.group, columns), 128, dtype=torch.uint8)
    of_scales = torch.tensor([bound / largest / 128, 0.0]).half()
    table = of_scales[None, :, None].expand(fmt.table_rows(rows), 2, columns)
    return Strided(codes, sides, sides, table, torch.tensor([largest / 128, 0.0]))


def _scales(fmt: MatrixFormat, rows: int, groups: int, supers: int, scale: float) -> dict[str, Tensor]:
    size = (rows, groups)
    if fmt.scale is Scale.SHIFTED:
        sides = {"scales": torch.full(size, 192, dtype=torch.uint8), "zeros": torch.full(size, 128, dtype=torch.uint8)}
        return sides | {"d": torch.full((rows, 1), round(log2(scale / 192)) + 127, dtype=torch.uint8)}
    if fmt.is_two_level:
        level = _LEVELS[fmt.scale]
        factor = level - 32 if fmt.scale is Scale.K3 else level
        sides = {"scales": torch.full(size, level, dtype=torch.uint8)}
        sides["d"] = torch.full((rows, supers), scale / factor, dtype=torch.float16)
        if fmt.zero is Zero.MIN:
            sides["zeros"] = torch.full(size, level, dtype=torch.uint8)
            sides["dmin"] = sides["d"] * 2 ** (fmt.code_bits - 1)
        return sides
    if fmt.scale is Scale.E8M0:
        return {"scales": torch.full(size, round(log2(scale)) + 127, dtype=torch.uint8)}
    if fmt.scale is Scale.E4M3:
        return {"scales": torch.full(size, 0x38, dtype=torch.uint8), "tensor": torch.tensor(scale)}
    dtype = {Scale.FP16: torch.float16, Scale.BF16: torch.bfloat16}.get(fmt.scale, torch.float32)
    return {"scales": torch.full(size, scale, dtype=dtype)}
