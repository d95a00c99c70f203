"""Dense layers from packed matrices, as Triton kernels: what `linear.py` launches. Needs Triton to be imported.

`multiply` takes what `kernels.order` wrote and multiplies it with some rows of a matrix; `add_splits` adds what several
programs have of one result, in a fixed order; `take` unpacks rows by their numbers. None adds atomically.

Legend: T tokens, K columns, R rows, M tokens and N rows of a tile, C chunks of 64 columns. `spec` is a `LinearSpec`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import SUMS, add_piece, load_planes, load_sums
from .weights import column_at, load_codes, load_scale, plane_of


@triton.jit(do_not_specialize=["tokens"])
def multiply(
    x,
    x_sums,
    words,
    halves,
    octets,
    bias,
    out,
    tokens,
    spec: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """x [T, C * 64] -> out [T, R] with the bias, or float32 [SPLITS, T, R] without it.

    Program (tokens, rows, split); a split takes one segment of the chunks, or all. As in `kernels.down`, the result has
    the same bits either way.
    """
    token = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    row = tl.program_id(1) * N + tl.arange(0, N)
    if spec.is_wide:
        row = row.to(tl.int64)
    fits, is_row = token < tokens, row < spec.rows
    share: tl.constexpr = (spec.chunks + spec.segments - 1) // spec.segments
    segments: tl.constexpr = spec.segments // SPLITS
    pieces: tl.constexpr = spec.matrix.pieces
    total = tl.zeros((M, N), tl.float32)
    for segment in range(tl.program_id(2) * segments, tl.program_id(2) * segments + segments):
        part = tl.zeros((M, N), tl.float32)
        for chunk in range(segment * share, tl.minimum(segment * share + share, spec.chunks)):
            for piece in tl.static_range(pieces):
                planes = load_planes(x + (token * spec.chunks + chunk) * 64, fits, piece, spec.matrix)
                sums = load_sums(x_sums + (token * spec.chunks + chunk) * SUMS, fits, piece, spec.matrix.has_addend)
                part = add_piece(part, planes, sums, (words, halves, octets), row, is_row, chunk, piece, spec.matrix)
        total += part
    if SPLITS == 1 and spec.has_bias:
        total += tl.load(bias + row, mask=is_row, other=0)[None, :]
    at = out + (tl.program_id(2).to(tl.int64) * tokens + token)[:, None] * spec.rows + row[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=fits[:, None] & is_row[None, :])


@triton.jit(do_not_specialize=["tokens"])
def add_splits(parts, bias, out, tokens, spec: tl.constexpr, SPLITS: tl.constexpr, N: tl.constexpr):
    """float32 [SPLITS, T, R] and the bias -> out [T, R]. Program (token, rows)."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * N + tl.arange(0, N)
    is_row = row < spec.rows
    total = tl.zeros((N,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + (split * tokens.to(tl.int64) + token) * spec.rows + row, mask=is_row, other=0)
    if spec.has_bias:
        total += tl.load(bias + row, mask=is_row, other=0)
    tl.store(out + token * spec.rows + row, total.to(out.dtype.element_ty), mask=is_row)


@triton.jit(do_not_specialize=["count"])
def take(words, halves, octets, ids, out, count, spec: tl.constexpr, N: tl.constexpr):
    """Rows by their int64 numbers [count] -> out [count, K]; nothing is written for a row that there is not.

    Program (numbers, chunk).
    """
    index = tl.program_id(0) * N + tl.arange(0, N)
    row = tl.load(ids + index, mask=index < count, other=-1)
    fits = (row >= 0) & (row < spec.rows)
    chunk = tl.program_id(1)
    m: tl.constexpr = spec.matrix
    pieces: tl.constexpr = m.pieces
    planes: tl.constexpr = m.planes
    width: tl.constexpr = m.piece // m.planes
    for piece in tl.static_range(pieces):
        low, high = load_codes((words, halves, octets), row, fits, chunk, piece, m)
        scale, addend = tl.full((N,), 1.0, tl.float32), tl.zeros((N,), tl.float32)
        if m.is_quantized:
            scale, addend = load_scale((words, halves, octets), row, fits, chunk, piece, m)
        for plane in tl.static_range(planes):
            values = plane_of(low, high, plane, m, tl.float32) * scale[None, :]
            if m.has_addend:
                values += addend[None, :]
            column = chunk * 64 + column_at(piece * m.piece + plane * width + tl.arange(0, width), m)
            at = out + index.to(tl.int64)[None, :] * spec.columns + column[:, None]
            tl.store(at, values.to(out.dtype.element_ty), mask=fits[None, :] & (column < spec.columns)[:, None])
