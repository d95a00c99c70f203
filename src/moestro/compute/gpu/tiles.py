"""Tiles of packed weights, times tiles of numbers, in Triton: what the kernels of `kernels.py` are made of.

Weights are rounded no further: whole numbers are exact in float16 and bfloat16, and a group's scale and zero are
applied to its float32 sum. The join of gate and up enters the second half as the sum of two bfloat16 for bf16 weights
(16 bits), as one float16 with a power of two for each 64 neurons for fp16, int8 and int4 (11 bits), else in float32.

Legend: M pairs of a token and an expert, N rows of a packed matrix. A group is 64 columns. A plane is what one shift
gives of its packed words: for bf16 and int8 the even and the odd columns, for int4 four times 16 of them.
`spec` is a `GpuKernel`.
"""

from __future__ import annotations

import triton
import triton.language as tl

PANEL = tl.constexpr(16)  # rows


@triton.jit
def column_at(place, spec: tl.constexpr):
    """Which of a group's 64 columns stands at a place when planes follow one another."""
    if spec.format == "int4":
        column = place % 8 * 8 + place // 16 * 2 + place % 16 // 8
    elif spec.planes == 2:
        column = place % 32 * 2 + place // 32
    else:
        column = place
    return column


@triton.jit
def place_of(column, spec: tl.constexpr):
    """The inverse of `column_at`."""
    if spec.format == "int4":
        place = column % 8 // 2 * 16 + column % 2 * 8 + column // 8
    elif spec.planes == 2:
        place = column % 2 * 32 + column // 2
    else:
        place = column
    return place


