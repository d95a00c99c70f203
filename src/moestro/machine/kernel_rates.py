"""Measures what the CPU's kernels reach here: experts and other products by format and tokens, and attention.

Weights rotate over two last-level caches and more, so that none are read from a cache; they are of the size of a real
model's, since a CPU is slow with what is smaller than its normal numbers. All is measured twice, each time in turns. A
figure is the second best of these: neighbours on a shared machine come and go, and only ever slow it down.

Legend: D model width, F expert hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from ..compute.cpu import PREFETCH_FLOATS, CpuExperts, Matrix, fma_gflops, levels, read_gbps, run_linear
from ..compute.experts import ExpertMath, ExpertWork
from ..compute.few_tokens import StepAttention
from ..errors import RequestError
from ..memory.formats import MATRIX_FORMATS, ExpertShape, format_asked_for, format_named
from ..memory.random_bytes import random_experts, random_panels
from ..planning.budget import check_ram
from ..planning.rates import COUNTS, MEASURED, NEURONS, WIDE_LEAST, WIDE_NEURONS, Curve, filled_up
from .probe import available_ram_bytes, last_level_cache_bytes

PASSES, TURNS = 2, 2  # over all formats, and each time over the cases of a format
CACHES = 8  # last-level caches that benchmarks rotate weights over
_CACHES, _MOST_CACHES, _ENOUGH_BYTES = 2, 8, 512 * 2**20  # here: two at least, and more up to so many bytes
_LEAST_BYTES, _RAM_SHARE = 384 * 2**20, 0.25
_CASE_S, _ENOUGH_S = 0.015, 0.3  # for which a case is timed at least in each turn, and in all, where its calls are long
_HIDDEN = 2048  # OLMoE's
# Tokens of each, from which on a call has so many experts. With one token calls are long, as is that of a head: what a
# call takes beside its weights is in the time of a layer (loading/step_times.py).
_EXPERTS = ((1, 32), (4, 8), (64, 2))
_SPREAD = 8  # tokens of a step for each token of an expert, as with 64 experts of which 8 are chosen
_COLUMNS = 2048
_DENSE_ROWS = {1: 65536, 256: 4096}  # by tokens
_FEW_ROWS = 256  # whose panels are repeated
_BOUND = 0.02  # of random weights
_QUERY_HEADS, _KEY_HEADS, _WIDTH = 32, 8, 128
_CACHED, _PROMPT = 4096, 512
Call = Callable[[], float]  # computes once, and returns how many bytes or operations that were


class Case(NamedTuple):
    """What is measured: kind, format and tokens; both are empty where they mean nothing."""

    kind: str
    format: str = ""
    tokens: int = 0


class Sample(NamedTuple):
    """What calls of a case did: bytes or operations, and in how many seconds."""

    done: float
    seconds: float


@dataclass(frozen=True, slots=True)
class KernelRates:
    """What was measured of the CPU: GB/s and GFLOP/s."""

    cpu_gbps: float
    cpu_gflops: float
    experts: tuple[Curve, ...]
    wide_experts: tuple[Curve, ...]
    dense: tuple[Curve, ...]
    attention_gbps: float
    attention_gflops: float
    plain_attention_gbps: float
    plain_attention_gflops: float


def measure_kernel_rates(
    threads: int,
    *,
    formats: Sequence[str] = MEASURED,
    counts: Sequence[int] = COUNTS,
    turns: int = TURNS,
    case_s: float = _CASE_S,
    size_bytes: int | None = None,
    on_progress: Callable[[float], None] = lambda share: None,
) -> KernelRates:
    """Measure all cases in turns.

    Args:
        case_s: seconds that each case takes at least, in each turn.
        size_bytes: of the memory that weights rotate over; None for as much as no cache holds.
        on_progress: told which share of the work is done.

    Raises:
        RequestError: this package was built without its kernels. BudgetError: too little RAM.
    """
    if not levels():
        raise RequestError("this package was built without its kernels; install it where a C++ compiler is")
    memory = torch.empty(_size_bytes() if size_bytes is None else size_bytes, dtype=torch.uint8)
    samples: dict[Case, list[Sample]] = {}
    groups: list[Callable[[], dict[Case, Call]]] = [partial(_limits, memory, threads)]
    for name in formats:
        expert, panels = _expert(name), random_panels(format_named(name), _FEW_ROWS, _COLUMNS, _BOUND)
        many = [tokens for tokens in counts if tokens >= WIDE_LEAST]
        groups += [
            partial(_experts, memory, name, expert, counts, threads),
            partial(_experts, memory, name, expert, many, threads, WIDE_NEURONS),
            partial(_dense, memory, name, panels, counts, threads),
        ]
    with torch_threads(1):
        for number, group in enumerate(groups * PASSES):
            calls = group()
            for _ in range(turns):
                _take_turn(calls, case_s, samples)
            on_progress((number + 1) / len(groups) / PASSES)
    rates = {case: sorted(one.done / one.seconds for one in taken)[-2:][0] / 1e9 for case, taken in samples.items()}

    def curve(kind: str, name: str) -> Curve:
        return Curve(name, tuple((of.tokens, rates[of]) for of in rates if (of.kind, of.format) == (kind, name)))

    narrow, wide, dense = ([curve(kind, name) for name in formats] for kind in ("experts", "wide", "dense"))
    names = ("attention_gbps", "attention_gflops", "plain_attention_gbps", "plain_attention_gflops")
    return KernelRates(
        max(rates[case] for case in rates if case.kind == "read"),
        rates[Case("fma")],
        tuple(narrow),
        filled_up(narrow, wide),
        tuple(dense),
        **{name: rates[Case(name)] for name in names},
    )


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Have torch compute on so many threads inside the block: its idle ones would spin on cores that are measured."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def plausible_weights(size_bytes: int) -> Tensor:
    """Memory that holds weights whichever float format it is read in: no zeros, no denormals, nothing infinite.

    Each 16 bits are a sign, the exponent bits 0x3C00 and 8 random bits: 0.008 to 0.03 in bf16 and fp32, 1 to 1.25 in
    fp16.

    Returns:
        float32 [size_bytes // 4].
    """
    memory = torch.empty(size_bytes // 4, dtype=torch.float32)
    fill_plausibly(memory)
    return memory


def fill_plausibly(memory: Tensor) -> None:
    """As `plausible_weights`, in memory that is there: float32."""
    bits = torch.randint(0, 2**9, (4 * 2**20,), dtype=torch.int16)  # 8 MiB, repeated
    piece = (bits & 0xFF) + 0x3C00 - (bits >> 8) * 2**15
    flat = memory.view(torch.int16)
    for start in range(0, flat.numel(), piece.numel()):
        part = flat[start : start + piece.numel()]
        part.copy_(piece[: part.numel()])


def attention_of(queries: int, keys: int, width: int, dtype: torch.dtype, threads: int) -> StepAttention:
    """Attention with so many query and key heads of a width; its projections are not used."""
    fmt, columns = MATRIX_FORMATS["fp32"], 16

    def projection(count: int) -> Matrix:
        rows = count * width
        return Matrix(torch.zeros(fmt.matrix_bytes(rows, columns), dtype=torch.uint8), fmt, rows, columns)

    parts = (projection(queries), projection(keys), projection(keys))
    return StepAttention(parts, (None, None), head=width, scaling=width**-0.5, dtype=dtype, threads=threads)


def memory_bytes() -> int:
    """What weights rotate over, without regard to what is free."""
    cache_bytes = last_level_cache_bytes()
    return max(_LEAST_BYTES, _CACHES * cache_bytes, min(_MOST_CACHES * cache_bytes, _ENOUGH_BYTES))


def _size_bytes() -> int:
    free_bytes = available_ram_bytes() * _RAM_SHARE
    check_ram("memory to measure this machine with", 4 * _LEAST_BYTES, 4 * free_bytes, "free some")
    return int(min(memory_bytes(), free_bytes)) // 64 * 64


def _take_turn(calls: dict[Case, Call], case_s: float, samples: dict[Case, list[Sample]]) -> None:
    """Time each case once more, unless its calls have taken long enough in all."""
    for case, call in calls.items():
        taken = samples.setdefault(case, [])
        if sum(one.seconds for one in taken) < _ENOUGH_S:
            taken.append(_timed(call, case_s))


def _timed(call: Call, least_s: float) -> Sample:
    start_s = perf_counter()
    done = call()
    while (passed_s := perf_counter() - start_s) < least_s:
        done += call()
    return Sample(done, passed_s)


def _limits(memory: Tensor, threads: int) -> dict[Case, Call]:
    """What this machine reads and multiplies at most, and attention, in memory of plausible floats."""
    floats = memory.view(torch.float32)
    fill_plausibly(floats)
    calls: dict[Case, Call] = {}
    for ahead in PREFETCH_FLOATS:
        calls[Case("read", str(ahead))] = partial(_read, floats, threads, ahead)
    calls[Case("fma")] = partial(_multiply, threads)
    return calls | _attention_calls(floats, threads)


def _read(memory: Tensor, threads: int, ahead: int) -> float:
    read_gbps(memory, threads, ahead)
    return float(memory.nbytes)


def _multiply(threads: int) -> float:
    """How many operations that were, by the loop's own clock."""
    start_s = perf_counter()
    gflops = fma_gflops(threads)
    return gflops * 1e9 * (perf_counter() - start_s)


def _experts(
    memory: Tensor, name: str, expert: Tensor, counts: Sequence[int], threads: int, neurons: int = NEURONS
) -> dict[Case, Call]:
    """Experts in a format, by tokens. All of the memory holds copies of one; wide ones repeat that one's blocks."""
    shape = ExpertShape(_HIDDEN, neurons)
    math, experts = ExpertMath(shape, format_asked_for(name), _swiglu), CpuExperts(threads)
    one = expert.repeat(neurons // NEURONS)
    if len(one) != math.format.expert_bytes(shape):  # whose experts have more than blocks
        one = _expert(name, neurons)
    pieces = _filled(memory, one, threads)

    def call_of(tokens: int) -> Call:
        total = tokens if tokens == 1 else _SPREAD * tokens  # of the step: an expert's tokens lie apart in it
        x, share = torch.randn(1, _HIDDEN).bfloat16().repeat(total, 1), torch.rand(tokens)
        count = 1 if neurons == WIDE_NEURONS else next(n for least, n in reversed(_EXPERTS) if least <= tokens)
        work = [
            ExpertWork(piece, range(neurons), torch.randperm(total)[:tokens].sort().values, share) for piece in pieces
        ]
        calls = cycle([work[at : at + count] for at in range(0, max(1, len(work) - count + 1), count)])
        out = torch.zeros(total, _HIDDEN)

        def call() -> float:
            some = next(calls)
            experts.run(math, x, some, out)
            return float(len(some) * len(one))

        return call

    kind = "experts" if neurons == NEURONS else "wide"
    return {Case(kind, name, tokens): call_of(tokens) for tokens in counts}


def _expert(name: str, neurons: int = NEURONS) -> Tensor:
    """One of so many neurons in a format, its bytes."""
    fmt, shape = format_asked_for(name), ExpertShape(_HIDDEN, neurons)
    if any(matrix.is_float for matrix in fmt.matrices.values()):
        return plausible_weights(fmt.expert_bytes(shape)).view(torch.uint8)
    return random_experts(fmt, shape, _BOUND)()


def _dense(memory: Tensor, name: str, panels: Tensor, counts: Sequence[int], threads: int) -> dict[Case, Call]:
    """Other products in a format, by tokens; all of the memory holds matrices of the panels of `_FEW_ROWS`."""
    fmt = format_named(name)
    most = min(max(_DENSE_ROWS.values()) // _FEW_ROWS, len(memory) // len(panels))  # repeats that it holds
    pieces = _filled(memory, panels.repeat(most), threads)

    def call_of(tokens: int) -> Call:
        rows, x = min(_DENSE_ROWS[tokens], most * _FEW_ROWS), torch.randn(tokens, _COLUMNS).bfloat16()
        size = fmt.matrix_bytes(rows, _COLUMNS)
        matrices = cycle([Matrix(piece[:size], fmt, rows, _COLUMNS) for piece in pieces])

        def call() -> float:
            run_linear(next(matrices), x, threads=threads)
            return float(size)

        return call

    return {Case("dense", name, tokens): call_of(tokens) for tokens in sorted(_DENSE_ROWS.keys() & {*counts})}


def _filled(memory: Tensor, one: Tensor, threads: int) -> list[Tensor]:
    """Copies of some bytes, each on a cache line, in all of the memory.

    Raises:
        BudgetError: it does not hold one.
    """
    check_ram("memory to measure this machine with", len(one), len(memory), "free some")
    step = -(-len(one) // 64) * 64
    pieces = [memory[at : at + len(one)] for at in range(0, len(memory) - len(one) + 1, step)]
    with torch_threads(threads):
        for piece in pieces:
            piece.copy_(one)
    return pieces


def _swiglu(gate: Tensor | None, up: Tensor) -> Tensor:
    assert gate is not None
    return torch.nn.functional.silu(gate) * up


def _attention_calls(memory: Tensor, threads: int) -> dict[Case, Call]:
    """A decoded token over a long cache, and a prompt over itself, by our kernels and in torch's plain operations."""
    caches = _Rotating(memory.view(torch.bfloat16))
    kernel = attention_of(_QUERY_HEADS, _KEY_HEADS, _WIDTH, torch.bfloat16, threads)

    def ours(new: int, cached: int) -> None:
        query = torch.ones(new, _QUERY_HEADS * _WIDTH, dtype=torch.bfloat16)
        kernel.attend(query, *_cache(caches, cached))

    def plain(new: int, cached: int) -> None:
        with torch_threads(threads):
            _plain_attention(torch.ones(1, _QUERY_HEADS, new, _WIDTH, dtype=torch.bfloat16), *_cache(caches, cached))

    def timed(attend: Callable[[int, int], None], new: int, cached: int, amount: float) -> Call:
        def call() -> float:
            attend(new, cached)
            return amount

        return call

    step_bytes = 2.0 * _KEY_HEADS * _CACHED * _WIDTH * torch.bfloat16.itemsize
    scores = 4.0 * _PROMPT * _PROMPT * _QUERY_HEADS * _WIDTH
    return {
        Case("attention_gbps"): timed(ours, 1, _CACHED, step_bytes),
        Case("attention_gflops"): timed(ours, _PROMPT, _PROMPT, scores / 2),  # of tokens before a token's own
        Case("plain_attention_gbps"): timed(plain, 1, _CACHED, step_bytes),
        Case("plain_attention_gflops"): timed(plain, _PROMPT, _PROMPT, scores),
    }


class _Rotating:
    """Hands out memory piece by piece, from the beginning again at its end."""

    def __init__(self, memory: Tensor) -> None:
        self._memory, self._at = memory, 0

    def take(self, count: int) -> Tensor:
        """The next so many elements."""
        self._at = self._at if self._at + count <= self._memory.numel() else 0
        self._at += count
        return self._memory[self._at - count : self._at]


def _cache(caches: _Rotating, cached: int) -> list[Tensor]:
    size = _KEY_HEADS * cached * _WIDTH
    return [caches.take(size).view(1, _KEY_HEADS, cached, _WIDTH) for _ in range(2)]


def _plain_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """As Transformers writes it for families without a fused function."""
    groups = query.shape[1] // keys.shape[1]
    keys, values = (
        part[:, :, None].expand(-1, -1, groups, -1, -1).reshape(1, -1, *part.shape[2:]) for part in (keys, values)
    )
    scores = query @ keys.transpose(2, 3) * query.shape[-1] ** -0.5
    mask = torch.zeros(scores.shape[2:], dtype=scores.dtype)
    return torch.softmax(scores + mask, dim=-1, dtype=torch.float32).to(query.dtype) @ values
