"""Time attention over long caches beside the limits of this machine, and a prompt's also in torch, in turns.

A row is one layer's attention of some queries, one token each, over keys and values that lie in memory: 16 queries
and fewer are a step, more are a chunk of a prompt, whose tokens see all that was there and themselves. The limit is
what takes longer: reading the cache once, or the multiply-adds of scores and of weighted values. Right before and
after each case both limits are measured, and its share is of the better ones; a figure is the median of the rounds.

    moestro bench attention --json
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..compute.cpu import best_level, core_cpus, fma_gflops, read_limit_gbps
from ..console import print_table
from ..errors import RequestError
from ..machine.kernel_rates import CACHES, attention_of, plausible_weights, torch_threads
from ..machine.probe import available_ram_bytes, cpu_model, last_level_cache_bytes
from ..memory.formats import FLOAT_FORMATS
from ..planning.budget import check_ram
from ..planning.shapes import ATTENTION_SHAPES, shape_named
from .report import Report, check_kernels

DTYPES = ("bf16", "fp32")
CACHED, QUERIES = (4096, 16384), (1, 4, 16, 512)
ROUNDS, MEMORY_BYTES = 3, 2**30
CALL_S = 0.1  # for which a case is timed at least
MOST_STEP = 16  # queries; a prompt has more


class Heads(NamedTuple):
    """Query heads, key heads, and how wide each is."""

    queries: int
    keys: int
    width: int


class Case(NamedTuple):
    """So many queries over so many cached tokens, which include their own."""

    shape: str
    dtype: str
    cached: int
    queries: int


@dataclass(frozen=True, slots=True)
class AttentionRow:
    """One case. share: of the limit. limited_by: bytes or operations. torch_gflops: of torch's, for a prompt."""

    shape: str
    dtype: str
    cached: int
    queries: int
    gbps: float
    gflops: float
    share: float
    limited_by: str
    torch_gflops: float | None


@dataclass(frozen=True, slots=True)
class AttentionReport(Report):
    """The limits and the rows of one run."""

    read_limit_gbps: float
    fma_limit_gflops: float
    rows: tuple[AttentionRow, ...]
    level: str
    threads: int

    def print(self) -> None:
        """Print the limits and a table of the rows."""
        print(f"{cpu_model()}, {self.level}, {self.threads} threads")
        print(f"read limit {self.read_limit_gbps:.1f} GB/s   FMA limit {self.fma_limit_gflops:.0f} GFLOP/s")
        columns = ("heads of", "cache", "cached", "queries", "GB/s", "GFLOP/s", "of the limit", "limit is", "torch")
        rows = []
        for row in self.rows:
            torch_gflops = "-" if row.torch_gflops is None else f"{row.torch_gflops:.1f}"
            sizes = (row.shape, row.dtype, str(row.cached), str(row.queries))
            rows.append(
                (*sizes, f"{row.gbps:.2f}", f"{row.gflops:.1f}", f"{row.share:.2f}", row.limited_by, torch_gflops)
            )
        print_table(columns, rows)