@triton.jit
def _whole(number, offset: tl.constexpr, dtype: tl.constexpr):
    """int32 in [0, 256) -> number - offset, exactly: the low bits of a float so large that its last bit is 1."""
    if dtype == tl.float16:
        whole = (number | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - (1024.0 + offset)
    else:
        whole = ((number | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + offset)).to(dtype)
    return whole


@triton.jit
def _plane(words, plane: tl.constexpr, spec: tl.constexpr, dtype: tl.constexpr):
    """A plane of packed words in dtype, scales left out: [64 / planes, N]."""
    if spec.format == "int4":
        weights = _whole((words >> (4 * plane)) & 15, 0, dtype)
    elif spec.format == "int8":
        weights = _whole(((words.to(tl.int32) >> (8 * plane)) & 255) ^ 128, 128, dtype)
    elif spec.format != "bf16":
        weights = words.to(dtype)
    elif dtype == tl.bfloat16:
        weights = (words >> (16 * plane)).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        weights = ((words >> (16 * plane)) << 16).to(tl.float32, bitcast=True).to(dtype)
    return weights


@triton.jit
def _load_words(words, lane, fits, group, HEIGHT: tl.constexpr, spec: tl.constexpr):
    """The packed words of one group, a row of them for each column of a plane.

    words: at the matrix. lane: int [N], where a matrix row's first word is. fits: [N], whether there is such a row.
    HEIGHT: rows of words in a panel.
    """
    if spec.format == "int4":  # each word twice, for a product takes no fewer than 16 columns
        column = tl.arange(0, 16)
        at = group * (9 * PANEL) + PANEL + column % 8 * PANEL
        loaded = tl.load(words + at[:, None] + lane[None, :], mask=fits[None, :], other=0)
        loaded = loaded >> (column // 8 * 16)[:, None]
    elif spec.format == "int8":
        at = group * (33 * PANEL) + PANEL + tl.arange(0, 32) * PANEL
        loaded = tl.load(words + at[:, None] + lane[None, :], mask=fits[None, :], other=0)
    else:
        width: tl.constexpr = spec.group // spec.planes
        column = group * width + tl.arange(0, width)
        at = words + column[:, None] * PANEL + lane[None, :]
        if HEIGHT % width == 0:
            loaded = tl.load(at, mask=fits[None, :], other=0)
        else:
            loaded = tl.load(at, mask=(column < HEIGHT)[:, None] & fits[None, :], other=0)
    return loaded


@triton.jit
def _products(total, planes, loaded, spec: tl.constexpr, dtype: tl.constexpr):
    """total [M, N] += the sum over planes of plane [M, 64 / planes] times its weights, in float32."""
    total = tl.dot(planes[0], _plane(loaded, 0, spec, dtype), total, input_precision="ieee")
    if spec.planes > 1:
        total = tl.dot(planes[1], _plane(loaded, 1, spec, dtype), total, input_precision="ieee")
    if spec.planes > 2:
        total = tl.dot(planes[2], _plane(loaded, 2, spec, dtype), total, input_precision="ieee")
        total = tl.dot(planes[3], _plane(loaded, 3, spec, dtype), total, input_precision="ieee")
    return total


@triton.jit
def _scaled(products, sums, halves, lane, fits, group, spec: tl.constexpr):
    """Products with whole numbers, float32 [M, N], and the left sides' sums [M] -> with a group's weights.

    halves: at the matrix, in float16.
    """
    if spec.format == "int4":
        at = halves + lane // PANEL * (2 * PANEL) + lane % PANEL + group * (18 * PANEL)
        zero = tl.load(at + PANEL, mask=fits, other=0).to(tl.float32)
        products -= sums[:, None] * zero[None, :]
    else:
        at = halves + lane + group * (33 * PANEL)
    return products * tl.load(at, mask=fits, other=0).to(tl.float32)[None, :]


@triton.jit
def load_planes(at, fits, spec: tl.constexpr):
    """A group of 64 numbers that `order` or `gate_up` wrote: four planes, of which `spec.planes` count.

    at: pointers to the first, [M].
    """
    k = tl.arange(0, spec.group // spec.planes)[None, :]
    mask = fits[:, None]
    first = tl.load(at[:, None] + k, mask=mask, other=0)
    second, third, fourth = first, first, first  # where there is but one plane
    if spec.planes == 2:
        second = tl.load(at[:, None] + (32 + k), mask=mask, other=0)
    elif spec.planes == 4:
        second = tl.load(at[:, None] + (16 + k), mask=mask, other=0)
        third = tl.load(at[:, None] + (32 + k), mask=mask, other=0)
        fourth = tl.load(at[:, None] + (48 + k), mask=mask, other=0)
    return first, second, third, fourth


@triton.jit
def add_group(total, planes, sums, words, halves, lane, fits, group, HEIGHT: tl.constexpr, spec: tl.constexpr):
    """total [M, N] += what a group of 64 columns gives. planes: in a dtype of 16 bits, or float32."""
    dtype: tl.constexpr = planes[0].dtype
    loaded = _load_words(words, lane, fits, group, HEIGHT, spec)
    if spec.is_quantized:
        zeros = tl.zeros(total.shape, tl.float32)
        products = _products(zeros, planes, loaded, spec, dtype)
        total += _scaled(products, sums, halves, lane, fits, group, spec)
    else:
        total = _products(total, planes, loaded, spec, dtype)
    return total


@triton.jit
def _sums(planes, spec: tl.constexpr):
    """float32 [M], over a group's columns; of use to int4 alone."""
    sums = tl.sum(planes[0].to(tl.float32), 1)
    if spec.format == "int4":
        sums += tl.sum(planes[1].to(tl.float32), 1)
        sums += tl.sum(planes[2].to(tl.float32), 1) + tl.sum(planes[3].to(tl.float32), 1)
    return sums


@triton.jit
def _power(planes, spec: tl.constexpr):
    """A power of two for each row that takes its largest number to [2**14, 2**15), and its inverse."""
    most = tl.max(tl.abs(planes[0]), 1)
    if spec.planes > 1:
        most = tl.maximum(most, tl.max(tl.abs(planes[1]), 1))
    if spec.planes > 2:
        most = tl.maximum(most, tl.max(tl.abs(planes[2]), 1))
        most = tl.maximum(most, tl.max(tl.abs(planes[3]), 1))
    exponent = most.to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 15), 254)
    return ((268 - exponent) << 23).to(tl.float32, bitcast=True), ((exponent - 14) << 23).to(tl.float32, bitcast=True)


@triton.jit
def add_joined(total, planes, words, halves, lane, fits, spec: tl.constexpr):
    """total [M, N] += 64 neurons' float32 planes times their columns of the down matrix."""
    height: tl.constexpr = spec.block // spec.planes
    if spec.dtype == "fp32":
        total = add_group(total, planes, _sums(planes, spec), words, halves, lane, fits, 0, height, spec)
    elif spec.format == "bf16":
        even, odd = planes[0].to(tl.bfloat16), planes[1].to(tl.bfloat16)
        left = (planes[0] - even.to(tl.float32)).to(tl.bfloat16), (planes[1] - odd.to(tl.float32)).to(tl.bfloat16)
        loaded = _load_words(words, lane, fits, 0, height, spec)
        total = _products(total, (even, odd), loaded, spec, tl.bfloat16)
        total = _products(total, left, loaded, spec, tl.bfloat16)
    else:
        power, inverse = _power(planes, spec)
        first, second = (planes[0] * power[:, None]).to(tl.float16), (planes[1] * power[:, None]).to(tl.float16)
        third, fourth = (planes[2] * power[:, None]).to(tl.float16), (planes[3] * power[:, None]).to(tl.float16)
        rounded = first, second, third, fourth
        zeros = tl.zeros(total.shape, tl.float32)
        part = add_group(zeros, rounded, _sums(rounded, spec), words, halves, lane, fits, 0, height, spec)
        total += part * inverse[:, None]
    return total
