"""Experts from packed slots, as Triton kernels: what `launch.py` launches. Needs Triton to be imported.

Four kernels follow each other. `order` writes hidden states down in the order in which a format keeps its columns;
`gate_up` joins gate and up of some neurons into float32; `down` multiplies that into a float32 row for each pair of a
token and an expert; `combine` adds a token's pairs, weighted, in a fixed order. `choose` makes the plan for few tokens,
in one program. None adds atomically and none waits for the host.

Legend: T tokens, D model width, C chunks of 64 columns, M pairs and N matrix rows of a tile. A run is the blocks of
neurons that are joined before `down` takes them.

A tile is five int32: slot, first block of neurons, number of blocks, first pair, one past the last pair.
`spec` is a `GpuKernel`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import SUMS, add_joined, add_piece, load_planes, load_sums
from .weights import column_at, place_of

TILE_INTS = tl.constexpr(5)
ENTRY_INTS = tl.constexpr(3)  # of the table in `choose`: an expert's slot, first block of neurons, number of blocks
CHUNKS_AT_ONCE = tl.constexpr(16)  # of one program of `order`
COMPARED = tl.constexpr(16)  # pairs at once in `choose`; all at once take seconds to compile


@triton.jit
def _join(gate, up, spec: tl.constexpr):
    """As the family does; by comparisons rather than maxima, which may drop NaN."""
    if spec.gate == "silu":
        joined = gate / (1 + tl.exp(-gate)) * up
    elif spec.gate == "gelu":
        joined = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476)) * up
    elif spec.gate == "gelu_tanh":  # (1 + tanh y) / 2 is the sigmoid of 2y
        joined = gate / (1 + tl.exp(-1.5957691216057308 * gate * (1 + 0.044715 * gate * gate))) * up
    elif spec.gate == "relu2":
        gate = tl.where(gate < 0, 0.0, gate)
        joined = gate * gate * up
    else:
        gate = tl.where(gate > spec.limit, spec.limit, gate)
        up = tl.where(up > spec.limit, spec.limit, up)
        up = tl.where(up < -spec.limit, -spec.limit, up)
        joined = gate / (1 + tl.exp(-spec.alpha * gate)) * (up + spec.offset)
    return joined


@triton.jit
def order(
    x,
    ordered,
    sums,
    hidden: tl.constexpr,
    number: tl.constexpr,
    orders: tl.constexpr,
    m: tl.constexpr,
    SUM: tl.constexpr,
):
    """Hidden states [T, D] -> [T, orders, C * 64], the number-th, as `m` has its columns, zeros at the end.

    sums: float32 [T, orders, C, 4], of each piece, if they are asked for.
    """
    chunks: tl.constexpr = (hidden + 63) // 64
    token = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1) * CHUNKS_AT_ONCE + tl.arange(0, CHUNKS_AT_ONCE)
    place = tl.arange(0, 64)
    column = chunk[:, None] * 64 + column_at(place, m)[None, :]
    values = tl.load(x + token * hidden + column, mask=column < hidden, other=0)
    values = values.to(ordered.dtype.element_ty)
    first = (token * orders + number) * chunks + chunk
    is_chunk = (chunk < chunks)[:, None]
    tl.store(ordered + (first[:, None] * 64 + place[None, :]), values, mask=is_chunk)
    if SUM:
        of_pieces = tl.sum(tl.reshape(values.to(tl.float32), (CHUNKS_AT_ONCE, m.pieces, m.piece)), 2)
        tl.store(sums + (first[:, None] * SUMS + tl.arange(0, m.pieces)[None, :]), of_pieces, mask=is_chunk)


@triton.jit(do_not_specialize=["run_first", "run_blocks"])
def gate_up(
    x,
    x_sums,
    words,
    halves,
    octets,
    tiles,
    pair_token,
    joined,
    slot_words,
    run_first,
    run_blocks,
    spec: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Neurons of a tile's pairs: joined float32 [pairs, run_blocks * block], in the order of down's columns."""
    tile = tiles + tl.program_id(0) * TILE_INTS
    local = tl.program_id(1) // (spec.block // N)  # block of the run
    neuron = tl.program_id(1) % (spec.block // N) * N + tl.arange(0, N)
    first, stop = tl.load(tile + 3), tl.load(tile + 4)
    if (first >= stop) | (run_first + local >= tl.load(tile + 2)):
        return
    base = tl.load(tile).to(tl.int64) * slot_words
    base += (tl.load(tile + 1) + run_first + local).to(tl.int64) * spec.block_words
    pair = first + tl.arange(0, M)
    fits = pair < stop
    token = tl.load(pair_token + pair, mask=fits, other=0).to(tl.int64)
    is_row = neuron < spec.block
    gate = tl.zeros((M, N), tl.float32)
    up = tl.zeros((M, N), tl.float32)
    gate_at = words + base, halves + 2 * base, octets + 4 * base
    up_base = base + spec.up_at
    up_at = words + up_base, halves + 2 * up_base, octets + 4 * up_base
    at = x + token * (spec.orders * spec.chunks * 64)
    sums_at = x_sums + token * (spec.orders * spec.chunks * SUMS)
    second: tl.constexpr = (spec.orders - 1) * spec.chunks  # where the order of up is, in chunks
    up_pieces: tl.constexpr = spec.up_matrix.pieces
    gate_pieces: tl.constexpr = spec.gate_matrix.pieces
    for chunk in range(spec.chunks):
        for piece in tl.static_range(up_pieces):
            planes = load_planes(at + (second + chunk) * 64, fits, piece, spec.up_matrix)
            sums = load_sums(sums_at + (second + chunk) * SUMS, fits, piece, spec.either_has_addend)
            up = add_piece(up, planes, sums, up_at, neuron, is_row, chunk, piece, spec.up_matrix)
            if spec.has_gate and spec.orders == 1:
                gate = add_piece(gate, planes, sums, gate_at, neuron, is_row, chunk, piece, spec.gate_matrix)
        if spec.orders == 2:
            for piece in tl.static_range(gate_pieces):
                planes = load_planes(at + chunk * 64, fits, piece, spec.gate_matrix)
                sums = load_sums(sums_at + chunk * SUMS, fits, piece, spec.gate_matrix.has_addend)
                gate = add_piece(gate, planes, sums, gate_at, neuron, is_row, chunk, piece, spec.gate_matrix)
    if spec.has_bias:
        biases = words + base + neuron
        up += tl.load(biases + spec.up_bias_at).to(tl.float32, bitcast=True)[None, :]
        if spec.has_gate:
            gate += tl.load(biases + spec.gate_bias_at).to(tl.float32, bitcast=True)[None, :]
    result = _join(gate, up, spec) if spec.has_gate else _join(up, 1.0, spec)
    at = joined + pair.to(tl.int64)[:, None] * (run_blocks * spec.block) + local * spec.block
    at += place_of(neuron, spec.down_matrix)[None, :]
    tl.store(at, result, mask=fits[:, None])


@triton.jit(do_not_specialize=["pairs", "run_first", "run_blocks"])
def down(
    joined,
    words,
    halves,
    octets,
    tiles,
    rows,
    pairs,
    slot_words,
    run_first,
    run_blocks,
    spec: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Rows of a tile's pairs, some columns of them: float32 [splits, pairs, D], set by the first run, then added to.

    Program (tile, columns, split); a split takes one of the expert's segments, or all. Each segment is summed from
    zero, and segments are added in order, here or by `combine`: so the result has the same bits whatever the number of
    splits.
    """
    tile = tiles + tl.program_id(0) * TILE_INTS
    column = tl.program_id(1) * N + tl.arange(0, N)
    is_column = column < spec.hidden
    first, stop = tl.load(tile + 3), tl.load(tile + 4)
    if first >= stop:
        return
    pair = first + tl.arange(0, M)
    fits = pair < stop
    first_block, count = tl.load(tile + 1), tl.load(tile + 2)
    slot = tl.load(tile).to(tl.int64) * slot_words
    row = tl.program_id(2).to(tl.int64) * pairs + pair
    at = rows + row[:, None] * spec.hidden + column[None, :]
    mask = fits[:, None] & is_column[None, :]
    total = tl.zeros((M, N), tl.float32)
    if run_first > 0:
        total = tl.load(at, mask=mask, other=0)
    elif spec.has_bias:  # with the last neuron, and by one split
        has_last = (first_block + count == spec.blocks) & (tl.program_id(2) == 0)
        bias = tl.load(words + slot + spec.down_bias_at + column, mask=is_column & has_last, other=0)
        total += bias.to(tl.float32, bitcast=True)[None, :]
    joined += pair.to(tl.int64) * (run_blocks * spec.block)
    begin, end = first_block + run_first, first_block + tl.minimum(count, run_first + run_blocks)
    side: tl.constexpr = spec.block // 64  # chunks of a block
    pieces: tl.constexpr = spec.down_matrix.pieces
    blocks: tl.constexpr = spec.segment_blocks
    segments = tl.cdiv(spec.segments, tl.num_programs(2))
    for segment in range(tl.program_id(2) * segments, tl.program_id(2) * segments + segments):
        first_local = tl.maximum(begin, segment * blocks) - begin
        last_local = tl.minimum(end, (segment + 1) * blocks) - begin
        part = tl.zeros((M, N), tl.float32)
        for i in range(first_local * side, last_local * side):
            base = slot + (begin + i // side).to(tl.int64) * spec.block_words + spec.down_at
            pointers = words + base, halves + 2 * base, octets + 4 * base
            for piece in tl.static_range(pieces):
                planes = load_planes(joined + i * 64, fits, piece, spec.down_matrix)
                part = add_joined(
                    part, planes, pointers, column, is_column, i % side, piece, spec.down_matrix, spec.down_is_fp32
                )
        total += part
    tl.store(at, total, mask=mask)


@triton.jit(do_not_specialize=["pairs", "splits"])
def combine(
    rows,
    pair_weight,
    token_start,
    token_pairs,
    out,
    pairs,
    splits,
    spec: tl.constexpr,
    ADD: tl.constexpr,
    N: tl.constexpr,
):
    """out [T, D] gets, or is added, each token's rows, weighted, in the order of `token_pairs`."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * N + tl.arange(0, N)
    fits = column < spec.hidden
    step = pairs.to(tl.int64) * spec.hidden  # from split to split
    total = tl.zeros((N,), tl.float32)
    for i in range(tl.load(token_start + token), tl.load(token_start + token + 1)):
        pair = tl.load(token_pairs + i)
        is_pair = pair < pairs  # else a choice that was skipped
        weight = tl.load(pair_weight + pair, mask=is_pair, other=0)
        row = tl.zeros((N,), tl.float32)
        part = rows + pair.to(tl.int64) * spec.hidden + column
        for _ in range(splits):
            row += tl.load(part, mask=fits & is_pair, other=0)
            part += step
        total += row * weight
    at = out + token * spec.hidden + column
    if ADD:
        total += tl.load(at, mask=fits, other=0)
    tl.store(at, total, mask=fits)


@triton.jit
def _choice(index, weights, table, i, pairs, experts):
    """Some of a router's choices: experts, `experts` for those that are skipped, and their weights."""
    expert = tl.load(index + i, mask=i < pairs, other=-1)
    weight = tl.load(weights + i, mask=i < pairs, other=0)
    is_ours = (weight != 0) & (expert < experts) & (expert >= 0)  # before it is cut to 32 bits
    expert = expert.to(tl.int32)
    is_ours &= tl.load(table + expert * ENTRY_INTS + 2, mask=is_ours, other=0) > 0
    return tl.where(is_ours, expert, experts), weight


@triton.jit
def _put_tile(tiles, place, entries, first, stop, mask):
    """One tile each, where the mask is."""
    tile = tiles + place * TILE_INTS
    for i in tl.static_range(ENTRY_INTS):
        tl.store(tile + i, entries[i], mask=mask)
    tl.store(tile + 3, first, mask=mask)
    tl.store(tile + 4, stop, mask=mask)


@triton.jit(do_not_specialize=["experts", "pairs", "middle_at", "large_at"])
def choose(
    index,
    weights,
    table,
    tiles,
    pair_token,
    pair_weight,
    token_pairs,
    counts,
    experts,
    pairs,
    middle_at,
    large_at,
    K: tl.constexpr,
    SMALL: tl.constexpr,
    MIDDLE: tl.constexpr,
    LARGE: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """The plan for index [T, K] and weights float32 [T, K] in one program, which compares each pair with each.

    table: [E, 3], see ENTRY_INTS; an expert of no blocks is skipped. tiles: of up to three groups; a tile of the first
    stands where its first pair does, so there are as many as pairs, most of them empty, and in the others by
    `plan._places`. SMALL, MIDDLE, LARGE: rows of the groups, equal ones where there are fewer. middle_at, large_at:
    where the others begin, zeros before. counts: None, or int64 [2], to which are added the pairs that are not skipped
    and their experts. PAIRS: a power of two, no fewer than `pairs`.
    """
    i = tl.arange(0, PAIRS)
    expert, weight = _choice(index, weights, table, i, pairs, experts)
    first = tl.zeros((PAIRS,), tl.int32)  # of the expert's pairs
    within = tl.zeros((PAIRS,), tl.int32)  # this one's number among them
    count = tl.zeros((PAIRS,), tl.int32)
    place = tl.zeros((PAIRS,), tl.int32)  # among the token's pairs
    for start in range(0, PAIRS, COMPARED):
        j = start + tl.arange(0, COMPARED)
        other, _ = _choice(index, weights, table, j, pairs, experts)
        is_less = other[None, :] < expert[:, None]  # [i, j]
        is_same = other[None, :] == expert[:, None]
        is_earlier = is_same & (j[None, :] < i[:, None])
        of_token = j[None, :] // K == i[:, None] // K
        first += tl.sum(is_less.to(tl.int32), 1)
        within += tl.sum(is_earlier.to(tl.int32), 1)
        count += tl.sum(is_same.to(tl.int32), 1)
        place += tl.sum((of_token & (is_less | is_earlier)).to(tl.int32), 1)
    is_pair = i < pairs
    is_ours = expert < experts
    if counts is not None:
        tl.store(counts, tl.load(counts) + tl.sum(is_ours.to(tl.int64)))
        tl.store(counts + 1, tl.load(counts + 1) + tl.sum((is_ours & (within == 0)).to(tl.int64)))
    rank = first + within
    tl.store(pair_token + rank, i // K, mask=is_pair)
    tl.store(pair_weight + rank, weight, mask=is_pair)
    tl.store(token_pairs + i // K * K + place, tl.where(is_ours, rank, pairs), mask=is_pair)
    is_tile = is_ours & (within % LARGE == 0)
    stop = tl.minimum(rank + LARGE, first + count)
    entry = table + expert * ENTRY_INTS
    slot = tl.load(entry, mask=is_ours, other=0)
    first_block, blocks = tl.load(entry + 1, mask=is_ours, other=0), tl.load(entry + 2, mask=is_ours, other=0)
    entries = slot, first_block, blocks
    size = stop - rank
    _put_tile(tiles, rank, entries, rank, tl.where(is_tile & (size <= SMALL), stop, rank), is_pair)
    if MIDDLE > SMALL:
        place = middle_at + rank // (SMALL + 1)
        _put_tile(tiles, place, entries, rank, stop, is_tile & (size > SMALL) & (size <= MIDDLE))
    if LARGE > MIDDLE:
        place = large_at + rank // (MIDDLE + 1)
        _put_tile(tiles, place, entries, rank, stop, is_tile & (size > MIDDLE))