def heads_of(shape: str) -> Heads:
    """The attention heads of a model's shape.

    Raises:
        RequestError: there is no such shape, or its keys and values are latent, which these kernels do not read.
    """
    found = shape_named(shape)
    if "kv_lora_rank" in found:
        raise RequestError(f"{shape} keeps latent keys and values, which these kernels do not read; take another shape")
    queries, keys = found["num_attention_heads"], found["num_key_value_heads"]
    return Heads(queries, keys, found.get("head_dim", found["hidden_size"] // queries))


def measure_attention(
    *,
    shapes: Sequence[str] = ATTENTION_SHAPES,
    dtypes: Sequence[str] = DTYPES,
    cached: Sequence[int] = CACHED,
    queries: Sequence[int] = QUERIES,
    rounds: int = ROUNDS,
    memory_bytes: int = MEMORY_BYTES,
    threads: int | None = None,
) -> AttentionReport:
    """Measure attention at the heads of the given shapes.

    Args:
        dtypes: of the cache and of the queries: fp32, fp16, bf16. cached: tokens in the cache, with the queries' own.
        memory_bytes: of caches in all, which the calls of a case go through in turns.

    Raises:
        RequestError: no kernels were built, no such shape or dtype, or more queries than cached tokens.
        BudgetError: too little RAM for caches that no processor's cache holds.
    """
    check_kernels()
    cases = [Case(*each) for each in product(shapes, dtypes, cached, queries)]
    largest = max(_checked(case) for case in cases)
    size = max(memory_bytes, 2 * largest)
    if memory_bytes == MEMORY_BYTES:
        size = max(size, CACHES * last_level_cache_bytes())
    check_ram("caches that the processor's own do not hold", size, 0.8 * available_ram_bytes(), "free some")
    memory = plausible_weights(size)
    count = threads or len(core_cpus())
    with torch_threads(1):
        return _measure_rounds(cases, memory, rounds, count)


def _checked(case: Case) -> int:
    """The bytes of a case's cache."""
    if case.dtype not in FLOAT_FORMATS.values():
        raise RequestError(
            f"--kv-dtype {case.dtype}: no cache is of that; there are: {', '.join(FLOAT_FORMATS.values())}"
        )
    if case.queries > case.cached:
        raise RequestError(
            f"{case.queries} queries are more than the {case.cached} cached tokens, which include theirs"
        )
    return _cache_bytes(case)


def _dtype(case: Case) -> torch.dtype:
    return next(dtype for dtype, name in FLOAT_FORMATS.items() if name == case.dtype)


def _cache_bytes(case: Case) -> int:
    heads = heads_of(case.shape)
    return 2 * heads.keys * case.cached * heads.width * _dtype(case).itemsize


def _operations(case: Case) -> int:
    """A multiply and an add for each number of a key and of a value that a query sees."""
    heads, own = heads_of(case.shape), case.queries
    seen = own * (case.cached - own) + own * (own + 1) // 2
    return 4 * seen * heads.queries * heads.width


class _Figures(NamedTuple):
    seconds: float
    torch_seconds: float | None
    limit_s: float
    by_bytes: bool


def _measure_rounds(cases: Sequence[Case], memory: Tensor, rounds: int, count: int) -> AttentionReport:
    reads: list[float] = []
    fmas: list[float] = []
    found: dict[Case, list[_Figures]] = {case: [] for case in cases}

    def limits() -> None:
        reads.append(read_limit_gbps(memory, count))
        fmas.append(fma_gflops(count))

    for _ in range(rounds):
        limits()
        for case in cases:
            seconds, torch_seconds = _measure_case(case, memory, count)
            limits()
            read_s = _cache_bytes(case) / max(reads[-2:]) / 1e9
            operate_s = _operations(case) / max(fmas[-2:]) / 1e9
            found[case].append(_Figures(seconds, torch_seconds, max(read_s, operate_s), read_s > operate_s))
    rows = tuple(_row(case, turns) for case, turns in found.items())
    return AttentionReport(median(reads), median(fmas), rows, best_level(), count)


def _row(case: Case, turns: Sequence[_Figures]) -> AttentionRow:
    seconds = median(turn.seconds for turn in turns)
    in_torch = [turn.torch_seconds for turn in turns if turn.torch_seconds is not None]
    return AttentionRow(
        *case,
        _cache_bytes(case) / seconds / 1e9,
        _operations(case) / seconds / 1e9,
        median(turn.limit_s / turn.seconds for turn in turns),
        "bytes" if median(turn.by_bytes for turn in turns) else "operations",
        _operations(case) / median(in_torch) / 1e9 if in_torch else None,
    )


def _measure_case(case: Case, memory: Tensor, threads: int) -> tuple[float, float | None]:
    """Seconds of a call here, and for a prompt in torch; each call takes the next cache in memory."""
    heads, dtype = heads_of(case.shape), _dtype(case)
    sizes = (2, 1, heads.keys, case.cached, heads.width)
    one = _cache_bytes(case) // dtype.itemsize
    flat = memory.view(dtype)
    caches = [flat[at : at + one].view(sizes) for at in range(0, flat.numel() - one + 1, one)]
    query = torch.randn(case.queries, heads.queries * heads.width).to(dtype)
    kernel = attention_of(*heads, dtype, threads)
    seconds = _timed(lambda at: kernel.attend(query, *caches[at % len(caches)]))
    if case.queries <= MOST_STEP:
        return seconds, None
    mask = torch.ones(case.queries, case.cached, dtype=torch.bool).tril(case.cached - case.queries)[None, None]
    by_heads = query.view(1, case.queries, heads.queries, heads.width).transpose(1, 2)
    grouped = heads.queries != heads.keys

    def in_torch(at: int) -> None:
        keys, values = caches[at % len(caches)]
        scaled_dot_product_attention(by_heads, keys, values, attn_mask=mask, enable_gqa=grouped)

    torch.set_num_threads(threads)
    try:
        return seconds, _timed(in_torch)
    finally:
        torch.set_num_threads(1)


def _timed(call: Callable[[int], object]) -> float:
    call(0)
    start_s, calls = perf_counter(), 0
    while (passed_s := perf_counter() - start_s) < CALL_S or calls < 1:
        calls += 1
        call(calls)
    return passed_s / calls
