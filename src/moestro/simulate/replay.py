"""Runs a policy over a recorded trace on a virtual machine: the policy objects that run live, without a GPU.

    >>> from moestro.planning.policies import make_policy
    >>> from moestro.planning.machines import machine_named
    >>> replay(trace, make_policy("lru"), machine_named("t4-colab"), gpu_bytes=12 * 2**30).decode.tokens
    3

A conductor without tensors: it asks, checks and carries out in the same order as the live one (dispatch.py), on a
virtual clock. What the model would have computed is not known here, and nothing depends on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import BudgetError
from ..planning.budget import format_bytes
from ..planning.check import check, check_moves
from ..planning.clock import Share
from ..planning.contract import Decision, Expert, Lane, ModelSpec, Move, Outcome, Phase, Policy, Step, StepInfo
from ..planning.costs import Costs
from ..planning.dispatch import Found, classify, dispatch
from ..planning.machines import Machine
from ..planning.plan import experts_room
from ..planning.policies.base import hybrid_limit_s
from ..planning.slots import SlotTable, Transfer
from ..planning.timeline import Timeline
from ..planning.view import TableView
from .belady import belady_hits
from .trace import Trace
from .virtual import machine_clock


@dataclass(slots=True)
class PhaseFigures:
    """What a replay found of prefill or decode.

    step_limit_s, link_limit_s: the least time that the method's own arithmetic allows at its hits, for steps one after
    another and for the link beside them. hybrid_s: that of any method at these hits.
    link_busy_s: what really crossed.
    """

    tokens: int = 0
    seconds: float = 0.0
    step_limit_s: float = 0.0
    link_limit_s: float = 0.0
    link_busy_s: float = 0.0
    hybrid_s: float = 0.0
    hits: int = 0
    joined: int = 0
    misses: int = 0

    @property
    def tok_s(self) -> float:
        """Tokens a second; 0 where there were none."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def hit_rate(self) -> float:
        """Hits of all (expert, step) pairs."""
        used = self.hits + self.joined + self.misses
        return self.hits / used if used else 0.0

    @property
    def own_share(self) -> float:
        """Of the method's own limit."""
        link_s = min(self.link_limit_s, self.link_busy_s)  # what was still queued at the end did not cross
        return max(self.step_limit_s, link_s) / self.seconds if self.seconds else 0.0

    @property
    def share(self) -> float:
        """Of the hybrid limit at this policy's own hit rate."""
        return self.hybrid_s / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Replay:
    """The figures of one replay.

    lanes: lane -> (seconds busy, bytes). belady_rate: the best hit rate of decode that any policy which loads only what
    is asked for could have with these slots. belady_share: of the hybrid limit at that rate.
    """

    policy: str
    machine: str
    slots: int
    prefill: PhaseFigures
    decode: PhaseFigures
    seconds: float
    lanes: dict[Lane, tuple[float, float]]
    belady_rate: float
    belady_share: float
    moved_bytes: int

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it; the first six names are those of a row of `moestro bench policies`."""
        return {
            "policy": self.policy,
            "prefill_tok_s": self.prefill.tok_s,
            "decode_tok_s": self.decode.tok_s,
            "hit_rate": self.decode.hit_rate,
            "bytes_moved": self.moved_bytes,
            "share": self.decode.share,
            "own_share": self.decode.own_share,
            "prefill_own_share": self.prefill.own_share,
            "belady_hit_rate": self.belady_rate,
            "belady_share": self.belady_share,
            "hits": self.decode.hits,
            "joined": self.decode.joined,
            "misses": self.decode.misses,
            "slots": self.slots,
            "machine": self.machine,
            "lanes": {
                lane.value: {"busy_s": busy_s, "idle_s": max(0.0, self.seconds - busy_s), "bytes": int(n_bytes)}
                for lane, (busy_s, n_bytes) in self.lanes.items()
            },
        }


def replay(
    trace: Trace,
    policy: Policy,
    machine: Machine,
    *,
    gpu_bytes: int | None = None,
    heat: dict[Expert, float] | None = None,
    timeline: Timeline | None = None,
) -> Replay:
    """Run `policy` over `trace` as if on `machine`.

    Args:
        gpu_bytes: the GPU's memory for dense weights and experts; None for all that the machine has.
        heat: the profile that the policy places by; None for none.

    Raises:
        BudgetError: the dense part does not fit. ContractError: a decision that cannot be carried out.
    """
    run = _Run(trace.spec, policy, machine, gpu_bytes, heat or {}, timeline)
    for one in trace.passes:
        run.begin(StepInfo.alike(one.phase, one.tokens))
        for step in one.steps:
            run.layer(step, one.tokens)
        run.end()
    return run.result(trace)


class _Run:
    """The state of one replay."""

    def __init__(
        self,
        spec: ModelSpec,
        policy: Policy,
        machine: Machine,
        gpu_bytes: int | None,
        heat: dict[Expert, float],
        timeline: Timeline | None,
    ) -> None:
        self.spec, self.policy, self.machine, self.costs = spec, policy, machine, machine.costs
        room_bytes = experts_room(spec, machine, gpu_bytes)
        placement = policy.place(spec, room_bytes, heat)
        self.slots = SlotTable(len(placement.held) + placement.slots, placement.held, placement.warm)
        if len(self.slots) * spec.slot_bytes > room_bytes:
            raise BudgetError(
                f"{policy.name} wants {len(self.slots)} experts on the GPU, "
                f"{format_bytes(len(self.slots) * spec.slot_bytes)}, but {format_bytes(room_bytes)} are left for them"
            )
        self.clock = machine_clock(spec, placement, machine, timeline)
        everyone = {(layer, expert) for layer, of in enumerate(spec.layers) for expert in range(of.experts)}
        self.view = TableView(self.slots, self.clock, everyone - placement.held)
        self.figures = {phase: PhaseFigures() for phase in Phase}
        self._now = self.figures[Phase.PREFILL]
        self._limits: dict[Any, tuple[float, float, float]] = {}  # which depend on counts alone
        self._begun_s = self._link_s = 0.0

    def begin(self, info: StepInfo) -> None:
        self._begun_s, self._link_s = self.clock.now_s, self.clock.link.busy_s
        self._now = self.figures[info.phase]
        self._now.tokens += info.tokens
        moves = self.policy.begin(info, self.view, self.costs)
        if moves:
            check_moves(moves, self.view, self.spec, "before the first layer")
            for move in moves:
                self._start(move, None)

    def layer(self, step: Step, tokens: int) -> None:
        clock = self.clock
        clock.begin_layer(step.layer, tokens)
        start_s = clock.now_s
        found = classify(step, self.slots)
        decision = self.policy.decide(step, self.view, self.costs)
        check(decision, step, self.view, self.spec)
        moved_before = self.slots.moved_bytes
        dispatch(decision, step.layer, self.slots, self._start, partial(self._run_gpu, step, decision))
        cpu = sorted(decision.cpu.items())
        clock.run_cpu([Share((step.layer, e), step.tokens[e], len(neurons)) for e, neurons in cpu])
        cpu_s = clock.lane_free_s(Lane.CPU) - start_s
        clock.end_layer()
        self.slots.release(step.layer)
        moved = self.slots.moved_bytes - moved_before
        done = Outcome(step.layer, step.phase, *found, moved_bytes=moved, cpu_s=cpu_s, wall_s=clock.now_s - start_s)
        self._account(step, found, done, tokens, moved)
        self.policy.observe(done)

    def end(self) -> None:
        self._now.seconds += self.clock.now_s - self._begun_s
        self._now.link_busy_s += min(self.clock.link.busy_s - self._link_s, self.clock.now_s - self._begun_s)

    def _start(self, move: Move, after: float | None) -> None:
        layer = self.spec.layers[move.expert[0]]
        n_bytes = layer.share_bytes(move.neurons)

        def fill(_: int, before: Transfer | None) -> tuple[Transfer, float]:
            copy = self.clock.copy(move.expert, n_bytes, move.urgent, after or 0.0, before)
            return copy, self.clock.arrival_s(copy, move.urgent)

        self.slots.load(move.expert, move.evict, fill, n_bytes, move.keep, move.urgent, move.neurons is not None)

    def _run_gpu(self, step: Step, decision: Decision, experts: list[int], after: Transfer | None) -> float:
        shares = [Share((step.layer, e), step.tokens[e], len(decision.gpu[e])) for e in experts]
        return self.clock.run_gpu(shares, after)

    def _account(self, step: Step, found: Found, done: Outcome, tokens: int, moved: int) -> None:
        figures = self._now
        figures.hits += len(found.hits)
        figures.joined += len(found.joined)
        figures.misses += len(found.misses)
        if tokens == 1:  # as in most steps: then only how many there are of each kind matters
            kinds: tuple[Any, ...] = (len(found.hits), len(found.joined), len(found.misses))
        else:
            kinds = tuple(tuple(step.tokens[e] for e in experts) for experts in found[:3])
        key = (step.phase is Phase.DECODE, step.layer, tokens, moved, found.joined_bytes, kinds)
        limits = self._limits.get(key)
        if limits is None:
            dense_s = self.clock.dense_s(tokens)
            hybrid_s = dense_s + hybrid_limit_s(self.spec.layers[step.layer], step, done, self.costs)
            limits = self._limits[key] = (*self.policy.bound(step, done, self.costs, dense_s), hybrid_s)
        figures.step_limit_s += limits[0]
        figures.link_limit_s += limits[1]
        figures.hybrid_s += limits[2]

    def result(self, trace: Trace) -> Replay:
        rate, limit_s = belady_limit(trace, len(self.slots), self.costs, self.clock.dense_s)
        decode = self.figures[Phase.DECODE]
        return Replay(
            policy=self.policy.name,
            machine=self.machine.name,
            slots=len(self.slots),
            prefill=self.figures[Phase.PREFILL],
            decode=decode,
            seconds=self.clock.now_s,
            lanes=self.clock.lanes(),
            belady_rate=rate,
            belady_share=limit_s / decode.seconds if decode.seconds else 0.0,
            moved_bytes=self.slots.moved_bytes,
        )


def belady_limit(trace: Trace, slots: int, costs: Costs, dense_s: Callable[[int], float]) -> tuple[float, float]:
    """Belady's hit rate in decode with so many slots, and the hybrid limit of decode at it, in seconds."""
    passes = [one for one in trace.passes if one.phase is Phase.DECODE]
    steps = [step for one in passes for step in one.steps]
    rows = [one.tokens for one in passes for _ in one.steps]
    hits = belady_hits([[(step.layer, e) for e in step.tokens] for step in steps], slots)
    found = sum(map(len, hits))
    used = sum(len(step.tokens) for step in steps)
    limits: dict[Any, float] = {}
    total_s = 0.0
    for step, hit, tokens in zip(steps, hits, rows, strict=True):
        key = (step.layer, tokens, tuple(step.tokens[e] for _, e in sorted(hit)), *sorted(step.tokens.values()))
        if key not in limits:
            missed = tuple(e for e in step.tokens if (step.layer, e) not in hit)
            done = Outcome(step.layer, step.phase, tuple(e for _, e in hit), (), missed, 0, 0, 0.0, 0.0)
            limits[key] = dense_s(tokens) + hybrid_limit_s(trace.spec.layers[step.layer], step, done, costs)
        total_s += limits[key]
    return found / used if used else 0.0, total_s
