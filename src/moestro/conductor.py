"""The conductor: one MoE layer step, from the router's choice to the combined output.

Asks the policy, checks its decision, starts copies, lets the device compute what is in slots while the
CPU computes the rest, and adds the parts in float32. Nothing else in the package moves weights. Does not
know families or checkpoints: `plug.py` builds it and calls `run_layer`.

Legend: T tokens, K top-k, D model width.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from .compute.cpu import CpuExperts, KernelShape
from .compute.devices import Device, Queued
from .compute.experts import ExpertMath, ExpertWork
from .memory.formats import BLOCK
from .memory.slots import SlotPool, Transfer
from .memory.store import ExpertStore
from .planning.contract import (
    GPU0,
    RAM,
    Costs,
    Decision,
    Expert,
    Lane,
    ModelSpec,
    Move,
    Outcome,
    Phase,
    Place,
    Policy,
    Step,
    check,
    check_moves,
)


@dataclass(slots=True)
class Counters:
    """What was done so far. Hits, joins and misses count (expert, step) pairs of decode."""

    layer_steps: int = 0
    tokens: int = 0  # summed over layer steps
    hits: int = 0
    joined: int = 0
    misses: int = 0
    moved_bytes: int = 0


class Routed(NamedTuple):
    """The tokens of one expert in a step: `span` of the step's rows, int64, and routing weights, float32; their sum."""

    step_rows: Tensor
    step_weights: Tensor
    span: range
    mass: float

    def work(self, packed: Tensor, neurons: range) -> ExpertWork:
        """What these tokens ask of an expert's neurons."""
        return ExpertWork(packed, neurons, self.step_rows, self.step_weights, self.span)


def group_by_expert(index: Tensor, weights: Tensor, experts: int) -> dict[int, Routed]:
    """Sort a router's choice by expert.

    Skipped are an index of `experts` or more, which is not ours (expert parallelism), and a weight of
    exactly 0, by which some families say "no expert".

    Args:
        index: int64 [T, K] on the host. weights: float32 [T, K].

    Returns:
        expert -> its tokens, in ascending order of expert, only experts with at least one token.
    """
    if index.shape[0] == 1 and (alone := _group_one_token(index, weights, experts)) is not None:
        return alone
    flat = index.clamp(max=experts).where(weights != 0, experts).reshape(-1)  # [T*K]
    order = torch.argsort(flat, stable=True)  # [T*K]
    counts = torch.bincount(flat, minlength=experts + 1)[:experts].tolist()
    masses = torch.bincount(flat, weights.reshape(-1), minlength=experts + 1).tolist()
    rows, sorted_weights = order // index.shape[1], weights.reshape(-1)[order]
    groups: dict[int, Routed] = {}
    start = 0
    for expert, count in enumerate(counts):
        if count:
            groups[expert] = Routed(rows, sorted_weights, range(start, start + count), masses[expert])
            start += count
    return groups


def _group_one_token(index: Tensor, weights: Tensor, experts: int) -> dict[int, Routed] | None:
    """The same without sorting tensors, which costs more than the step itself; None if it chose an expert twice."""
    flat, rows = weights.view(-1), _zeros(index.shape[1])
    choices = enumerate(zip(*index.tolist(), flat.tolist(), strict=True))
    ours = sorted((expert, i, mass) for i, (expert, mass) in choices if expert < experts and mass != 0)
    groups = {expert: Routed(rows, flat, range(i, i + 1), mass) for expert, i, mass in ours}
    return groups if len(groups) == len(ours) else None


@functools.cache
def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


