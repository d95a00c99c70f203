"""Compare what `moestro plan` predicts with what runs reach: decode and prefill on the CPU, of real shapes, by bits.

A cell is a shape at so many bits: random weights, few layers, in a process of its own. It is predicted, from this
machine's card and the model's sizes alone, before it runs; between cells the read limit shows whether the machine is
still what its card says.

    moestro bench plan --shape olmoe-1b-7b --bits 4
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any

from ..compute.cpu import best_level, core_cpus, read_limit_gbps
from ..console import print_table
from ..loading.measure_machine import Progress, this_card
from ..loading.outlook import work_of
from ..loading.survey.sizes import sized
from ..loading.survey.survey import survey_shape
from ..machine.kernel_rates import plausible_weights, torch_threads
from ..machine.probe import available_ram_bytes, cpu_model, last_level_cache_bytes
from ..planning.budget import check_ram
from ..planning.machine_file import machine_values
from ..planning.machines import Machine
from ..planning.options import ModelOptions, Options
from ..planning.policies import make_policy
from ..planning.shapes import depth_of_shape, least_depth, spec_of_shape
from ..planning.text_shape import text_shape
from ..simulate.forecast import StepModel
from .decode import CONTEXT, NEW_TOKENS, PROMPTS
from .models import OURS, ModelWorker
from .report import Report, check_kernels

SHAPES = ("olmoe-1b-7b", "qwen3-30b-a3b", "mixtral-8x7b", "gpt-oss-20b")
BITS = (16, 8, 4)
LAYERS = {"olmoe-1b-7b": 4, "mixtral-8x7b": 1}
ROUNDS = 3
DECODE_WITHIN, PREFILL_WITHIN, MOST = 0.15, 0.25, 0.35  # errors: what is aimed at, and what is never right
_READ_BYTES = 2**30
_RAM_SHARE, _MORE_BYTES = 0.9, 2**30


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One figure of a cell. what: decode, or prefill with its tokens. error: of the predicted one, of the measured."""

    shape: str
    bits: int
    layers: int
    what: str
    predicted_tok_s: float
    measured_tok_s: float
    error: float

    @property
    def within(self) -> bool:
        """Whether it is as right as is aimed at."""
        return abs(self.error) <= (DECODE_WITHIN if self.what == "decode" else PREFILL_WITHIN)


@dataclass(frozen=True, slots=True)
class PlanReport(Report):
    """One run. read_gbps: the read limit before each cell, in their order; the last card's is in `machine`."""

    level: str
    threads: int
    machine: dict[str, Any]
    read_gbps: tuple[float, ...]
    rows: tuple[PlanRow, ...]
    within: dict[str, list[int]]  # decode, prefill, cells: how many are within, and of how many
    worst: float

    def print(self) -> None:
        """A row for each figure."""
        print(f"{cpu_model()}, {self.level}, {self.threads} threads")
        limits = ", ".join(f"{gbps:.1f}" for gbps in self.read_gbps)
        print(f"read limit {self.machine['cpu_gbps']:.1f} GB/s on the card, {limits} before the cells")
        rows = [
            (
                f"{row.shape}, {row.layers} layers",
                str(row.bits),
                row.what,
                f"{row.predicted_tok_s:.1f}",
                f"{row.measured_tok_s:.1f}",
                f"{row.error:+.0%}{'' if row.within else ' !'}",
            )
            for row in self.rows
        ]
        print_table(("shape", "bits", "what", "predicted tok/s", "measured tok/s", "error"), rows)
        counts = ", ".join(f"{name} {good} of {count}" for name, (good, count) in self.within.items())
        print(
            f"within {DECODE_WITHIN:.0%} (decode) and {PREFILL_WITHIN:.0%} (prefill): {counts}; the worst is off by "
            f"{self.worst:.0%}"
        )


