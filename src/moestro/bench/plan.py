"""Compare what `moestro plan` predicts with what runs reach: decode and prefill on the CPU, of real shapes, by bits.

A cell is a shape at so many bits: random weights, few layers, in a process of its own. In each of some turns it is
predicted, from this machine's rates and the model's sizes alone, and then runs. Where a machine's speed changes from
minute to minute, as with neighbours on it, rates that are measured in each turn show what the arithmetic is worth.

    moestro bench plan --shape olmoe-1b-7b --bits 4
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median_low
from typing import Any

from ..compute.cpu import best_level, core_cpus
from ..console import print_table
from ..loading.measure_machine import Progress, measure_cpu, this_card
from ..loading.outlook import work_of
from ..loading.survey.found import Survey
from ..loading.survey.sizes import Sized, sized
from ..loading.survey.survey import survey_shape
from ..machine.kernel_rates import memory_bytes, torch_threads
from ..machine.probe import available_ram_bytes, cpu_model
from ..planning.budget import check_ram
from ..planning.machine_file import machine_values
from ..planning.machines import Machine
from ..planning.options import ModelOptions, Options
from ..planning.policies import make_policy
from ..planning.rates import measured_for
from ..planning.shapes import FORECAST_SHAPES, depth_of_shape, least_depth, spec_of_shape
from ..planning.text_shape import text_shape
from ..simulate.forecast import StepModel
from .decode import CONTEXT, NEW_TOKENS, PROMPTS
from .models import OURS, ModelWorker
from .report import Report, check_kernels
from .worker import EngineWorker

BITS = (16, 8, 4)
LAYERS = {"olmoe-1b-7b": 4, "mixtral-8x7b": 1}
ROUNDS = 3
DECODE_WITHIN, PREFILL_WITHIN, MOST = 0.15, 0.25, 0.35  # errors: what is aimed at, and what is never right
_RAM_SHARE, _MORE_BYTES = 0.9, 2**30


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One figure of a cell: that of the turn whose error is the median.

    what: decode, or prefill with its tokens. error: of what was predicted, as a share of what was measured. errors: of
    all turns.
    """

    shape: str
    bits: int
    layers: int
    what: str
    predicted_tok_s: float
    measured_tok_s: float
    error: float
    errors: tuple[float, ...]

    @property
    def within(self) -> bool:
        """Whether it is as right as is aimed at."""
        return abs(self.error) <= (DECODE_WITHIN if self.what == "decode" else PREFILL_WITHIN)


@dataclass(frozen=True, slots=True)
class PlanReport(Report):
    """One run. machines: by whose rates the cells were predicted, each in its last turn; one, where they were kept.

    read_gbps: the read limits of all rates that were used.
    """

    level: str
    threads: int
    machines: tuple[dict[str, Any], ...]
    read_gbps: tuple[float, ...]
    rows: tuple[PlanRow, ...]
    within: dict[str, list[int]]  # decode, prefill, cells: how many are within, and of how many
    worst: float

    def print(self) -> None:
        """A row for each figure."""
        print(f"{cpu_model()}, {self.level}, {self.threads} threads")
        print(f"read limit: {min(self.read_gbps):.1f} to {max(self.read_gbps):.1f} GB/s")
        rows = [
            (
                f"{row.shape}, {row.layers} layers",
                str(row.bits),
                row.what,
                f"{row.predicted_tok_s:.1f}",
                f"{row.measured_tok_s:.1f}",
                f"{row.error:+.0%}{'' if row.within else ' !'}",
                f"{min(row.errors):+.0%} to {max(row.errors):+.0%}",
            )
            for row in self.rows
        ]
        print_table(("shape", "bits", "what", "predicted tok/s", "measured tok/s", "error", "of all turns"), rows)
        counts = ", ".join(f"{name} {good} of {count}" for name, (good, count) in self.within.items())
        print(
            f"within {DECODE_WITHIN:.0%} (decode) and {PREFILL_WITHIN:.0%} (prefill): {counts}; the worst is off by "
            f"{self.worst:.0%}"
        )