@dataclass
class Conductor:
    """Carries out a policy's decisions for one model.

    math: for each MoE layer, what its experts compute.
    """

    spec: ModelSpec
    math: Sequence[ExpertMath]
    policy: Policy
    device: Device
    store: ExpertStore
    slots: SlotPool
    cpu: CpuExperts = field(default_factory=CpuExperts)
    costs: Costs = field(default_factory=Costs)
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        self.phase = Phase.PREFILL
        self.link_free_s = 0.0
        self._lock = threading.RLock()  # one layer step at a time, also when two threads generate

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model in Moestro's hands cannot be copied or pickled; load it again")

    @property
    def view(self) -> LiveView:
        """What a policy sees. Made anew, since keeping it would be a cycle that keeps the store alive."""
        return LiveView(self)

    def begin(self, tokens: int, phase: Phase) -> None:
        """Before the first layer of a step that adds `tokens` tokens to each sequence."""
        with self._lock:
            self.phase = phase
            moves = self.policy.begin(tokens, self.view, self.costs)
            check_moves(moves, self.view, self.spec, "before the first layer")
            self._start(moves)

    def run_layer(self, layer: int, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The experts of one layer, weighted and summed.

        Args:
            x: hidden states [T, D]. index: int [T, K], chosen experts. weights: float [T, K].

        Returns:
            [T, D] in the dtype and on the device of x.

        Raises:
            ContractError: the policy's decision cannot be carried out.
        """
        with self._lock:
            return self._run_layer(layer, x, index, weights)

    def only_choice(self, layer: int) -> tuple[KernelShape, list[Tensor]] | None:
        """What the kernels need of a layer about which there is nothing to decide; None of others.

        Without slots the contract allows one decision: all of an expert's neurons on the CPU. Who computes such a
        step elsewhere, in fewer calls, says so by `count_only_choice`; the policy is not asked.
        """
        experts = [(layer, expert) for expert in range(self.spec.layers[layer].experts)]
        shape = self.cpu.kernel_shape(self.math[layer])
        if self.slots or shape is None or not all(expert in self.store for expert in experts):
            return None
        return shape, [self.store[expert] for expert in experts]

    def count_only_choice(self, layers: int, experts: int) -> None:
        """Account for layer steps of one token, computed elsewhere by so many experts in all."""
        with self._lock:
            self.counters.layer_steps += layers
            self.counters.tokens += experts
            self.counters.misses += experts if self.phase is Phase.DECODE else 0

    def _run_layer(self, layer: int, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        start_s = time.perf_counter()
        host = self.device.read_router(index, weights, x)
        groups = group_by_expert(host.index, host.weights, self.spec.layers[layer].experts)
        step = Step(
            layer=layer,
            phase=self.phase,
            tokens={expert: len(routed.span) for expert, routed in groups.items()},
            mass={expert: routed.mass for expert, routed in groups.items()},
        )
        view = self.view
        decision = self.policy.decide(step, view, self.costs)
        check(decision, step, view, self.spec, BLOCK)
        found = self._classify(step)
        self._drop(decision.cancel)
        moved_bytes = self._start(decision.moves)
        try:
            queued = self._run_on_device(step, decision, x, groups)
            cpu_start_s = time.perf_counter()
            on_cpu = self._run_on_cpu(step, decision, host.x, groups)
            cpu_s = time.perf_counter() - cpu_start_s
            out = self.device.combine(x, on_cpu, queued)
        except BaseException:
            # Nobody knows what arrived: forget what was on its way for this step, so that the next one copies.
            self._forget((layer, expert) for expert in step.tokens if not self.slots.ready((layer, expert)))
            self._forget(move.expert for move in decision.moves if not self.slots.ready(move.expert))
            raise
        finally:
            self._release(step, decision)
        self._account(step, found, moved_bytes, cpu_s, time.perf_counter() - start_s)
        return out

    def _classify(self, step: Step) -> dict[str, tuple[int, ...]]:
        """Active experts by where they were when the step was decided: hits, joined, misses."""
        if not self.slots:
            return {"hits": (), "joined": (), "misses": tuple(step.tokens)}
        found: dict[str, list[int]] = {"hits": [], "joined": [], "misses": []}
        for expert in step.tokens:
            slot = self.slots.find((step.layer, expert))
            ready = slot is not None and self.slots.ready((step.layer, expert))
            found["misses" if slot is None else "hits" if ready else "joined"].append(expert)
        return {kind: tuple(experts) for kind, experts in found.items()}

    def _start(self, moves: Iterable[Move]) -> int:
        """Start copies; returns the bytes queued on the link."""
        queued_bytes = 0
        for move in moves:
            if self.slots.find(move.expert) is not None:
                continue
            experts = self.math[move.expert[0]]
            neurons = move.neurons or range(experts.shape.neurons)
            span = experts.format.byte_range(experts.shape, neurons)
            source = self.store[move.expert][span.start : span.stop]
            if self.costs.link_gbps:
                now_s = time.perf_counter()
                self.link_free_s = max(now_s, self.link_free_s) + len(span) / (self.costs.link_gbps * 1e9)

            def start(
                target: Tensor, source: Tensor = source, span: range = span, urgent: bool = move.urgent
            ) -> Transfer:
                return self.device.copy(source, target[span.start : span.stop], urgent)

            self.slots.load(move.expert, move.evict, start, self.link_free_s, move.keep)
            queued_bytes += len(span)
        return queued_bytes

    def _drop(self, cancel: Iterable[Expert]) -> None:
        for expert in cancel:
            slot = self.slots.find(expert)
            if slot is not None and slot.filling is not None and slot.filling.cancel():
                self.slots.forget(expert)

    def _run_on_device(self, step: Step, decision: Decision, x: Tensor, groups: dict[int, Routed]) -> list[Queued]:
        """Queue experts that are ready as one piece of work, then each that a copy is still bringing."""
        if not decision.gpu:
            return []
        ready: list[ExpertWork] = []
        arriving: list[tuple[ExpertWork, Transfer | None]] = []
        for expert, neurons in sorted(decision.gpu.items()):
            key = (step.layer, expert)
            slot = self.slots.find(key)
            assert slot is not None
            slot.pinned = True
            work = groups[expert].work(self.slots[key], neurons)
            if self.slots.ready(key):
                ready.append(work)
            else:
                arriving.append((work, slot.filling))
        experts = self.math[step.layer]
        queued = [self.device.run(experts, x, ready)] if ready else []
        return queued + [self.device.run(experts, x, [work], after=copy) for work, copy in arriving]

    def _run_on_cpu(self, step: Step, decision: Decision, x: Tensor, groups: dict[int, Routed]) -> Tensor | None:
        if not decision.cpu:
            return None
        out = torch.zeros(x.shape, dtype=torch.float32)
        work = [
            groups[expert].work(self.store[step.layer, expert], neurons)
            for expert, neurons in sorted(decision.cpu.items())
        ]
        self.cpu.run(self.math[step.layer], x, work, out)
        return out

    def _release(self, step: Step, decision: Decision) -> None:
        """Unpin what the step used and empty the slots that were only borrowed for it."""
        for expert in decision.gpu:
            if (slot := self.slots.find((step.layer, expert))) is not None:
                slot.pinned = False
        self._forget(self.slots.borrowed(step.layer))

    def _forget(self, experts: Iterable[Expert]) -> None:
        for expert in experts:
            if self.slots.find(expert) is not None:
                self.slots.forget(expert)

    def _account(
        self, step: Step, found: dict[str, tuple[int, ...]], moved_bytes: int, cpu_s: float, wall_s: float
    ) -> None:
        counters = self.counters
        counters.layer_steps += 1
        counters.tokens += sum(step.tokens.values())
        counters.moved_bytes += moved_bytes
        if step.phase is Phase.DECODE:
            counters.hits += len(found["hits"])
            counters.joined += len(found["joined"])
            counters.misses += len(found["misses"])
        self.policy.observe(
            Outcome(step.layer, step.phase, **found, moved_bytes=moved_bytes, cpu_s=cpu_s, wall_s=wall_s)
        )

    def close(self) -> None:
        """Stop the device's threads. The model cannot be used after."""
        self.device.close()


@dataclass(frozen=True, slots=True)
class LiveView:
    """Where experts are now, on the wall clock."""

    conductor: Conductor

    @property
    def now_s(self) -> float:
        return time.perf_counter()

    def ready_s(self, expert: Expert, at: Place) -> float:
        if at is RAM or at == RAM:
            return 0.0 if expert in self.conductor.store else float("inf")
        slot = self.conductor.slots.find(expert) if at == GPU0 else None
        if slot is None:
            return float("inf")
        now_s = self.now_s
        # Later than now while it is in flight, also where no rate is known to say when.
        return now_s if self.conductor.slots.ready(expert) else max(slot.eta_s, math.nextafter(now_s, math.inf))

    def evictable(self, at: Place, layer: int) -> Collection[Expert]:
        return self.conductor.slots.evictable() if at == GPU0 else ()

    def free_slots(self, at: Place, layer: int) -> int:
        return self.conductor.slots.empty() if at == GPU0 else 0

    def lane_free_s(self, lane: Lane) -> float:
        return self.conductor.link_free_s if lane is Lane.LINK else self.now_s