def measure_plan(
    *,
    shapes: Sequence[str] = SHAPES,
    bits: Sequence[int] = BITS,
    layers: int | None = None,
    rounds: int = ROUNDS,
    threads: int | None = None,
    anew: bool = False,
    on_progress: Progress = lambda what, share: None,
    card: Callable[..., Machine] = this_card,
) -> PlanReport:
    """Predict and run each cell.

    Args:
        layers: the depth to cut models to; None for a few.
        rounds: of a cell's run, to take medians of.
        anew: measure this machine's card before each shape, whatever was kept.
        card: what has it.

    Raises:
        RequestError: no kernels, or no such shape. BudgetError: too little RAM for a cell.
    """
    check_kernels()
    depths = {shape: depth_of_shape(shape, layers or LAYERS.get(shape, least_depth(shape) + 1)) for shape in shapes}
    cells = [(shape, of, depths[shape]) for shape, of in product(shapes, bits)]
    for cell in cells:
        _check_ram(*cell)
    count = threads or len(core_cpus())
    memory = plausible_weights(max(_READ_BYTES, 8 * last_level_cache_bytes()))
    reads: list[float] = []
    rows: list[PlanRow] = []
    machine: Machine | None = None
    for shape, of, depth in cells:
        if machine is None or (anew and of == bits[0]):  # before each shape
            machine = card(count, anew=anew, on_progress=on_progress)
        with torch_threads(1):
            predicted = predict(shape, of, depth, machine)
            reads.append(read_limit_gbps(memory, count))
            measured = _run(shape, of, depth, count, rounds)
            for what, tok_s in predicted.items():
                rows.append(PlanRow(shape, of, depth, what, tok_s, measured[what], tok_s / measured[what] - 1))
    assert machine is not None
    worst = max(abs(row.error) for row in rows)
    return PlanReport(best_level(), count, machine_values(machine), tuple(reads), tuple(rows), _within(rows), worst)


def predict(shape: str, bits: int, layers: int, machine: Machine) -> dict[str, float]:
    """Tokens a second of decode behind `CONTEXT` tokens, and of prompts, from a machine's rates and sizes alone."""
    found = survey_shape(shape, ModelOptions(shape=shape), layers)
    sizes = sized(found, Options(bits=bits, device="cpu"), on_gpu=False)
    policy = make_policy("cpu-only")
    policy.place(sizes.spec, 0, {})
    steps = StepModel(sizes.spec, policy, machine, work_of(found, sizes), slots=0)
    kv_bytes = text_shape(found.config, 2).kv_bytes(CONTEXT + NEW_TOKENS // 2)
    prefills = {f"prefill {tokens}": tokens / steps.prefill_s(tokens) for tokens in PROMPTS}
    return {"decode": 1 / steps.decode_s(kv_bytes), **prefills}


def _run(shape: str, bits: int, layers: int, threads: int, rounds: int) -> dict[str, float]:
    """What a run reaches: medians of rounds."""
    found: dict[str, list[float]] = {"decode": [], **{f"prefill {tokens}": [] for tokens in PROMPTS}}
    with ModelWorker(OURS, shape, bits=bits, layers=layers, threads=threads) as worker:
        for _ in range(rounds):
            for tokens in PROMPTS:
                found[f"prefill {tokens}"].append(tokens / worker.prefill_s(tokens))
            found["decode"].append(1 / worker.decode_s(CONTEXT, NEW_TOKENS))
    return {what: median(values) for what, values in found.items()}


def _within(rows: Sequence[PlanRow]) -> dict[str, list[int]]:
    decode = [row.within for row in rows if row.what == "decode"]
    prefill = [row.within for row in rows if row.what != "decode"]
    cells = {(row.shape, row.bits): True for row in rows}
    for row in rows:
        cells[row.shape, row.bits] &= row.within
    whole = list(cells.values())
    return {name: [sum(of), len(of)] for name, of in (("decode", decode), ("prefill", prefill), ("cells", whole))}


def _check_ram(shape: str, bits: int, layers: int) -> None:
    spec = spec_of_shape(shape, layers)
    need_bytes = (spec.dense_bytes + spec.expert_bytes) / 16 * (bits + 1) + _READ_BYTES + _MORE_BYTES
    free_bytes = available_ram_bytes() * _RAM_SHARE
    check_ram(f"{layers} layers of {shape} at {bits} bits", need_bytes, free_bytes, "take fewer --layers or --bits")
