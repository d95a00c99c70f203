"""How fast the CPU kernels are, beside the limits of this machine, all in one process and interleaved.

Read limit: the best of plain, prefetching and four-stream summing loops at 1..N threads over at least 4 GiB. FMA limit:
a register-only loop of multiply-adds. Each round finds the best loops and then measures every row once,
with a read of all memory between two rows; a figure is the median of the rounds, and a row's share is taken
against the better of the reads before and after it. Weights rotate
over at least 8 x the last-level cache, so that no row reads a cache. A share above 1 is a failure of the
measurement.

    moestro bench kernels --json
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..compute.cpu import CpuExperts, best_level, core_cpus, fma_gflops, levels, read_gbps
from ..compute.experts import ExpertMath, ExpertWork
from ..errors import RequestError
from ..machine.probe import available_ram_bytes, cpu_model, last_level_cache_bytes
from ..memory.formats import FLOAT_FORMATS, FORMATS, ExpertShape
from ..planning.budget import format_bytes
from .machine_card import git_commit

READ_BYTES = 4 * 2**30
CALL_BYTES = 2**28  # that the timed calls of a row read with one token
CACHES = 8  # the weights of a row are at least so many last-level caches
PREFETCH_FLOATS = (0, 256, 1024, -1)  # -1: four streams instead, as the kernels read
MEASURED = ("fp32", "fp16", "bf16", "int8", "int4")  # where no format is named
TOKENS, FULL_TOKENS = (1, 64), (1, 4, 16, 64, 256)
ROUNDS, FULL_ROUNDS = 3, 5


class MoeLayer(NamedTuple):
    """One layer: an expert's shape, how many experts there are and how many a token is routed to."""

    expert: ExpertShape
    experts: int
    top_k: int


SHAPES = {
    "mixtral-8x7b": MoeLayer(ExpertShape(4096, 14336), 8, 2),
    "olmoe-1b-7b": MoeLayer(ExpertShape(2048, 1024), 64, 8),
    "qwen3-30b-a3b": MoeLayer(ExpertShape(2048, 768), 128, 8),
}


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One case: `tokens` tokens for each of the layer's active experts. share: of the read limit."""

    shape: str
    format: str
    tokens: int
    gbps: float
    gflops: float
    share: float
    fma_share: float


@dataclass(frozen=True, slots=True)
class KernelReport:
    """The limits and the rows of one run."""

    read_limit_gbps: float
    fma_limit_gflops: float
    rows: tuple[KernelRow, ...]
    level: str
    threads: int

    def to_json(self) -> dict[str, Any]:
        """All figures, the machine and the commit."""
        return asdict(self) | {"cpu": cpu_model(), "commit": git_commit()}

    def print(self) -> None:
        """The limits and a table of the rows."""
        print(f"{cpu_model()}, {self.level}, {self.threads} threads")
        print(f"read limit {self.read_limit_gbps:.1f} GB/s   FMA limit {self.fma_limit_gflops:.0f} GFLOP/s")
        table = Table("shape", "format", "tokens", "GB/s", "of read limit", "GFLOP/s", "of FMA limit")
        for row in self.rows:
            speeds = (f"{row.gbps:.2f}", f"{row.share:.2f}", f"{row.gflops:.1f}", f"{row.fma_share:.2f}")
            table.add_row(row.shape, row.format, str(row.tokens), *speeds)
        Console().print(table)


def measure_kernels(
    *,
    shapes: Sequence[str] = tuple(SHAPES),
    formats: Sequence[str] = MEASURED,
    tokens: Sequence[int] | None = None,
    rounds: int = ROUNDS,
    read_bytes: int = READ_BYTES,
    threads: int | None = None,
) -> KernelReport:
    """Measure the formats at the given shapes and tokens, all of `SHAPES` and the few `TOKENS` if none are given.

    Raises:
        RequestError: no kernels were built, no such shape or format, or too little RAM for weights that no cache holds.
    """
    if not levels():
        raise RequestError("this package was built without its kernels; install it where a C++ compiler is")
    check_shapes(shapes)
    for name in formats:
        if name not in FORMATS:
            raise RequestError(f"no format {name!r}; there are: {', '.join(FORMATS)}")
    size_bytes = max(read_bytes, CACHES * last_level_cache_bytes()) if read_bytes == READ_BYTES else read_bytes
    if size_bytes > 0.8 * available_ram_bytes():
        raise RequestError(f"needs {format_bytes(size_bytes)} of weights to pass the caches; free some RAM")
    memory = plausible_weights(size_bytes)
    count = threads or len(core_cpus())
    cases = list(product(shapes, formats, tokens or TOKENS))
    with one_torch_thread():
        return _measure_rounds(cases, memory, rounds, count)


