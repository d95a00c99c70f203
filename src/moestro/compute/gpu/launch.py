"""Launches the kernels of a layer step, part by part, within a bounded workspace.

Tile sizes and the number of splits were chosen by arithmetic; no GPU has run them yet.

Legend: T tokens, D model width, P pairs of a token and an expert, S splits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .kernel import ENOUGH_PROGRAMS, SUM_BYTES, WORKSPACE_BYTES, GpuKernel, triton_kernels
from .panels import CHUNK, PanelSpec
from .plan import Plan, PlanPart

_ALIGN_BYTES = 256
_COMBINED = 512  # columns of one program
_MANY_LOADS = 4
_LARGE = 16
TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Tiling(NamedTuple):
    """How a matrix product is cut: rows of gate and up, and of down, of a program; its warps and pipeline stages."""

    gate_up: int
    down: int
    warps: int
    stages: int


# By pairs of a tile. Compiled for 7.5, 8.6 and 8.9, no format takes more shared memory than these have (64, 99 KiB).
TILINGS = {
    4: Tiling(32, 32, 4, 2),
    16: Tiling(32, 32, 4, 4),
    32: Tiling(32, 32, 4, 3),
    64: Tiling(64, 64, 4, 3),
    128: Tiling(64, 64, 8, 3),
}


def warps_of(rows: int, on_tensor_cores: bool) -> int:
    """A tiling's; without tensor cores sums of large tiles need the registers of more."""
    warps = TILINGS[rows].warps
    return warps if on_tensor_cores or rows < _LARGE else max(warps, 8)


def pipeline_stages(tiling: Tiling, *matrices: PanelSpec) -> int:
    """A tiling's, but for one where a stage loads many words, or activations in two orders: shared memory is short."""
    is_large = max(matrix.loads for matrix in matrices) >= _MANY_LOADS or len({m.order for m in matrices}) > 1
    return max(2, tiling.stages - is_large)


class _Workspace(NamedTuple):
    """What stands between the kernels of one part, and where it begins, in bytes."""

    run_blocks: int  # blocks of neurons that are joined before `down` takes them
    splits: int
    sums_at: int
    joined_at: int
    rows_at: int
    size_bytes: int


def workspace_bytes(kernel: GpuKernel, plan: Plan) -> int:
    """Bytes that `run_grouped` needs for a plan.

    No more than the plan's limit, unless a single token's pairs with one block of neurons each take more.
    """
    return max((_workspace(kernel, part, plan.limit_bytes).size_bytes for part in plan.parts), default=0)


def workspace_at_most(kernel: GpuKernel, tokens: int) -> int:
    """Bytes that no plan for so many tokens exceeds, each of up to 16 experts."""
    pairs = 16 * tokens
    all_at_once = tokens * kernel.bytes_of_token + pairs * (
        kernel.segments * kernel.bytes_of_row + kernel.blocks * kernel.block * 4
    )
    return min(WORKSPACE_BYTES, all_at_once + 8 * _ALIGN_BYTES)


def run_grouped(
    kernel: GpuKernel,
    pool: Tensor,
    plan: Plan,
    x: Tensor,
    out: Tensor,
    *,
    add: bool = True,
    workspace: Tensor | None = None,
) -> None:
    """Compute a plan: each token's experts, weighted and summed. Bit for bit the same in every run.

    Args:
        pool: uint8 [slots, slot_bytes], slot_bytes a multiple of 64.
        x: hidden states [T, D], float16, bfloat16 or float32, as `kernel_of` was told.
        out: float32 [T, D], contiguous; added to, or else written.
        workspace: uint8 [workspace_bytes or more]; allocated unless given. Its contents do not matter.
    """
    size_bytes = workspace_bytes(kernel, plan)
    if workspace is None:
        workspace = torch.empty(size_bytes, dtype=torch.uint8, device=pool.device)
    if workspace.numel() < size_bytes:
        raise ValueError(f"a workspace of {workspace.numel()} bytes for a plan that needs {size_bytes}")
    if pool.stride(0) % 64 or not out.is_contiguous():
        raise ValueError(f"slots of {pool.stride(0)} bytes, out of strides {out.stride()}: not as they must be")
    x = x.contiguous()
    for part in plan.parts:
        tokens = slice(part.tokens.start, part.tokens.stop)
        _run_part(kernel, pool, part, x[tokens], out[tokens], add, workspace, plan.limit_bytes)


