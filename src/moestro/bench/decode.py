"""Time prefill and decode of a whole random-weight model of a real shape, beside Transformers alone.

Each engine loads in a process of its own, and they take turns (A B C A B C ...): one prompt of each length and
`NEW_TOKENS` decoded tokens a turn. A figure is the median of the turns. The speed at which this machine reads memory
is measured between turns; that speed divided by the bytes that a token reads is the limit of decode.

    moestro bench decode --shape olmoe-1b-7b --bits 4
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from statistics import median
from types import MappingProxyType

import torch

from ..compute.cpu import best_level, core_cpus, read_limit_gbps
from ..console import print_table
from ..errors import RequestError
from ..machine.kernel_rates import torch_threads
from ..machine.probe import available_ram_bytes, cpu_model
from ..memory.formats import format_asked_for
from ..planning.budget import check_ram
from ..planning.shapes import depth_of_shape, least_depth, spec_of_shape
from .batches import CACHED, BatchFigures, BatchTurns, print_batches
from .beams import BeamFigures, BeamTurns, print_beams
from .models import ALONE, OURS, ModelWorker
from .report import Report, check_kernels
from .worker import EngineWorker

PROMPTS = (128, 512)
CONTEXT, NEW_TOKENS = 128, 32
READ_BYTES = 4 * 2**30
StartEngine = Callable[[str, int, int, int], AbstractContextManager[EngineWorker]]  # shape, bits, layers, threads
_RAM_SHARE = 0.92  # of what is free, for all engines together


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """Medians of one engine's turns.

    bits: of a weight, or the form of a checkpoint that the weights are in, like "q4_k_m".
    share: of the limit of decode; None where a token's bytes are not known.
    """

    engine: str
    bits: int | str
    prefill_tok_s: dict[int, float]
    decode_tok_s: float
    share: float | None


@dataclass(frozen=True, slots=True)
class DecodeReport(Report):
    """One run. level: the instruction set that our kernels used."""

    shape: str
    layers: int
    threads: int
    level: str
    read_limit_gbps: float
    outside_us: float  # of a decoded token outside our kernels, embedding and head too, divided by the layers
    engines: tuple[EngineFigures, ...]
    ratios: dict[str, dict[str, float]]  # ours over each other engine's: the median of the turns' ratios
    batches: tuple[BatchFigures, ...] = ()  # of ours
    beams: tuple[BeamFigures, ...] = ()

    def print(self) -> None:
        """Print a table of the engines."""
        print(f"{cpu_model()}, {self.level}, {self.threads} threads; {self.shape}, {self.layers} layers")
        print(
            f"read limit {self.read_limit_gbps:.1f} GB/s; decode outside our kernels {self.outside_us:.0f} us a layer"
        )
        rows = []
        for row in self.engines:
            ratios = self.ratios.get(row.engine, {})
            speeds = {f"prefill_{n}": row.prefill_tok_s[n] for n in PROMPTS} | {"decode": row.decode_tok_s}
            cells = [f"{value:.1f}" + (f" ({ratios[key]:.2f})" if ratios else "") for key, value in speeds.items()]
            rows.append((row.engine, str(row.bits), *cells, "" if row.share is None else f"{row.share:.2f}"))
        print_table(("engine", "bits", *(f"prefill {n}" for n in PROMPTS), "decode", "of the limit"), rows)
        print("tokens per second (and how many times as fast we are)")
        print_batches(self.batches)
        print_beams(self.beams)


def measure_decode(
    shape: str,
    bits: int | str,
    *,
    layers: int | None = None,
    rounds: int = 5,
    threads: int | None = None,
    alone: bool = True,
    others: Mapping[str, StartEngine] = MappingProxyType({}),
    batches: Sequence[int] = (),
    cached: Sequence[int] = (CACHED,),
    beams: Sequence[int] = (),
) -> DecodeReport:
    """Measure a shape at so many bits.

    Args:
        bits: of a weight, or the form of a checkpoint, as `stored_formats` takes it.
        layers: the depth to cut the model to, so that all engines fit in RAM together; None for all layers.
        rounds: turns of each engine.
        threads: of each engine; None for one on each physical core.
        alone: also measure Transformers alone, in bfloat16.
        others: by their names, functions that start other engines at the same bits.
        batches: also measure steps of so many sequences each. cached: tokens in the cache of each of them.
        beams: also beam searches with so many beams each.

    Raises:
        RequestError: no kernels, or no such shape or form. BudgetError: too little RAM.
    """
    check_kernels()
    depth = depth_of_shape(shape, layers)
    _check_ram(shape, depth, [bits, *(bits for _ in others), *([16] if alone else [])])
    count = threads or len(core_cpus())
    with ExitStack() as stack, torch_threads(1):
        engines: dict[str, tuple[int | str, EngineWorker]] = {}
        ours = ModelWorker(OURS, shape, bits=bits, layers=depth, threads=count)

        def add(name: str, engine_bits: int | str, engine: AbstractContextManager[EngineWorker]) -> None:
            engines[name] = (engine_bits, stack.enter_context(engine))

        add(OURS, bits, ours)
        for name, start in others.items():
            if isinstance(bits, str):
                raise RequestError(f"{name} is measured at so many bits here, not in {bits}")
            add(name, bits, start(shape, bits, depth, count))
        if alone:
            add(ALONE, 16, ModelWorker(ALONE, shape, bits=16, layers=depth, threads=count))
        more = BatchTurns(batches, count, cached=cached), BeamTurns(beams)
        return _take_turns(shape, depth, count, ours, engines, rounds, *more)


def _take_turns(
    shape: str,
    layers: int,
    threads: int,
    ours: ModelWorker,
    engines: dict[str, tuple[int | str, EngineWorker]],
    rounds: int,
    batches: BatchTurns,
    beams: BeamTurns,
) -> DecodeReport:
    memory = torch.ones(READ_BYTES // 4)
    limits: list[float] = []
    outside_s: list[float] = []
    decodes: dict[str, list[float]] = {name: [] for name in engines}
    prefills: dict[str, dict[int, list[float]]] = {name: {n: [] for n in PROMPTS} for name in engines}
    for _ in range(rounds):
        limits.append(read_limit_gbps(memory, threads))
        for name, (_, engine) in engines.items():
            for tokens in PROMPTS:
                prefills[name][tokens].append(tokens / engine.prefill_s(tokens))
        for name, (_, engine) in engines.items():
            decodes[name].append(1 / engine.decode_s(CONTEXT, NEW_TOKENS))
        outside_s.append(ours.outside_s())
        batches.take(ours, limits[-1])
        beams.take(ours)
    limit = median(limits)
    token_bytes = ours.card["token_bytes"]
    figures = tuple(
        EngineFigures(
            name,
            bits,
            {n: median(values) for n, values in prefills[name].items()},
            median(decodes[name]),
            median(decodes[name]) * token_bytes / limit / 1e9 if name == OURS else None,
        )
        for name, (bits, _) in engines.items()
    )
    ratios = {
        name: {"decode": _ratio(decodes[OURS], decodes[name])}
        | {f"prefill_{n}": _ratio(prefills[OURS][n], prefills[name][n]) for n in PROMPTS}
        for name in engines
        if name != OURS
    }
    outside_us = median(outside_s) / layers * 1e6
    more = batches.figures(), beams.figures()
    return DecodeReport(shape, layers, threads, best_level(), limit, outside_us, figures, ratios, *more)


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def _most_bits(bits: int | str) -> float:
    """Of a weight, scales included: 4 and 8 bits take up to 4.5 and 8.5."""
    if isinstance(bits, int):
        return bits if bits == 16 else bits + 0.5
    return {"q4_k_m": 6.6, "mxfp4": 8.5, "fp8": 16}.get(bits) or format_asked_for(bits).matrices["down"].bits_per_weight


def _check_ram(shape: str, layers: int, bits_of_engines: list[int | str]) -> None:
    def need_bytes(depth: int) -> float:
        spec = spec_of_shape(shape, depth)
        # A twentieth and half a GiB an engine are added for caches, activations and what loading leaves behind.
        each = sum(_most_bits(bits) / 8 for bits in bits_of_engines)
        return (spec.dense_bytes + spec.expert_bytes) / 2 * each * 1.05 + READ_BYTES + len(bits_of_engines) * 2**29

    free_bytes = available_ram_bytes() * _RAM_SHARE
    fits = max((depth for depth in range(least_depth(shape), layers) if need_bytes(depth) <= free_bytes), default=0)
    remedy = f"--layers {fits} would fit" if fits else "no depth would fit"
    what = f"a comparison of {len(bits_of_engines)} engines with {layers} layers of {shape}"
    check_ram(what, need_bytes(layers), free_bytes, remedy)