def check_shapes(shapes: Sequence[str]) -> None:
    """Raises a RequestError that names the first one that is unknown."""
    for name in shapes:
        if name not in SHAPES:
            raise RequestError(f"no shape {name!r}; there are: {', '.join(SHAPES)}")


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """torch's idle threads spin for a while after each of its operations, on the cores that are measured here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _measure_rounds(cases: Sequence[tuple[str, str, int]], memory: Tensor, rounds: int, count: int) -> KernelReport:
    reads, fmas = [], []
    speeds: dict[tuple[str, str, int], list[tuple[float, float, float, float]]] = {case: [] for case in cases}
    position = 0
    for _ in range(rounds):
        loops = [(n, ahead) for n in range(1, count + 1) for ahead in PREFETCH_FLOATS]
        scanned = {loop: read_gbps(memory, *loop) for loop in loops}
        best = max(scanned, key=lambda loop: scanned[loop])
        reads.append(scanned[best])
        fmas.append(max(fma_gflops(count) for _ in range(3)))
        for case in cases:
            gbps, gflops, position = _measure_case(case, memory, position, count)
            reads.append(read_gbps(memory, *best))
            # The machine's speed drifts, so a row is held against the reads right before and after it.
            speeds[case].append((gbps, gflops, gbps / max(reads[-2:]), gflops / fmas[-1]))
    rows = tuple(KernelRow(*case, *(median(column) for column in zip(*speeds[case], strict=True))) for case in cases)
    return KernelReport(median(reads), median(fmas), rows, best_level(), count)


def _measure_case(case: tuple[str, str, int], memory: Tensor, position: int, threads: int) -> tuple[float, float, int]:
    """GB/s and GFLOP/s of calls that follow one another, as layers do, and where in the memory the next continues."""
    name, format_name, tokens = case
    shape, _, top_k = SHAPES[name]
    math = ExpertMath(shape, FORMATS[format_name], swiglu)
    size = math.format.expert_bytes(shape)
    data = memory.view(torch.uint8)
    x = torch.randn(tokens, shape.hidden).to(hidden_dtype(format_name))
    rows, weights = torch.arange(tokens), torch.rand(tokens)
    out = torch.zeros(tokens, shape.hidden)
    # One layer alone would time how threads wake; many tokens take long enough as it is.
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
    """Of the hidden states of a model whose weights are in that format."""
    return next((dtype for dtype, name in FLOAT_FORMATS.items() if name == format_name), torch.bfloat16)


def swiglu(gate: Tensor | None, up: Tensor) -> Tensor:
    """The gate of all three families."""
    assert gate is not None
    return torch.nn.functional.silu(gate) * up


def plausible_weights(size_bytes: int) -> Tensor:
    """Memory that reads as weights in every float format: no zeros, no denormals, nothing infinite.

    float32, [size_bytes // 4]. Each 16 bits are a sign, the exponent bits 0x3C00 and 8 random bits: 0.008 to
    0.03 in bf16 and fp32, 1 to 1.25 in fp16.
    """
    bits = torch.randint(0, 2**9, (4 * 2**20,), dtype=torch.int16)  # 8 MiB, repeated
    piece = (bits & 0xFF) + 0x3C00 - (bits >> 8) * 2**15
    memory = torch.empty(size_bytes // 4, dtype=torch.float32)
    flat = memory.view(torch.int16)
    for start in range(0, flat.numel(), piece.numel()):
        part = flat[start : start + piece.numel()]
        part.copy_(piece[: part.numel()])
    return memory
