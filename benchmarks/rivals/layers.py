"""Time our kernels beside kt-kernel's and torch's. Each engine has a process of its own; they take turns (A B A B ...).

kt-kernel, where it is installed, and our kernels run the same steps of a whole layer: its real number of experts, of
which each token draws top-k evenly at random. torch runs the three products of one expert without the gate, and our
kernels that expert with the gate; experts take turns, and fill 8 last-level caches. A row holds medians over the
rounds; its ratio is the median of the rounds' ratios.

    python -m benchmarks.rivals kernels --shape olmoe-1b-7b
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from moestro.bench.kernels import MoeLayer, moe_layer
from moestro.bench.report import check_kernels
from moestro.compute.cpu import core_cpus
from moestro.console import print_table
from moestro.machine.kernel_rates import CACHES
from moestro.machine.probe import available_ram_bytes, last_level_cache_bytes
from moestro.memory.formats import FORMATS
from moestro.planning.budget import check_ram
from moestro.planning.shapes import REAL_SHAPES

from . import kt_kernel
from .layer_workers import OURS, TORCH, LayerWorker

KT_BITS = {"bf16": 16, "int4": 4}  # our format -> kt-kernel's bits of a weight, which take as many bytes
KT_TOKENS = (1, 4, 128)
TORCH_FORMATS = ("bf16", "fp32")
TORCH_TOKENS = (16, 64, 256)
PROCESS_BYTES = 2**30  # of a worker without its weights

Clock = Callable[[int, int], float]  # tokens, seed -> seconds


@dataclass(frozen=True, slots=True)
class RivalRow:
    """One case. ratio: how many times faster ours is.

    format: of our weights; the rival's take as many bits. seconds: of the rival's step. backend: the kernels that the
    rival chose. caches: how many last-level caches the weights fill. in_cache: whether these are so few that both
    engines may have read some weights from a cache.
    """

    shape: str
    engine: str
    format: str
    tokens: int
    seconds: float
    ours_seconds: float
    ratio: float
    backend: str
    caches: float
    in_cache: bool


def measure_rivals(
    *,
    shapes: Sequence[str] = REAL_SHAPES,
    tokens: Sequence[int] | None = None,
    rounds: int = 5,
    threads: int | None = None,
) -> tuple[RivalRow, ...]:
    """Measure our kernels beside each rival at the given shapes.

    Args:
        tokens: numbers of tokens to measure; None for `KT_TOKENS` and `TORCH_TOKENS`.

    Raises:
        RequestError: no kernels, no such shape, or a rival that fails. BudgetError: too little RAM for two engines.
    """
    check_kernels()
    _check_ram(shapes)
    count = threads or len(core_cpus())
    rows: list[RivalRow] = []
    for name in shapes:
        if kt_kernel.available() is not None:
            for format_name in KT_BITS:
                rows += _beside_kt_kernel(name, format_name, tokens or KT_TOKENS, rounds, count)
        for format_name in TORCH_FORMATS:
            rows += _beside_torch(name, format_name, tokens or TORCH_TOKENS, rounds, count)
    return tuple(rows)


def _beside_kt_kernel(
    name: str, format_name: str, tokens: Sequence[int], rounds: int, threads: int
) -> Iterator[RivalRow]:
    """Rows of a whole layer."""
    layer = moe_layer(name)
    sizes = {"experts": layer.experts, "top_k": layer.top_k, "threads": threads}
    hidden, neurons = layer.expert.hidden, layer.expert.neurons
    most = max(kt_kernel.MAX_TOKENS, *tokens)
    with (
        LayerWorker(OURS, hidden, neurons, format_name=format_name, **sizes) as ours,
        kt_kernel.KtKernel(hidden, neurons, bits=KT_BITS[format_name], tokens=most, **sizes) as theirs,
    ):
        case = (name, "kt-kernel", format_name, theirs.card["backend"], layer.experts)
        for count in tokens:
            yield _take_turns(case, count, rounds, ours.layer_s, theirs.layer_s)


def _beside_torch(name: str, format_name: str, tokens: Sequence[int], rounds: int, threads: int) -> Iterator[RivalRow]:
    """Rows of single experts, each of which computes all the tokens."""
    expert = moe_layer(name).expert
    experts = _torch_experts(moe_layer(name), format_name)

    def start(engine: str) -> LayerWorker:
        sizes = {"experts": experts, "top_k": 1, "threads": threads}
        return LayerWorker(engine, expert.hidden, expert.neurons, format_name=format_name, **sizes)

    with start(OURS) as ours, start(TORCH) as theirs:
        case = (name, f"torch {format_name}", format_name, theirs.card["backend"], experts)
        for count in tokens:
            yield _take_turns(case, count, rounds, lambda n, _: ours.expert_s(n), lambda n, _: theirs.expert_s(n))


def _take_turns(case: tuple[str, str, str, str, int], tokens: int, rounds: int, ours: Clock, theirs: Clock) -> RivalRow:
    name, engine, format_name, backend, experts = case
    pairs = [(ours(tokens, seed), theirs(tokens, seed)) for seed in range(rounds)]
    our_median, their_median = (median(seconds) for seconds in zip(*pairs, strict=True))
    ratio = median(b / a for a, b in pairs)
    caches = experts * _expert_bytes(moe_layer(name), format_name) / last_level_cache_bytes()
    figures = (their_median, our_median, ratio)
    return RivalRow(name, engine, format_name, tokens, *figures, backend, caches, caches < CACHES)


def _expert_bytes(layer: MoeLayer, format_name: str) -> int:
    return FORMATS[format_name].expert_bytes(layer.expert)


def _torch_experts(layer: MoeLayer, format_name: str) -> int:
    """How many experts it takes so that no cache holds them."""
    return -(-CACHES * last_level_cache_bytes() // _expert_bytes(layer, format_name))


def _check_ram(shapes: Sequence[str]) -> None:
    """Refuse shapes that do not fit in RAM before the first measurement, since a measurement takes minutes."""
    for name in shapes:
        layer = moe_layer(name)
        sizes = [_torch_experts(layer, fmt) * _expert_bytes(layer, fmt) for fmt in TORCH_FORMATS]
        if kt_kernel.available() is not None:
            sizes.append(layer.experts * _expert_bytes(layer, "bf16"))
        need_bytes = 2 * (max(sizes) + PROCESS_BYTES)
        check_ram(f"{name} beside a rival", need_bytes, available_ram_bytes(), "take another --shape")


def print_rivals(rows: Sequence[RivalRow]) -> None:
    """Print a table of the rows, and what its figures mean."""
    lines = []
    for row in rows:
        rival = row.engine if row.engine.endswith(row.format) else f"{row.engine} {row.format}"
        figures = (f"{row.seconds * 1e3:.2f}", f"{row.ours_seconds * 1e3:.2f}", f"{row.ratio:.2f}")
        lines.append((row.shape, rival, str(row.tokens), *figures, f"{row.caches:.1f}{' *' if row.in_cache else ''}"))
    print_table(("shape", "rival", "tokens", "theirs ms", "ours ms", "ratio", "caches"), lines)
    print("kt-kernel: a whole layer, experts drawn at random; torch: the products of one expert, without the gate")
    print("ratio: how many times faster ours is")
    print("caches: how many last-level caches the weights fill" + _cache_note(rows))
    for backend in dict.fromkeys(f"{row.engine}: {row.backend}" for row in rows):
        print(backend)


def _cache_note(rows: Sequence[RivalRow]) -> str:
    return f"; *: under {CACHES}, so both may read some of them from there" if any(r.in_cache for r in rows) else ""
