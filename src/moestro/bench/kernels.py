"""Time the CPU kernels beside the limits of this machine, all in one process and in turns.

The read limit is the best of plain, prefetching and four-stream summing loops at 1..N threads over at least 4 GiB. The
compute limit is that of a loop of multiply-adds in registers: of floats (FMA), or of integers, which codes meet. Each
round finds the best loops and then measures every row once, with a read of all memory between two rows. A figure is
the median of the rounds; a row's share is taken of the better of the reads before and after it. Weights rotate over at
least 8 last-level caches, so that none are read from a cache. A share above 1 means that the measurement failed.

    moestro bench kernels --json
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from ..compute.cpu import PREFETCH_FLOATS, CpuExperts, best_level, core_cpus, dot_gflops, fma_gflops, read_gbps
from ..compute.experts import ExpertMath, ExpertWork
from ..console import print_table
from ..machine.kernel_rates import CACHES, plausible_weights, torch_threads
from ..machine.probe import available_ram_bytes, cpu_model, last_level_cache_bytes
from ..memory.formats import FLOAT_FORMATS, ExpertShape, format_asked_for
from ..planning.budget import check_ram
from ..planning.shapes import REAL_SHAPES, spec_of_shape, top_k_of_shape
from .report import Report, check_kernels

READ_BYTES = 4 * 2**30
CALL_BYTES = 2**28  # bytes that the timed calls of a row read with one token
MEASURED = ("fp32", "fp16", "bf16", "int8", "int4")  # where no format is named
TOKENS, FULL_TOKENS = (1, 64), (1, 4, 16, 64, 256)
ROUNDS, FULL_ROUNDS = 3, 5


class MoeLayer(NamedTuple):
    """One layer: an expert's shape, how many experts there are and how many a token is routed to."""

    expert: ExpertShape
    experts: int
    top_k: int