def _workspace(kernel: GpuKernel, part: PlanPart, limit_bytes: int) -> _Workspace:
    pairs, tokens = part.pair_token.shape[0], len(part.tokens)
    chunks = tokens * kernel.orders * kernel.chunks
    sums_at = _aligned(chunks * CHUNK * TORCH_DTYPES[kernel.dtype].itemsize)
    joined_at = sums_at + _aligned(chunks * SUM_BYTES)
    rows_bytes = _aligned(pairs * kernel.bytes_of_row)
    block_bytes = max(1, pairs) * kernel.block * 4  # of each block of neurons
    room = limit_bytes - joined_at - rows_bytes - _ALIGN_BYTES
    run_blocks = max(1, min(part.blocks, room // block_bytes))
    splits = 1
    if run_blocks >= part.blocks:
        programs = sum(len(tiles) * -(-kernel.hidden // TILINGS[rows].down) for rows, tiles in part.groups)
        room -= part.blocks * block_bytes + (kernel.segments - 1) * rows_bytes
        splits = kernel.segments if programs < ENOUGH_PROGRAMS and room >= 0 else 1
    rows_at = joined_at + _aligned(run_blocks * block_bytes)
    return _Workspace(run_blocks, splits, sums_at, joined_at, rows_at, rows_at + splits * rows_bytes)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGN_BYTES) * _ALIGN_BYTES


def _run_part(
    kernel: GpuKernel,
    pool: Tensor,
    part: PlanPart,
    x: Tensor,
    out: Tensor,
    add: bool,
    workspace: Tensor,
    limit_bytes: int,
) -> None:
    kernels = triton_kernels()
    assert kernels is not None
    pairs, tokens = part.pair_token.shape[0], len(part.tokens)
    space = _workspace(kernel, part, limit_bytes)
    ordered = workspace[: space.sums_at].view(TORCH_DTYPES[kernel.dtype])
    sums = workspace[space.sums_at : space.joined_at].view(torch.float32)
    joined = workspace[space.joined_at : space.rows_at].view(torch.float32)
    rows = workspace[space.rows_at : space.size_bytes].view(torch.float32)
    slots = tuple(pool.view(dtype) for dtype in (torch.int32, torch.int16, torch.uint8))
    groups = [group for group in part.groups if len(group.tiles)]
    if groups:
        _order(kernel, x, ordered, sums)
    for first in range(0, part.blocks, space.run_blocks):
        run = (pool.stride(0) // 4, first, space.run_blocks, kernel)
        for group, tiles in groups:
            neurons = kernel.block // TILINGS[group].gate_up
            kernels.gate_up[len(tiles), space.run_blocks * neurons](
                ordered, sums, *slots, tiles, part.pair_token, joined, *run, **_gate_up_options(kernel, group)
            )
        for group, tiles in groups:
            columns = -(-kernel.hidden // TILINGS[group].down)
            kernels.down[len(tiles), columns, space.splits](
                joined, *slots, tiles, rows, pairs, *run, **_down_options(kernel, group)
            )
    kernels.combine[(tokens, -(-kernel.hidden // _COMBINED))](
        rows,
        part.pair_weight,
        part.token_start,
        part.token_pairs,
        out,
        pairs,
        space.splits,
        kernel,
        ADD=add,
        N=_COMBINED,
    )


def _gate_up_options(kernel: GpuKernel, rows: int) -> dict[str, int]:
    """What `gate_up` is compiled for, for tiles of so many rows."""
    tiling = TILINGS[rows]
    stages = 2 if kernel.dtype == "fp32" else pipeline_stages(tiling, kernel.gate_matrix, kernel.up_matrix)
    warps = warps_of(rows, kernel.on_tensor_cores[0])
    return {"M": rows, "N": tiling.gate_up, "num_warps": warps, "num_stages": stages}


def _down_options(kernel: GpuKernel, rows: int) -> dict[str, int]:
    """As `_gate_up_options`."""
    tiling = TILINGS[rows]
    stages = 2 if kernel.down_is_fp32 else pipeline_stages(tiling, kernel.down_matrix)
    warps = warps_of(rows, kernel.on_tensor_cores[1])
    return {"M": rows, "N": tiling.down, "num_warps": warps, "num_stages": stages}


def _order(kernel: GpuKernel, x: Tensor, ordered: Tensor, sums: Tensor) -> None:
    """Write hidden states [T, D] down in the order, or the two orders, of gate and up."""
    kernels = triton_kernels()
    assert kernels is not None
    up, gate = kernel.up_matrix, kernel.gate_matrix
    matrices = [(up, kernel.either_has_addend)]
    if kernel.orders == 2:
        matrices = [(gate, gate.has_addend), (up, up.has_addend)]
    grid = len(x), -(-kernel.chunks // kernels.CHUNKS_AT_ONCE.value)
    for number, (matrix, has_addend) in enumerate(matrices):
        kernels.order[grid](x, ordered, sums, kernel.hidden, number, kernel.orders, matrix, has_addend)
