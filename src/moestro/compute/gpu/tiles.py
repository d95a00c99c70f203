"""Tiles of packed weights, times tiles of numbers, in Triton: what the kernels are made of.

Weights are rounded no further: codes are exact in the dtype of the product (`weights.py`), and a piece's scale and zero
are applied to its float32 sum. The join of gate and up enters the second half as the sum of two bfloat16 for bf16
weights (16 bits), as one float16 with a power of two for each piece for others (11 bits), else in float32.

Legend: M rows on the left, pairs of a token and an expert or tokens; N rows of a packed matrix; chunks, pieces and
planes as in `weights.py`. `m` is a `PanelSpec`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .weights import load_codes, load_scale, plane_of

SUMS = tl.constexpr(4)  # of a chunk that have room, as many as it has pieces at most


@triton.jit
def load_planes(at, fits, piece: tl.constexpr, m: tl.constexpr):
    """A piece of a chunk of numbers that `order` or `gate_up` wrote: four planes, of which `m.planes` count.

    at: pointers to the chunk's first, [M].
    """
    width: tl.constexpr = m.piece // m.planes
    k = piece * m.piece + tl.arange(0, width)[None, :]
    mask = fits[:, None]
    first = tl.load(at[:, None] + k, mask=mask, other=0)
    second, third, fourth = first, first, first  # where there is but one plane
    if m.planes > 1:
        second = tl.load(at[:, None] + (width + k), mask=mask, other=0)
    if m.planes > 2:
        third = tl.load(at[:, None] + (2 * width + k), mask=mask, other=0)
        fourth = tl.load(at[:, None] + (3 * width + k), mask=mask, other=0)
    return first, second, third, fourth


@triton.jit
def load_sums(at, fits, piece: tl.constexpr, has_addend: tl.constexpr):
    """float32 [M], over a piece's columns, which `order` wrote; zeros where the format asks for none.

    at: pointers to a chunk's first sum, [M].
    """
    sums = tl.zeros(at.shape, tl.float32)
    if has_addend:
        sums = tl.load(at + piece, mask=fits, other=0)
    return sums


@triton.jit
def _products(total, planes, low, high, m: tl.constexpr, dtype: tl.constexpr):
    """total [M, N] += the sum over planes of plane [M, width] times its weights, in float32."""
    total = tl.dot(planes[0], plane_of(low, high, 0, m, dtype), total, input_precision="ieee")
    if m.planes > 1:
        total = tl.dot(planes[1], plane_of(low, high, 1, m, dtype), total, input_precision="ieee")
    if m.planes > 2:
        total = tl.dot(planes[2], plane_of(low, high, 2, m, dtype), total, input_precision="ieee")
        total = tl.dot(planes[3], plane_of(low, high, 3, m, dtype), total, input_precision="ieee")
    return total


@triton.jit
def add_piece(total, planes, sums, pointers, row, fits, chunk, piece: tl.constexpr, m: tl.constexpr):
    """total [M, N] += what a piece gives. planes: in a dtype of 16 bits, or float32. sums: of them, [M]."""
    dtype: tl.constexpr = planes[0].dtype
    low, high = load_codes(pointers, row, fits, chunk, piece, m)
    if m.is_quantized:
        products = _products(tl.zeros(total.shape, tl.float32), planes, low, high, m, dtype)
        scale, addend = load_scale(pointers, row, fits, chunk, piece, m)
        total += products * scale[None, :]
        if m.has_addend:
            total += sums[:, None] * addend[None, :]
    else:
        total = _products(total, planes, low, high, m, dtype)
    return total


@triton.jit
def _sums(planes, m: tl.constexpr):
    """float32 [M], over a piece's columns."""
    sums = tl.sum(planes[0].to(tl.float32), 1)
    if m.has_addend:
        if m.planes > 1:
            sums += tl.sum(planes[1].to(tl.float32), 1)
        if m.planes > 2:
            sums += tl.sum(planes[2].to(tl.float32), 1) + tl.sum(planes[3].to(tl.float32), 1)
    return sums


@triton.jit
def _power(planes, m: tl.constexpr):
    """A power of two for each row that takes its largest number to [2**14, 2**15), and its inverse."""
    most = tl.max(tl.abs(planes[0]), 1)
    if m.planes > 1:
        most = tl.maximum(most, tl.max(tl.abs(planes[1]), 1))
    if m.planes > 2:
        most = tl.maximum(most, tl.max(tl.abs(planes[2]), 1))
        most = tl.maximum(most, tl.max(tl.abs(planes[3]), 1))
    exponent = most.to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 15), 254)
    return ((268 - exponent) << 23).to(tl.float32, bitcast=True), ((exponent - 14) << 23).to(tl.float32, bitcast=True)


@triton.jit
def add_joined(
    total,
    planes,
    pointers,
    row,
    fits,
    chunk,
    piece: tl.constexpr,
    m: tl.constexpr,
    is_float32: tl.constexpr,
):
    """total [M, N] += a piece of neurons' float32 planes times their columns of the down matrix."""
    if is_float32:
        total = add_piece(total, planes, _sums(planes, m), pointers, row, fits, chunk, piece, m)
    elif m.code == "bf16":
        even, odd = planes[0].to(tl.bfloat16), planes[1].to(tl.bfloat16)
        left = (planes[0] - even.to(tl.float32)).to(tl.bfloat16), (planes[1] - odd.to(tl.float32)).to(tl.bfloat16)
        low, high = load_codes(pointers, row, fits, chunk, piece, m)
        total = _products(total, (even, odd), low, high, m, tl.bfloat16)
        total = _products(total, left, low, high, m, tl.bfloat16)
    else:
        power, inverse = _power(planes, m)
        first, second = (planes[0] * power[:, None]).to(tl.float16), (planes[1] * power[:, None]).to(tl.float16)
        third, fourth = (planes[2] * power[:, None]).to(tl.float16), (planes[3] * power[:, None]).to(tl.float16)
        rounded = first, second, third, fourth
        zeros = tl.zeros(total.shape, tl.float32)
        part = add_piece(zeros, rounded, _sums(rounded, m), pointers, row, fits, chunk, piece, m)
        total += part * inverse[:, None]
    return total
