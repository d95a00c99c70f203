"""Replay a trace and print its figures, record what a run does: behind `moestro run`, `trace` and `replay`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..console import print_lines, print_table
from ..machine.measure import machine_by_name
from ..planning.budget import format_bytes
from ..planning.options import ReplayOptions
from ..planning.policies import make_policy
from ..planning.timeline import Timeline
from ..simulate.replay import PhaseFigures, Replay, replay
from ..simulate.reshape import resized
from ..simulate.trace import Trace


def run_replay(path: str, options: ReplayOptions, timeline: Path | None) -> Replay:
    """Replay a trace file.

    Args:
        timeline: the file to write what each lane did; None for no such file.
    """

    def load_trace(path: str) -> Trace:
        return resized(Trace.load(Path(path)), options.as_shape, options.bits)

    trace = load_trace(path)
    heat = None if options.profile is None else load_trace(options.profile).heat_for(trace.spec)
    spans = None if timeline is None else Timeline()
    machine = machine_by_name(options.machine)
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
