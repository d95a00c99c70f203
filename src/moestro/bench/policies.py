"""Compare policies on one model's routing, by replay on any machine or live.

    moestro bench policies demo --text story.txt --machine rtx4090 --as-shape mixtral-8x7b

One trace is made and cut in two. Policies that place experts by popularity get the first half as their profile; all
are run on the second half, so that no policy is judged on what its profile has told it. With another trace as the
profile, that of another text say, all are run on the whole.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..console import print_table
from ..errors import BudgetError, RequestError
from ..loading.load import load, load_tokenizer
from ..machine.measure import machine_by_name
from ..planning.budget import format_bytes
from ..planning.contract import Expert, Lane, Phase
from ..planning.options import ModelOptions, ReplayOptions
from ..planning.plan import experts_room
from ..planning.policies import make_policy
from ..planning.timeline import Timeline
from ..simulate.fit import shortfall
from ..simulate.replay import replay
from ..simulate.reshape import resized
from ..simulate.trace import Trace
from ..text.files import read_text, writable
from ..text.generation import encode
from ..text.tracing import LOOKAHEAD, read_pieces, trace_ids
from .limit import HybridLimit
from .plots import plotting
from .report import Report

_DRAWN_LAYERS = 4


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """One policy's figures. share: of the hybrid limit of decode at its own hits.

    Only a replay has the last six. disk_bytes: read since the RAM does not hold all experts that are not on the GPU.
    does_not_fit: why there are no other figures.
    """

    policy: str
    prefill_tok_s: float | None = None
    decode_tok_s: float | None = None
    hit_rate: float | None = None
    bytes_moved: int | None = None
    share: float | None = None
    slots: int | None = None
    own_share: float | None = None
    prefill_own_share: float | None = None
    belady_hit_rate: float | None = None
    belady_share: float | None = None
    disk_bytes: int | None = None
    does_not_fit: str | None = None


@dataclass(frozen=True, slots=True)
class PoliciesReport(Report):
    """One run. where: in words, which model ran, or whose trace was replayed, and on what machine."""

    where: str
    rows: tuple[PolicyRow, ...]

    def print(self) -> None:
        """Print a row for each policy."""
        rows = []
        for row in self.rows:
            speeds = (told(row.prefill_tok_s, ".1f"), told(row.decode_tok_s, ".2f"), told(row.hit_rate, ".1%"))
            moved = "-" if row.bytes_moved is None else format_bytes(row.bytes_moved)
            shares = [told(of, ".2f") for of in (row.share, row.own_share, row.belady_share)]
            rows.append((row.policy, *speeds, moved, told(row.slots, "d"), *shares))
        print(self.where)
        if all(row.does_not_fit is not None for row in self.rows):
            print_lacks(self.rows)
            return
        names = ("policy", "prefill tok/s", "decode tok/s", "hits", "moved", "slots", "share", "own", "Belady")
        print_table(names, rows)
        print(
            "share: of the hybrid limit of decode at the policy's own hit rate; own: of what the method's arithmetic\n"
            "allows; Belady: of the hybrid limit at the best hit rate that so many slots can have"
        )
        print_lacks(self.rows)


def told(figure: float | None, how: str) -> str:
    """A figure as text, "-" for none."""
    return "-" if figure is None else format(figure, how)


def print_lacks(rows: Sequence[PolicyRow]) -> None:
    """Print which policies have no figures, and why, and which read from the disk."""
    lacks: dict[str, list[str]] = {}
    for row in rows:
        if row.does_not_fit is not None:
            lacks.setdefault(row.does_not_fit, []).append(row.policy)
    for why, names in lacks.items():
        print(f"{'all' if len(names) == len(rows) else ', '.join(names)}: {why}")
    if reading := [row.policy for row in rows if row.disk_bytes]:
        print(
            "read from disk, since the RAM does not hold all experts that are not on the GPU, which a run refuses: "
            + ", ".join(reading)
        )


def compare(
    trace: Trace,
    machine: str,
    gpu_bytes: int | None,
    names: Sequence[str],
    plot: Path | None = None,
    profile: Trace | None = None,
) -> list[PolicyRow]:
    """Replay policies on a trace with a profile of popularity; draw their lanes if asked.

    Args:
        machine: its name. gpu_bytes: the GPU memory to use; None for all that the machine has.
        plot: the SVG file to draw.
        profile: another trace of the same model; None to take the first half of `trace`, and replay the second alone.

    Raises:
        RequestError: the second half has no prompt, or the profile is of another model.
    """
    heat, rest = _halves(trace) if profile is None else (profile.heat_for(trace.spec), trace)
    if not any(one.phase is Phase.PREFILL for one in rest.passes):
        raise RequestError("the second half of the trace has no prompt; record more --tokens, or fewer --decode-tokens")
    found_machine = machine_by_name(machine)
    if (lacks := shortfall(trace.spec, found_machine, gpu_bytes)) is not None:
        return [PolicyRow(name, does_not_fit=lacks.in_words()) for name in names]
    experts_room(trace.spec, found_machine, gpu_bytes)  # refuses GPU memory that the machine does not have
    rows = []
    spans = {name: Timeline() if plot is not None else None for name in names}
    for name in names:
        try:
            found = replay(rest, make_policy(name), found_machine, gpu_bytes=gpu_bytes, heat=heat, timeline=spans[name])
        except BudgetError as error:  # a policy that wants more slots than there is room for
            rows.append(PolicyRow(name, does_not_fit=f"does not fit: {error}"))
            continue
        rows.append(
            PolicyRow(
                policy=name,
                prefill_tok_s=found.prefill.tok_s,
                decode_tok_s=found.decode.tok_s,
                hit_rate=found.decode.hit_rate,
                bytes_moved=found.moved_bytes,
                share=found.decode.share,
                slots=found.slots,
                own_share=found.decode.own_share,
                prefill_own_share=found.prefill.own_share,
                belady_hit_rate=found.belady_rate,
                belady_share=found.belady_share,
                disk_bytes=int(found.lanes[Lane.DISK][1]),
            )
        )
    spans = {row.policy: spans[row.policy] for row in rows if row.does_not_fit is None}
    if plot is not None and spans:
        draw({name: timeline for name, timeline in spans.items() if timeline is not None}, plot, f"on {machine}")
    return rows


def _halves(trace: Trace) -> tuple[dict[Expert, float], Trace]:
    middle = len(trace.passes) // 2
    return replace(trace, passes=trace.passes[:middle]).heat(), replace(trace, passes=trace.passes[middle:])


def draw(timelines: Mapping[str, Timeline], path: Path, title: str) -> None:
    """Draw what each policy's lanes do in a few layers of one token, half-way through the trace.

    Raises:
        RequestError: matplotlib is not installed.
    """
    pyplot = plotting()
    figure, axes = pyplot.subplots(len(timelines), 1, figsize=(9, 1.1 * len(timelines)), squeeze=False)
    lanes = {Lane.GPU: 2, Lane.LINK: 1, Lane.CPU: 0}
    colours = {"dense": "#9aa5b1", "expert": "#2f7ed8", "copy": "#d9822b", "guess": "#f2c57c"}
    for (name, timeline), row in zip(timelines.items(), axes[:, 0], strict=True):
        begins = [start for lane, (_, expert), start, _, _ in timeline.spans if expert < 0 and lane is not Lane.DISK]
        first = len(begins) // 2
        begin_s, end_s = begins[first], begins[min(first + _DRAWN_LAYERS, len(begins) - 1)]
        for lane, _, start_s, stop_s, kind in timeline.spans:
            if lane in lanes and stop_s > begin_s and start_s < end_s:
                span = ((max(start_s, begin_s) - begin_s) * 1e3, (min(stop_s, end_s) - max(start_s, begin_s)) * 1e3)
                row.broken_barh([span], (lanes[lane] + 0.1, 0.8), color=colours[kind])
        row.set(
            xlim=(0, (end_s - begin_s) * 1e3), ylim=(0, 3), yticks=[0.5, 1.5, 2.5], yticklabels=["CPU", "link", "GPU"]
        )
        row.tick_params(labelsize=7)
        row.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=30)
    axes[-1, 0].set_xlabel(f"ms, {_DRAWN_LAYERS} layers of one token, each row at its own scale; {title}")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colours[kind]) for kind in ("dense", "expert", "copy", "guess")]
    figure.legend(handles, ["dense", "expert", "copy", "guessed copy"], loc="upper right", ncols=4, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path, metadata={"Date": None})


@dataclass(frozen=True, slots=True)
class Reading:
    """A model and what it reads.

    text: a file; None for random tokens from the source's seed. tokens: to decode in all. prompt_tokens, decode_tokens:
    of each piece of the text.
    """

    model: str | None
    source: ModelOptions
    text: str | None
    tokens: int
    prompt_tokens: int
    decode_tokens: int

    @property
    def name(self) -> str:
        """The model's name, or its shape's."""
        return self.model or self.source.shape or ""

    @property
    def pieces(self) -> dict[str, Any]:
        """The lengths of a piece as `read_pieces` takes them."""
        return {"prompt_tokens": self.prompt_tokens, "decode_tokens": self.decode_tokens}

    def load(self, **options: Any) -> Any:
        """Load the model with options of `moestro.load`."""
        drawn = {} if self.source.shape is not None else {"seed": 0}  # then only tokens are drawn
        return load(self.model, **self.source.to_dict() | drawn, **options)

    def ids(self, loaded: Any) -> tuple[torch.Tensor, str | None]:
        """The tokens to read, int64 [tokens], and their text where there is one."""
        if self.text is None:
            pieces = -(-self.tokens // self.decode_tokens) + 2  # the two halves may each end within one
            size = pieces * (self.prompt_tokens + self.decode_tokens)
            random = torch.Generator().manual_seed(self.source.seed)
            return torch.randint(loaded.config.get_text_config().vocab_size, (size,), generator=random), None
        words = read_text(self.text)
        trusted = self.source.trust_remote_code
        tokenizer = load_tokenizer(self.model, shape=self.source.shape, trust_remote_code=trusted)
        return encode(tokenizer, words), words

    def record(self, lookahead: int = LOOKAHEAD) -> Trace:
        """Run the model on the CPU and record a trace, with guesses for `lookahead` later layers."""
        loaded = self.load(device="cpu")
        ids, words = self.ids(loaded)
        return trace_ids(loaded, self.name, ids, words, tokens=self.tokens, lookahead=lookahead, **self.pieces)


def compare_by_replay(
    reading: Reading, trace_path: str | None, options: ReplayOptions, names: Sequence[str], plot: Path | None
) -> PoliciesReport:
    """Replay policies on a virtual machine: `moestro bench policies` without `--live`.

    Args:
        trace_path: a trace; None to make one of `reading`.
        plot: where to draw what each policy's lanes do.

    Raises:
        RequestError: both a trace and a model or text, no such file, or no matplotlib to draw with.
    """
    if plot is not None:  # refused before the work
        plotting()
        writable(str(plot))
    if trace_path is None:
        trace = reading.record()
    elif reading.name or reading.text is not None:
        raise RequestError("--trace has its own model and text; leave MODEL, --shape and --text out")
    else:
        trace = Trace.load(Path(trace_path))
    trace = resized(trace, options.as_shape, options.bits)
    profile = None
    if options.profile is not None:
        profile = resized(Trace.load(Path(options.profile)), options.as_shape, options.bits)
    rows = compare(trace, options.machine, options.gpu_bytes, names, plot, profile)
    return PoliciesReport(f"replay of {trace.model} on {options.machine}", tuple(rows))


def compare_live(reading: Reading, options: ReplayOptions, names: Sequence[str]) -> PoliciesReport:
    """Run the model under each policy on the same tokens: on the GPU there is, or on the machine's virtual clock."""
    on_gpu = torch.cuda.is_available()
    how: dict[str, Any] = (
        {"device": "cuda", "context": sum(reading.pieces.values())}
        if on_gpu
        else {"device": "emulated", "clock": "virtual", "machine": options.machine}
    )
    how |= {"gpu_memory": options.gpu_memory, "bits": options.bits}
    loaded = reading.load(device="cpu", bits=options.bits)
    ids, _ = reading.ids(loaded)
    half = reading.tokens // 2
    profile = trace_ids(loaded, reading.name, ids, tokens=half, **reading.pieces)
    rest = ids[sum(one.tokens for one in profile.passes) :]
    del loaded
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.trace"
        profile.save(path)
        for name in names:
            running = reading.load(policy=name, profile=str(path), **how)
            rows.append(_live_row(name, running, rest, reading.tokens - half, reading.pieces))
            running.moestro.close()
            del running
            if on_gpu:  # memory that torch keeps would count as taken
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
    where = torch.cuda.get_device_name() if on_gpu else f"{options.machine}'s virtual clock"
    return PoliciesReport(f"{reading.name} live on {where}", tuple(rows))


def _live_row(name: str, model: Any, ids: torch.Tensor, tokens: int, pieces: dict[str, Any]) -> PolicyRow:
    seconds, counted = dict.fromkeys(Phase, 0.0), dict.fromkeys(Phase, 0)
    conductor = model.moestro
    conductor.listener = limit = HybridLimit(conductor.spec, conductor.costs)
    for phase, count, took_s in read_pieces(model, ids.to(model.device), tokens=tokens, **pieces):
        seconds[phase] += took_s
        counted[phase] += count
    counters = conductor.counters
    used = counters.hits + counters.joined + counters.misses
    return PolicyRow(
        policy=name,
        prefill_tok_s=counted[Phase.PREFILL] / seconds[Phase.PREFILL],
        decode_tok_s=counted[Phase.DECODE] / seconds[Phase.DECODE],
        hit_rate=counters.hits / used if used else 0.0,
        bytes_moved=counters.moved_bytes,
        share=limit.seconds / seconds[Phase.DECODE] if conductor.costs.cpu_gbps else None,  # needs rates
        slots=len(conductor.slots),
    )
