"""Which tokens meet which expert in a slot, as the kernels read it: made on the host, or on the device.

Both give the same results: pairs of a token and an expert, sorted by expert, in tiles, and each token's pairs in
ascending order, in which they are added. A weight of exactly 0 and an index that is no expert's, whatever its weight,
are skipped, as in the conductor's `group_by_expert`.

A tile reads the weights of its expert once, so up to 64 pairs of an expert are one tile (32 without tensor cores). What
a tile has room for is what it is compiled for and costs, so tiles of a few pairs and of many go by different launches:
a *group* has the tiles of up to `rows` pairs that no smaller group has room for.

Legend: T tokens, K top-k, E experts, P pairs, N blocks of neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..experts import ExpertWork
from .kernel import WORKSPACE_BYTES, GpuKernel, triton_kernels

PAIRS_AT_ONCE = 256  # sorted by a single program, which compares each with each; more by torch

_TILE_INTS = 5
_ALIGN = 4  # numbers; kernels are compiled for addresses of 16 bytes


class TileGroup(NamedTuple):
    """Tiles of up to `rows` pairs.

    tiles: int32 [tiles, 5]: slot, first block of neurons, number of blocks, first pair, one past the last pair. One
    without pairs is skipped.
    """

    rows: int
    tiles: Tensor


@dataclass(frozen=True, slots=True)
class PlanPart:
    """The plan for some of the tokens; all tensors are on the device.

    tokens: which ones; the numbers below count from the first of them.
    pair_token: int32 [P]. pair_weight: float32 [P].
    token_start: int32 [T + 1], where a token's entries begin in token_pairs, int32: a pair each, P for a skipped one.
    blocks: the most of any tile.
    """

    tokens: range
    groups: tuple[TileGroup, ...]
    pair_token: Tensor
    pair_weight: Tensor
    token_start: Tensor
    token_pairs: Tensor
    blocks: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A layer step, in as many parts as the workspace's limit asks for."""

    parts: tuple[PlanPart, ...]
    limit_bytes: int = WORKSPACE_BYTES


def tile_sizes(on_tensor_cores: Sequence[bool], pairs: int, experts: int, most: int) -> tuple[int, ...]:
    """Rows of the groups that a step needs, smallest first; an expert's pairs are cut into tiles of the largest.

    16 is the least that tensor cores multiply. Without them each row costs its share, so it may be 4, and of more than
    32 the compiler finds no registers: 64 take 3 to 9 KB of stack.

    Args:
        on_tensor_cores: of each product that takes these tiles.
        most: pairs of the expert that has most of them, or as many as that may be.
    """
    if all(on_tensor_cores) and pairs > 128 * experts:
        return (128,)
    sizes = (16, 32, 64) if all(on_tensor_cores) else (16, 32) if any(on_tensor_cores) else (4, 16, 32)
    return sizes[: 1 + sum(size < most for size in sizes[:-1])]


