"""Experts from packed slots, as Triton kernels: what `launch.py` launches. Needs Triton to be imported.

Four kernels follow each other. `order` writes hidden states down in the order in which a format keeps its columns;
`gate_up` joins gate and up of some neurons into float32; `down` multiplies that into a float32 row for each pair of a
token and an expert; `combine` adds a token's pairs, weighted, in a fixed order. `choose` makes the plan for few tokens,
in one program. None adds atomically and none waits for the host.

Legend: T tokens, D model width, G groups of 64 columns, M pairs and N matrix rows of a tile.

A tile is five int32: slot, first block of neurons, number of blocks, first pair, one past the last pair.
`spec` is a `GpuKernel`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import PANEL, add_group, add_joined, column_at, load_planes, place_of

TILE_INTS = tl.constexpr(5)
ENTRY_INTS = tl.constexpr(3)  # of the table in `choose`: an expert's slot, first block of neurons, number of blocks
GROUPS_AT_ONCE = tl.constexpr(16)  # of one program of `order`
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
def order(x, ordered, sums, spec: tl.constexpr):
    """Hidden states [T, D] -> [T, G * 64] in the planes' order, zeros at the end; sums [T, G] for int4."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS_AT_ONCE + tl.arange(0, GROUPS_AT_ONCE)
    place = tl.arange(0, spec.group)
    column = group[:, None] * spec.group + column_at(place, spec)[None, :]
    values = tl.load(x + token * spec.hidden + column, mask=column < spec.hidden, other=0)
    values = values.to(ordered.dtype.element_ty)
    at = ordered + token * (spec.groups * spec.group) + (group[:, None] * spec.group + place[None, :])
    tl.store(at, values, mask=(group < spec.groups)[:, None])
    if spec.format == "int4":
        tl.store(sums + token * spec.groups + group, tl.sum(values.to(tl.float32), 1), mask=group < spec.groups)


@triton.jit(do_not_specialize=["chunk_first", "chunk_blocks"])
def gate_up(
    x,
    x_sums,
    words,
    halves,
    floats,
    tiles,
    pair_token,
    joined,
    slot_words,
    chunk_first,
    chunk_blocks,
    spec: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Neurons of a tile's pairs: joined float32 [pairs, chunk_blocks * 64], each block in the planes' order."""
    tile = tiles + tl.program_id(0) * TILE_INTS
    local = tl.program_id(1) // (spec.block // N)  # block of the chunk
    neuron = tl.program_id(1) % (spec.block // N) * N + tl.arange(0, N)
    first, stop = tl.load(tile + 3), tl.load(tile + 4)
    if (first >= stop) | (chunk_first + local >= tl.load(tile + 2)):
        return
    base = tl.load(tile).to(tl.int64) * slot_words
    base += (tl.load(tile + 1) + chunk_first + local).to(tl.int64) * spec.block_words
    lane = neuron // PANEL * spec.row_panel_words + neuron % PANEL
    is_row = neuron < spec.block
    pair = first + tl.arange(0, M)
    fits = pair < stop
    token = tl.load(pair_token + pair, mask=fits, other=0).to(tl.int64)
    gate = tl.zeros((M, N), tl.float32)
    up = tl.zeros((M, N), tl.float32)
    height: tl.constexpr = spec.row_panel_words // PANEL
    ratio: tl.constexpr = spec.word_bytes // 2
    for group in range(spec.groups):
        planes = load_planes(x + token * (spec.groups * spec.group) + group * spec.group, fits, spec)
        sums = tl.zeros((M,), tl.float32)
        if spec.format == "int4":
            sums = tl.load(x_sums + token * spec.groups + group, mask=fits, other=0)
        at = words + base
        scales = halves + base * ratio
        if spec.has_gate:
            gate = add_group(gate, planes, sums, at, scales, lane, is_row, group, height, spec)
        at += spec.up_at
        scales += spec.up_at * ratio
        up = add_group(up, planes, sums, at, scales, lane, is_row, group, height, spec)
    if spec.has_bias:
        biases = floats + base * spec.word_bytes // 4 + neuron
        up += tl.load(biases + spec.up_bias_at)[None, :]
        if spec.has_gate:
            gate += tl.load(biases + spec.gate_bias_at)[None, :]
    result = _join(gate, up, spec) if spec.has_gate else _join(up, 1.0, spec)
    at = joined + pair.to(tl.int64)[:, None] * (chunk_blocks * spec.block) + local * spec.block
    at += place_of(neuron, spec)[None, :]
    tl.store(at, result, mask=fits[:, None])


@triton.jit(do_not_specialize=["pairs", "chunk_first", "chunk_blocks"])
def down(
    joined,
    words,
    halves,
    floats,
    tiles,
    rows,
    pairs,
    slot_words,
    chunk_first,
    chunk_blocks,
    spec: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Rows of a tile's pairs, some columns of them: float32 [splits, pairs, D], set by the first chunk, then added to.

    Program (tile, columns, split); a split takes its share of the chunk's blocks.
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
    if chunk_first > 0:
        total = tl.load(at, mask=mask, other=0)
    elif spec.has_bias:  # with the last neuron, and by one split
        has_last = (first_block + count == spec.blocks) & (tl.program_id(2) == 0)
        biases = floats + slot * spec.word_bytes // 4 + spec.down_bias_at + column
        total += tl.load(biases, mask=is_column & has_last, other=0)[None, :]
    here = tl.minimum(count - chunk_first, chunk_blocks)
    share = tl.cdiv(here, tl.num_programs(2))
    lane = column // PANEL * spec.column_panel_words + column % PANEL
    joined += pair.to(tl.int64) * (chunk_blocks * spec.block)
    for local in range(tl.program_id(2) * share, tl.minimum(tl.program_id(2) * share + share, here)):
        base = slot + (first_block + chunk_first + local).to(tl.int64) * spec.block_words + spec.down_at
        planes = load_planes(joined + local * spec.block, fits, spec)
        half_base = halves + base * (spec.word_bytes // 2)
        total = add_joined(total, planes, words + base, half_base, lane, is_column, spec)
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


@triton.jit(do_not_specialize=["experts", "pairs"])
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
    K: tl.constexpr,
    M: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """The plan for index [T, K] and weights float32 [T, K] in one program, which compares each pair with each.

    table: [E, 3], see ENTRY_INTS; an expert of no blocks is skipped. A tile stands where its first pair does, so there
    are as many as pairs, most of them empty. counts: None, or int64 [2], to which are added the pairs that are not
    skipped and their experts. PAIRS: a power of two, no fewer than `pairs`.
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
    is_tile = is_ours & (within % M == 0)
    tile = tiles + rank * TILE_INTS
    for place in tl.static_range(ENTRY_INTS):
        entry = tl.load(table + expert * ENTRY_INTS + place, mask=is_ours, other=0)
        tl.store(tile + place, entry.to(tl.int32), mask=is_pair)
    tl.store(tile + 3, rank, mask=is_pair)
    tl.store(tile + 4, tl.where(is_tile, tl.minimum(rank + M, first + count), rank), mask=is_pair)