def moe_layer(name: str) -> MoeLayer:
    """A layer of the shape of that name.

    Raises:
        RequestError: there is no such shape.
    """
    layer = spec_of_shape(name).layers[0]
    return MoeLayer(ExpertShape(layer.hidden, layer.neurons), layer.experts, top_k_of_shape(name))


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One case: each of top-k experts computes `tokens` tokens. share, compute_share: of the two limits."""

    shape: str
    format: str
    tokens: int
    gbps: float
    gflops: float
    share: float
    compute_share: float


@dataclass(frozen=True, slots=True)
class KernelReport(Report):
    """The limits and the rows of one run."""

    read_limit_gbps: float
    fma_limit_gflops: float
    integer_limit_gflops: float
    rows: tuple[KernelRow, ...]
    level: str
    threads: int

    def print(self) -> None:
        """Print the limits and a table of the rows."""
        print(f"{cpu_model()}, {self.level}, {self.threads} threads")
        limits = (
            f"FMA limit {self.fma_limit_gflops:.0f} GFLOP/s   integer limit {self.integer_limit_gflops:.0f} GFLOP/s"
        )
        print(f"read limit {self.read_limit_gbps:.1f} GB/s   {limits}")
        rows = []
        for row in self.rows:
            speeds = (f"{row.gbps:.2f}", f"{row.share:.2f}", f"{row.gflops:.1f}", f"{row.compute_share:.2f}")
            rows.append((row.shape, row.format, str(row.tokens), *speeds))
        print_table(("shape", "format", "tokens", "GB/s", "of read limit", "GFLOP/s", "of compute limit"), rows)


def measure_kernels(
    *,
    shapes: Sequence[str] = REAL_SHAPES,
    formats: Sequence[str] = MEASURED,
    tokens: Sequence[int] | None = None,
    rounds: int = ROUNDS,
    read_bytes: int = READ_BYTES,
    threads: int | None = None,
) -> KernelReport:
    """Measure formats at the given shapes and tokens; without them at all real shapes and the few `TOKENS`.

    Raises:
        RequestError: no kernels were built, or no such shape or format.
        BudgetError: too little RAM for weights that no cache holds.
    """
    check_kernels()
    for name in shapes:
        moe_layer(name)  # refused before the work
    for name in formats:
        format_asked_for(name)
    size_bytes = max(read_bytes, CACHES * last_level_cache_bytes()) if read_bytes == READ_BYTES else read_bytes
    check_ram("weights that no cache holds", size_bytes, 0.8 * available_ram_bytes(), "free some")
    memory = plausible_weights(size_bytes)
    count = threads or len(core_cpus())
    cases = list(product(shapes, formats, tokens or TOKENS))
    with torch_threads(1):
        return _measure_rounds(cases, memory, rounds, count)


def _measure_rounds(cases: Sequence[tuple[str, str, int]], memory: Tensor, rounds: int, count: int) -> KernelReport:
    reads, fmas, dots = [], [], []
    speeds: dict[tuple[str, str, int], list[tuple[float, float, float, float]]] = {case: [] for case in cases}
    position = 0
    for _ in range(rounds):
        loops = [(n, ahead) for n in range(1, count + 1) for ahead in PREFETCH_FLOATS]
        scanned = {loop: read_gbps(memory, *loop) for loop in loops}
        best = max(scanned, key=lambda loop: scanned[loop])
        reads.append(scanned[best])
        fmas.append(max(fma_gflops(count) for _ in range(3)))
        dots.append(max(dot_gflops(count) for _ in range(3)))
        for case in cases:
            gbps, gflops, position = _measure_case(case, memory, position, count)
            reads.append(read_gbps(memory, *best))
            # The machine's speed drifts, so a row is compared with the reads right before and after it.
            matrices = format_asked_for(case[1]).matrices.values()
            compute = dots[-1] if all(one.meets_integers for one in matrices) else fmas[-1]
            speeds[case].append((gbps, gflops, gbps / max(reads[-2:]), gflops / compute))
    rows = tuple(KernelRow(*case, *(median(column) for column in zip(*speeds[case], strict=True))) for case in cases)
    return KernelReport(median(reads), median(fmas), median(dots), rows, best_level(), count)


def _measure_case(case: tuple[str, str, int], memory: Tensor, position: int, threads: int) -> tuple[float, float, int]:
    """Time calls that follow one another, as layers do.

    Returns:
        GB/s of weights, GFLOP/s, and the position in bytes where the next case continues in `memory`.
    """
    name, format_name, tokens = case
    shape, _, top_k = moe_layer(name)
    math = ExpertMath(shape, format_asked_for(format_name), swiglu)
    size = math.format.expert_bytes(shape)
    data = memory.view(torch.uint8)
    x = torch.randn(tokens, shape.hidden).to(hidden_dtype(format_name))
    rows, weights = torch.arange(tokens), torch.rand(tokens)
    out = torch.zeros(tokens, shape.hidden)
    # A single short call would time how threads wake, so several follow one another, fewer where there are many tokens.
    calls = max(1, CALL_BYTES // (top_k * size * tokens))
    steps: list[list[ExpertWork]] = []
    for _ in range(calls):
        steps.append([])
        for _ in range(top_k):
            position = position if position + size <= data.numel() else 0
            steps[-1].append(ExpertWork(data[position : position + size], range(shape.neurons), rows, weights))
            position += size
    experts = CpuExperts(threads)
    assert experts.kernel(math) is not None
    start_s = perf_counter()
    for work in steps:
        experts.run(math, x, work, out)
    seconds = (perf_counter() - start_s) / calls
    operations = 6 * tokens * top_k * shape.hidden * shape.neurons  # three matrices, a multiply and an add each
    return top_k * size / seconds / 1e9, operations / seconds / 1e9, position


def hidden_dtype(format_name: str) -> torch.dtype:
    """The dtype of hidden states of a model whose weights are in that format."""
    return next((dtype for dtype, name in FLOAT_FORMATS.items() if name == format_name), torch.bfloat16)


def swiglu(gate: Tensor | None, up: Tensor) -> Tensor:
    """The activation of all shapes' families: silu(gate) * up, both [tokens, neurons]."""
    assert gate is not None
    return torch.nn.functional.silu(gate) * up