def plan_of(
    kernel: GpuKernel, pool: Tensor, work: Sequence[ExpertWork], tokens: int, *, limit_bytes: int = WORKSPACE_BYTES
) -> Plan:
    """The plan for work in slots; one transfer to the device for all of it.

    Args:
        pool: uint8 [slots, slot_bytes]; each work's packed bytes are a row of it.
        work: its rows and weights on the host, as the conductor has them.
        tokens: T.
        limit_bytes: what the workspace may take.
    """
    slots = np.array([slot_of(pool, item.packed) for item in work], np.int32)
    spans = [(item.neurons.start // kernel.block, -(-item.neurons.stop // kernel.block)) for item in work]
    items = _Items(slots, *np.array(spans, np.int32).reshape(-1, 2).T)
    routed = [item.routed() for item in work]
    item = np.repeat(np.arange(len(work)), [len(rows) for rows, _ in routed])
    token = np.concatenate([rows.numpy() for rows, _ in routed]) if work else np.empty(0, np.int64)
    weight = np.concatenate([weights.numpy() for _, weights in routed]) if work else np.empty(0, np.float32)
    kept = (weight != 0) & (items.stop > items.first)[item]
    item, token, weight = item[kept], token[kept], weight[kept]
    most = int(np.bincount(token, minlength=1).max())
    step = tokens_at_once(kernel, most, limit_bytes)
    ranges = [range(first, min(first + step, tokens)) for first in range(0, tokens, step)]
    drafts = []
    for part in ranges:
        here = (token >= part.start) & (token < part.stop)
        drafts.append(_draft(kernel, part, items, item[here], token[here] - part.start, weight[here]))
    return Plan(_send(drafts, pool.device), limit_bytes)


def plan_on_device(
    kernel: GpuKernel,
    index: Tensor,
    weights: Tensor,
    table: Tensor,
    *,
    counts: Tensor | None = None,
    limit_bytes: int = WORKSPACE_BYTES,
) -> Plan:
    """The plan for a router's choice, of those experts that are in slots; never waits for the device.

    Args:
        index: int [T, K], chosen experts; below 0, or E or more, for none of ours. weights: float [T, K].
        table: int32 [E, 3], each expert's slot, first block of neurons and number of blocks: 0 for one that is skipped.
        counts: int64 [2], to which is added how many choices are not skipped, and how many experts these are of.
        limit_bytes: what the workspace may take.
    """
    step = tokens_at_once(kernel, index.shape[1], limit_bytes)
    index, weights = index.long(), weights.float()
    if counts is not None and (index.shape[0] > step or index.numel() > PAIRS_AT_ONCE):  # not in one program
        _count(index, weights, table, counts)
        counts = None
    parts = []
    for first in range(0, index.shape[0], step):
        tokens = range(first, min(first + step, index.shape[0]))
        chosen, mass = index[first : tokens.stop].contiguous(), weights[first : tokens.stop].contiguous()
        if chosen.numel() <= PAIRS_AT_ONCE:
            parts.append(_by_one_program(kernel, tokens, chosen, mass, table, counts))
        else:
            parts.append(_by_torch(kernel, tokens, chosen, mass, table))
    return Plan(tuple(parts), limit_bytes)


def table_of(kernel: GpuKernel, slots: Sequence[int], device: torch.device) -> Tensor:
    """The table of `plan_on_device` where all experts of a layer are whole in these slots, in order."""
    return torch.tensor([(slot, 0, kernel.blocks) for slot in slots], dtype=torch.int32, device=device)


def tokens_at_once(kernel: GpuKernel, most_pairs: int, limit_bytes: int) -> int:
    """How many tokens of so many pairs each go through at once.

    Theirs are three quarters of the limit with a single block of neurons at a time; the rest is for more blocks.
    """
    token_bytes = kernel.bytes_of_token + most_pairs * (kernel.bytes_of_row + kernel.block * 4)
    return max(1, limit_bytes * 3 // 4 // token_bytes)


def most_tiles(pairs: int, experts: int, rows: int) -> int:
    """How many tiles so many pairs may need, whatever the routing."""
    active = min(pairs, experts)
    return active + (pairs - active) // rows


def _by_one_program(
    kernel: GpuKernel, tokens: range, index: Tensor, weights: Tensor, table: Tensor, counts: Tensor | None
) -> PlanPart:
    """For a decode step, where a dozen operations of torch would take longer than the experts."""
    pairs, experts, device = index.numel(), table.shape[0], index.device
    sizes = tile_sizes(kernel.on_tensor_cores, pairs, min(pairs, experts), len(tokens))
    places = [_places(pairs, least) for least in (0, *sizes[:-1])]
    starts = [0, *accumulate(-(-count // _ALIGN) * _ALIGN for count in places)]
    make = torch.empty if len(sizes) == 1 else torch.zeros  # of the first group all are written
    tiles = make(starts[-1], _TILE_INTS, dtype=torch.int32, device=device)
    pair_token, token_pairs = (torch.empty(pairs, dtype=torch.int32, device=device) for _ in range(2))
    pair_weight = torch.empty(pairs, dtype=torch.float32, device=device)
    kernels = triton_kernels()
    assert kernels is not None
    kernels.choose[(1,)](
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
        starts[1],
        starts[-2],
        K=index.shape[1],
        SMALL=sizes[0],
        MIDDLE=sizes[len(sizes) // 2],
        LARGE=sizes[-1],
        PAIRS=max(kernels.COMPARED.value, 1 << (pairs - 1).bit_length()),
    )
    groups = tuple(
        TileGroup(rows, tiles[at : at + count]) for rows, at, count in zip(sizes, starts, places, strict=False)
    )
    return PlanPart(tokens, groups, pair_token, pair_weight, _starts(tokens, index), token_pairs, kernel.blocks)


def _by_torch(kernel: GpuKernel, tokens: range, index: Tensor, weights: Tensor, table: Tensor) -> PlanPart:
    """Make the plan by torch's operations, all of fixed shape."""
    pairs, experts, k, device = index.numel(), table.shape[0], index.shape[1], index.device
    sizes = tile_sizes(kernel.on_tensor_cores, pairs, min(pairs, experts), len(tokens))
    rows = sizes[-1]
    expert, order = torch.sort(_ours(index, weights, table).flatten(), stable=True)  # [P]
    numbers = torch.arange(max(experts + 1, most_tiles(pairs, experts, rows), pairs), device=device)
    start = torch.searchsorted(expert, numbers[: experts + 1].to(expert.dtype))  # [E + 1]
    ends = ((start.diff() + rows - 1) // rows).cumsum(0)  # [E], tiles up to and with each expert
    tile = numbers[: most_tiles(pairs, experts, rows)]
    owner = torch.searchsorted(ends, tile, right=True)  # [tiles], E for a surplus one
    is_tile, owner = owner < experts, owner.clamp(max=experts - 1)
    stop = start[1:][owner]
    count = (stop - start[owner] + rows - 1) // rows
    first = start[owner] + (tile - ends[owner] + count) * rows
    columns = (*table[owner].unbind(1), first, torch.minimum(first + rows, stop))
    tiles = torch.stack([torch.where(is_tile, column, 0) for column in columns], 1).int()
    place = torch.empty_like(order).scatter_(0, order, numbers[:pairs])  # of each choice among the pairs
    place = place.where(place < start[experts], pairs).view(-1, k).sort(1).values
    return PlanPart(
        tokens,
        _grouped(tiles, sizes, pairs),
        (order // k).int(),
        weights.flatten()[order],
        _starts(tokens, index),
        place.flatten().int(),
        kernel.blocks,
    )


def _grouped(tiles: Tensor, sizes: Sequence[int], pairs: int) -> tuple[TileGroup, ...]:
    """Groups of fixed sizes out of int32 [tiles, 5]."""
    first, count = tiles[:, 3], tiles[:, 4] - tiles[:, 3]
    groups = [TileGroup(sizes[0], tiles.where((count <= sizes[0])[:, None], 0))]
    for least, rows in pairwise(sizes):
        n_tiles = _places(pairs, least)
        place = torch.where(
            (count > least) & (count <= rows), first // (least + 1), n_tiles
        ).long()  # the last: of none
        into = tiles.new_zeros(n_tiles + 1, _TILE_INTS).index_copy_(0, place, tiles)
        groups.append(TileGroup(rows, into[:n_tiles]))
    return tuple(groups)


def _places(pairs: int, least: int) -> int:
    """How many places a group has for tiles of more than `least` pairs.

    A tile whose first pair is p has the place p // (least + 1), which no other has: the next one begins behind its
    pairs.
    """
    return pairs // (least + 1)


def _ours(index: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """The experts that were chosen, E for what is skipped: int64 [T, K]."""
    experts = table.shape[0]
    blocks = torch.cat([table[:, 2], table.new_zeros(1)])  # of each expert, and of none of ours
    inside = index.where((index >= 0) & (index < experts) & (weights != 0), experts)
    return inside.where(blocks[inside] > 0, experts)


def _count(index: Tensor, weights: Tensor, table: Tensor, counts: Tensor) -> None:
    """Add to `counts` as `plan_on_device` says."""
    experts = table.shape[0]
    expert = _ours(index, weights, table).flatten()
    chosen = torch.zeros(experts + 1, dtype=torch.int64, device=index.device).scatter_(0, expert, 1)
    counts += torch.stack([(expert < experts).sum(), chosen[:experts].sum()])


def _starts(tokens: range, index: Tensor) -> Tensor:
    """Where the entries of each token begin, if each has K: int32 [T + 1]."""
    return torch.arange(len(tokens) + 1, dtype=torch.int32, device=index.device) * index.shape[1]


@dataclass(frozen=True, slots=True)
class _Items:
    """Work's slots and blocks, int32 [items] each."""

    slot: NDArray[np.int32]
    first: NDArray[np.int32]
    stop: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class _Draft:
    """A part on the host; its arrays in the order of the part's tensors, first the tiles of each of these groups."""

    tokens: range
    rows: tuple[int, ...]
    arrays: tuple[NDArray[np.int32] | NDArray[np.float32], ...]
    blocks: int


def slot_of(pool: Tensor, packed: Tensor) -> int:
    """Which slot of the pool these bytes are."""
    offset = packed.data_ptr() - pool.data_ptr()
    slot, rest = divmod(offset, pool.stride(0))
    if rest or not 0 <= slot < pool.shape[0]:
        raise ValueError(f"packed bytes that are {offset} bytes from the pool's start are in none of its slots")
    return slot


def _draft(
    kernel: GpuKernel,
    tokens: range,
    items: _Items,
    item: NDArray[np.int64],
    token: NDArray[np.int64],
    weight: NDArray[np.float32],
) -> _Draft:
    """item, token, weight: [P], sorted by item."""
    counts = np.bincount(item, minlength=len(items.slot))
    sizes = tile_sizes(kernel.on_tensor_cores, len(item), int((counts > 0).sum()), int(counts.max(initial=0)))
    rows = sizes[-1]
    tile_counts = -(-counts // rows)
    owner = np.repeat(np.arange(len(counts)), tile_counts)
    number = np.arange(len(owner)) - (tile_counts.cumsum() - tile_counts)[owner]
    starts = counts.cumsum() - counts
    first = starts[owner] + number * rows
    stop = np.minimum(first + rows, (starts + counts)[owner])
    blocks = items.stop - items.first
    tiles = np.stack([items.slot[owner], items.first[owner], blocks[owner], first, stop], 1).astype(np.int32)
    token_start = np.zeros(len(tokens) + 1, np.int32)
    np.cumsum(np.bincount(token, minlength=len(tokens)), out=token_start[1:])
    by_token = np.argsort(token, kind="stable").astype(np.int32)
    number = np.searchsorted(sizes, stop - first)  # of each tile's group
    groups = [tiles[number == i] for i in range(len(sizes)) if i in number]
    found = tuple(size for i, size in enumerate(sizes) if i in number)
    arrays = (*groups, token.astype(np.int32), weight.astype(np.float32), token_start, by_token)
    return _Draft(tokens, found, arrays, int(blocks[owner].max(initial=0)))


def _send(drafts: Sequence[_Draft], device: torch.device) -> tuple[PlanPart, ...]:
    """All arrays in one tensor, and their views on the device."""
    flat = [array.reshape(-1).view(np.int32) for draft in drafts for array in draft.arrays]
    padded = [np.pad(array, (0, -len(array) % _ALIGN)) for array in flat]
    host = torch.from_numpy(np.concatenate(padded)) if padded else torch.empty(0, dtype=torch.int32)
    there = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
    split = there.split([len(p) for p in padded])
    views = iter([view[: len(array)] for view, array in zip(split, flat, strict=True)])
    parts = []
    for draft in drafts:
        groups = tuple(TileGroup(rows, next(views).view(-1, _TILE_INTS)) for rows in draft.rows)
        token, weight, start, pairs = (next(views) for _ in range(4))
        parts.append(PlanPart(draft.tokens, groups, token, weight.view(torch.float32), start, pairs, draft.blocks))
    return tuple(parts)