def measure_plan(
    *,
    shapes: Sequence[str] = FORECAST_SHAPES,
    bits: Sequence[int] = BITS,
    layers: int | None = None,
    rounds: int = ROUNDS,
    threads: int | None = None,
    anew: bool = False,
    on_progress: Progress = lambda what, share: None,
) -> PlanReport:
    """Predict and run each cell.

    Args:
        layers: the depth to cut models to; None for a few.
        rounds: turns of each cell, of which the one with the median error is told.
        anew: measure the rates that a cell needs in each turn, whatever was kept.

    Raises:
        RequestError: no kernels, or no such shape. BudgetError: too little RAM for a cell.
    """
    check_kernels()
    depths = {shape: depth_of_shape(shape, layers or LAYERS.get(shape, least_depth(shape) + 1)) for shape in shapes}
    cells = [(shape, of, depths[shape]) for shape, of in product(shapes, bits)]
    for cell in cells:
        _check_ram(*cell, measuring=anew)
    count = threads or len(core_cpus())
    kept = None if anew else this_card(count, on_progress=lambda what, _: on_progress(what, 0.0))
    machines: list[Machine] = []
    read_gbps: list[float] = []
    rows: list[PlanRow] = []
    for number, (shape, of, depth) in enumerate(cells):
        turns: list[tuple[dict[str, float], dict[str, float]]] = []
        with torch_threads(1), ModelWorker(OURS, shape, bits=of, layers=depth, threads=count) as worker:
            for turn in range(rounds):
                on_progress(f"{shape}, {of} bits", (number + turn / rounds) / len(cells))
                machine = kept or measure_cpu(count, formats_of(shape, of, depth))
                read_gbps.append(machine.costs.cpu_gbps or 0.0)
                turns.append((predict(shape, of, depth, machine), _run(worker)))
        machines.append(machine)
        rows += [_row(shape, of, depth, what, [(said[what], ran[what]) for said, ran in turns]) for what in turns[0][0]]
    on_progress("", 1.0)
    if kept is not None:
        machines, read_gbps = machines[:1], read_gbps[:1]
    values, worst = tuple(map(machine_values, machines)), max(abs(row.error) for row in rows)
    return PlanReport(best_level(), count, values, tuple(read_gbps), tuple(rows), _within(rows), worst)


def formats_of(shape: str, bits: int, layers: int) -> tuple[str, ...]:
    """Formats whose rates a shape's prediction is made from."""
    sizes = _sized(survey_shape(shape, ModelOptions(shape=shape), layers), bits)
    return measured_for([*sizes.formats.experts, *(part.format for part in sizes.dense)])


def predict(shape: str, bits: int, layers: int, machine: Machine) -> dict[str, float]:
    """Tokens a second of decode behind `CONTEXT` tokens, and of prompts, from a machine's rates and sizes alone."""
    found = survey_shape(shape, ModelOptions(shape=shape), layers)
    sizes = _sized(found, bits)
    policy = make_policy("cpu-only")
    policy.place(sizes.spec, 0, {})
    steps = StepModel(sizes.spec, policy, machine, work_of(found, sizes), slots=0)
    kv_bytes = text_shape(found.config, 2).kv_bytes(CONTEXT + NEW_TOKENS // 2)
    prefills = {f"prefill {tokens}": tokens / steps.prefill_s(tokens) for tokens in PROMPTS}
    return {"decode": 1 / steps.decode_s(kv_bytes), **prefills}


def _sized(found: Survey, bits: int) -> Sized:
    return sized(found, Options(bits=bits, device="cpu"), on_gpu=False)


def _run(worker: EngineWorker) -> dict[str, float]:
    """What a turn reaches."""
    prefills = {f"prefill {tokens}": tokens / worker.prefill_s(tokens) for tokens in PROMPTS}
    return {"decode": 1 / worker.decode_s(CONTEXT, NEW_TOKENS), **prefills}


def _row(shape: str, bits: int, layers: int, what: str, turns: Sequence[tuple[float, float]]) -> PlanRow:
    """A figure's row: predicted and measured tokens a second, by turns."""
    errors = tuple(said / ran - 1 for said, ran in turns)
    error = median_low(errors)
    return PlanRow(shape, bits, layers, what, *turns[errors.index(error)], error, errors)


def _within(rows: Sequence[PlanRow]) -> dict[str, list[int]]:
    decode = [row.within for row in rows if row.what == "decode"]
    prefill = [row.within for row in rows if row.what != "decode"]
    cells = {(row.shape, row.bits): True for row in rows}
    for row in rows:
        cells[row.shape, row.bits] &= row.within
    whole = list(cells.values())
    return {name: [sum(of), len(of)] for name, of in (("decode", decode), ("prefill", prefill), ("cells", whole))}


def _check_ram(shape: str, bits: int, layers: int, *, measuring: bool) -> None:
    spec = spec_of_shape(shape, layers)
    need_bytes = (spec.dense_bytes + spec.expert_bytes) / 16 * (bits + 1) + _MORE_BYTES
    need_bytes += memory_bytes() if measuring else 0
    free_bytes = available_ram_bytes() * _RAM_SHARE
    check_ram(f"{layers} layers of {shape} at {bits} bits", need_bytes, free_bytes, "take fewer --layers or --bits")
