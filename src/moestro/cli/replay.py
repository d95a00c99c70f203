"""Replay a trace and print its figures, record what a run does: behind `moestro run`, `trace` and `replay`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..console import print_lines, print_table
from ..machine.measure import machine_by_name
from ..planning.budget import format_bytes
from ..planning.contract import Lane
from ..planning.machines import Machine
from ..planning.options import ReplayOptions
from ..planning.policies import make_policy
from ..planning.shapes import spec_of_shape
from ..planning.timeline import Timeline
from ..simulate.expand import expanded_ends
from ..simulate.fit import Shortfall, shortfall
from ..simulate.replay import PhaseFigures, Replay, replay
from ..simulate.reshape import at_bits, resized
from ..simulate.routing import Routing, routing_of
from ..simulate.trace import Trace

SHAPE_TOKENS = 256  # to decode of a shape that is known by parameters


@dataclass(frozen=True, slots=True)
class TraceReplay:
    """What a policy does with a trace, or why the model that the trace is of does not fit."""

    options: ReplayOptions
    model: str
    lacks: Shortfall | None
    found: Replay | None

    def to_json(self) -> dict[str, Any]:
        """The figures, which are null where the model does not fit."""
        if self.found is not None:
            return self.found.to_json() | {"does_not_fit": None}
        assert self.lacks is not None
        return {
            **_unknown(self.options),
            **dict.fromkeys(("prefill_tok_s", "decode_tok_s", "hit_rate")),
            "does_not_fit": self.lacks.to_json(),
        }

    def print(self) -> None:
        """Print speeds, hits and lanes."""
        if self.found is not None:
            print_replay(self.found)
        elif self.lacks is not None:
            print(f"{self.model} on {self.options.machine} {self.lacks.in_words()}")


@dataclass(frozen=True, slots=True)
class ShapeReplay:
    """What a policy does with a shape, at both ends of what is known of its routing, or why it does not fit."""

    options: ReplayOptions
    routing: Routing
    lacks: Shortfall | None
    ends: tuple[Replay, ...]

    def to_json(self) -> dict[str, Any]:
        """Ranges, the routing with its sources, and the whole figures of both ends."""
        return {
            **_unknown(self.options),
            "shape": self.routing.shape,
            "prefill_tok_s": self._range(_prefill) or None,
            "decode_tok_s": self._range(_decode) or None,
            "hit_rate": self._range(_hit_rate) or None,
            "does_not_fit": None if self.lacks is None else self.lacks.to_json(),
            "routing": self.routing.to_json(),
            "low_routing": self.ends[0].to_json() if self.ends else None,
            "high_routing": self.ends[1].to_json() if self.ends else None,
        }

    def _range(self, figure: Callable[[Replay], float]) -> list[float]:
        return sorted(figure(end) for end in self.ends)

    def print(self) -> None:
        """Print ranges of speeds and hits, and what they stand on."""
        shape, machine = self.routing.shape, self.options.machine
        if self.lacks is not None:
            print(f"{shape} on {machine} {self.lacks.in_words()}")
            return
        low, high = self.ends
        print(f"{self.options.policy} on {machine}, {shape} by parameters, {low.slots} experts in GPU memory")
        for name, slow, fast in (("prefill", *self._range(_prefill)), ("decode", *self._range(_decode))):
            print(f"{name:8} {slow:.2f} to {fast:.2f} tok/s")
        hits = self._range(_hit_rate)
        print(f"hits     {hits[0]:.1%} to {hits[1]:.1%}; Belady's {low.belady_rate:.1%} to {high.belady_rate:.1%}")
        if read := max(end.lanes[Lane.DISK][1] for end in self.ends):
            print(f"disk     {format_bytes(read)} read, since the RAM lacks room for experts; a run would be refused")
        print(f"routing  {self.routing.in_words()}\n         not recorded from the model; --json has the sources")


def _prefill(end: Replay) -> float:
    return end.prefill.tok_s


def _decode(end: Replay) -> float:
    return end.decode.tok_s


def _hit_rate(end: Replay) -> float:
    return end.decode.hit_rate


def _unknown(options: ReplayOptions) -> dict[str, Any]:
    return {"policy": options.policy, "machine": options.machine}


def replayed(trace: str | None, options: ReplayOptions, timeline: Path | None) -> TraceReplay | ShapeReplay:
    """Replay a trace file, or without one the shape that the options name.

    Args:
        timeline: the file to write what each lane did, for a shape at the lower end; None for no such file.
    """
    return replay_shape(options, timeline) if trace is None else replay_trace(trace, options, timeline)


def replay_trace(path: str, options: ReplayOptions, timeline: Path | None) -> TraceReplay:
    """Replay a trace file, where the machine holds its model."""
    trace = _resized_file(path, options)
    machine = machine_by_name(options.machine)
    lacks = shortfall(trace.spec, machine, options.gpu_bytes)
    found = None if lacks is not None else _replay(trace, options, machine, timeline)
    return TraceReplay(options, trace.model, lacks, found)


def replay_shape(options: ReplayOptions, timeline: Path | None) -> ShapeReplay:
    """Replay a shape whose routing is known as parameters, at both ends of their ranges."""
    assert options.shape is not None
    routing, machine = routing_of(options.shape), machine_by_name(options.machine)
    spec = at_bits(spec_of_shape(options.shape), options.bits)
    if (lacks := shortfall(spec, machine, options.gpu_bytes)) is not None:
        return ShapeReplay(options, routing, lacks, ())
    ends: list[Replay] = []
    for trace in expanded_ends(options.shape, options.bits, tokens=SHAPE_TOKENS):
        ends.append(_replay(trace, options, machine, None if ends else timeline))
    return ShapeReplay(options, routing, None, tuple(ends))


def _resized_file(path: str, options: ReplayOptions) -> Trace:
    return resized(Trace.load(Path(path)), options.as_shape, options.bits)


def _replay(trace: Trace, options: ReplayOptions, machine: Machine, timeline: Path | None) -> Replay:
    heat = None if options.profile is None else _resized_file(options.profile, options).heat_for(trace.spec)
    spans = None if timeline is None else Timeline()
    gpu_bytes = options.gpu_bytes
    found = replay(trace, make_policy(options.policy), machine, gpu_bytes=gpu_bytes, heat=heat, timeline=spans)
    if timeline is not None and spans is not None:
        spans.save(timeline)
    return found


def print_replay(found: Replay) -> None:
    """Print speeds, hits and lanes."""
    print_lines(f"{found.policy} on {found.machine}, {found.slots} experts in GPU memory")
    for name, phase in (("prefill", found.prefill), ("decode", found.decode)):
        print_lines(_line(name, phase))
    print_lines(
        f"Belady's hit rate with these slots {found.belady_rate:.1%}; {found.belady_share:.2f} of the limit there"
    )
    rows = [
        (lane.value, f"{busy_s:.3f} s", f"{max(0.0, found.seconds - busy_s):.3f} s", format_bytes(n_bytes))
        for lane, (busy_s, n_bytes) in found.lanes.items()
    ]
    print_table(("lane", "busy", "idle", "moved or read"), rows)


def _line(name: str, phase: PhaseFigures) -> str:
    if not phase.tokens:
        return f"{name:8} no tokens in the trace"
    return (
        f"{name:8} {phase.tok_s:8.2f} tok/s   {phase.tokens} tokens   hit {phase.hits}, joined {phase.joined}, "
        f"miss {phase.misses}   {phase.share:.2f} of the hybrid limit, {phase.own_share:.2f} of its own"
    )


def print_summary(summary: dict[str, Any]) -> None:
    """Print the summary of a trace."""
    print_lines(
        f"{summary['model']}: {summary['layers']} layers of {summary['experts']} experts, top-{summary['top_k']}; "
        f"{summary['prefill_tokens']} prompt tokens, {summary['decode_tokens']} decoded"
    )
    popular = summary["popularity"]
    print_lines(
        f"popularity   the hottest expert {popular['hottest']:.2f} x the mean, the coldest {popular['coldest']:.2f} x, "
        f"the hottest quarter {popular['hottest_quarter']:.1%} of all uses"
    )
    reuse = "   ".join(f"{n}: {share:.1%}" for n, share in summary["reuse"].items())
    print_lines(f"reused within so many tokens   {reuse}")
    for ahead, rates in summary["recall"].items():
        found = "   ".join(f"{n}: {rate:.3f}" for n, rate in rates.items() if rate is not None)
        print_lines(f"recall {ahead} layer{'s' if ahead > 1 else ''} ahead, by experts guessed   {found or 'no gate'}")
    agreement = [share for share in summary["gate_agreement"] if share is not None]
    if len(agreement) < summary["layers"]:
        print_lines(f"no gate was found for {summary['layers'] - len(agreement)} of {summary['layers']} layers")
    if agreement and min(agreement) < 0.99:
        print_lines(f"gates give only {min(agreement):.1%} of their own layer's choices: this family routes otherwise")


@contextmanager
def timed(model: Any, target: Path | None) -> Iterator[None]:
    """Write what GPU, link and CPU do inside the block to a file as a Chrome trace; without a file do nothing."""
    if target is None:
        yield
        return
    timeline = Timeline()
    with model.moestro.note_on(timeline):
        yield
    timeline.save(target)


@contextmanager
def traced(model: Any, target: Path | None, name: str, text: str) -> Iterator[None]:
    """Write what the model's routers choose inside the block to a file as a trace; without a file do nothing."""
    if target is None:
        yield
        return
    from ..text.tracing import listening

    with listening(model) as listener:
        yield
    listener.trace(model, name, text).save(target)
