"""One MoE layer step, from what the router chose to the CPU's part of the sum: decide, check, dispatch, wait, account.

Asks the policy, checks its decision, starts copies, queues on the device what is in slots, and computes the rest on the
CPU meanwhile. What is done in which order is `planning/dispatch.py`'s; the clock is told of it, the wall's or a virtual
one.

Legend: T tokens, K top-k, D model width.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..compute.cpu import CpuExperts
from ..compute.experts import ExpertMath
from ..devices import Device, HostBatch, Queued, StepSum
from ..errors import CopyError
from ..memory.slots import SlotPool
from ..memory.store import ExpertStore
from ..planning.check import check
from ..planning.clock import Clock, Share
from ..planning.contract import Costs, Decision, Lane, ModelSpec, Move, Outcome, Phase, Policy, Step
from ..planning.dispatch import classify, dispatch
from ..planning.slots import Transfer
from ..planning.timeline import Timeline
from ..planning.view import TableView
from .copies import Copies
from .counters import Accounts, Listener
from .routing import Routed, group_by_expert

logger = logging.getLogger("moestro")


class Parts(Protocol):
    """What a layer step works with: a conductor's parts."""

    spec: ModelSpec
    math: list[ExpertMath]
    policy: Policy
    device: Device
    store: ExpertStore
    slots: SlotPool
    cpu: CpuExperts
    costs: Costs
    time: Clock
    view: TableView
    copies: Copies
    accounts: Accounts
    listener: Listener | None
    timeline: Timeline | None

    def end(self) -> None:
        """End the model's step."""


class _Ran(NamedTuple):
    """Experts queued on the device, and when its clock expects them to be done."""

    queued: Queued
    experts: list[int]
    end_s: float


@dataclass(slots=True)
class LayerStep:
    """A layer step that is being done.

    x: hidden states [T, D] on the host. total: the device's part of the sum. host_output: gives float32 zeros [T, D]
    for the CPU's part.
    """

    parts: Parts
    step: Step
    routed: Routed
    x: Tensor
    total: StepSum
    host_output: Callable[[], Tensor]
    ran: list[_Ran] = field(default_factory=list)
    decision: Decision = field(init=False)

    def run(self) -> tuple[Tensor | None, float]:
        """Do it as the policy decides.

        Returns:
            The CPU's part, float32 [T, D], or None where it has none, and the seconds that it took. The device's part
            is in `total` when its work is done.
        """
        parts, step = self.parts, self.step
        self.decision = decision = parts.policy.decide(step, parts.view, parts.costs)
        check(decision, step, parts.view, parts.spec)
        dispatch(decision, step.layer, parts.slots, self._copy, self._run_on_device)
        cpu_start_s = parts.time.now_s
        on_cpu = self._run_on_cpu(decision.cpu, None)
        cpu_s = parts.time.lane_free_s(Lane.CPU) - cpu_start_s
        if lost := self._wait():
            on_cpu = self._run_on_cpu({expert: decision.gpu[expert] for expert in lost}, on_cpu)
        parts.time.end_layer()
        return on_cpu, cpu_s

    def cancel(self) -> list[Queued]:
        """After a failure: cancel what the device has not begun; returns the rest, which must be waited for."""
        return [one.queued for one in self.ran if not one.queued.cancel()]

    def _copy(self, move: Move, after: _Ran | None) -> None:
        self.parts.copies.start(move, 0.0 if after is None else after.end_s)

    def _run_on_device(self, experts: list[int], after: Transfer | None) -> _Ran:
        """Queue experts on the device, behind a copy where they need its bytes."""
        parts, step, gpu = self.parts, self.step, self.decision.gpu
        keys = [(step.layer, expert) for expert in experts]
        work = [self.routed.work(key[1], parts.slots[key], gpu[key[1]]) for key in keys]
        accelerator = parts.device.accelerator
        assert accelerator is not None  # there are slots
        queued = accelerator.run(parts.math[step.layer], self.total, work, keys[0], after=after)
        parts.slots.note_work(keys, queued)
        end_s = 0.0
        if parts.time.is_virtual:
            shares = [Share(key, step.tokens[key[1]], len(gpu[key[1]])) for key in keys]
            end_s = parts.time.run_gpu(shares, after)
        self.ran.append(_Ran(queued, experts, end_s))
        return self.ran[-1]

    def _run_on_cpu(self, neurons_of: Mapping[int, range], out: Tensor | None) -> Tensor | None:
        """Compute neurons of experts on the CPU, added to `out`, or to fresh zeros where it is None."""
        if not neurons_of:
            return out
        parts, step = self.parts, self.step
        out = self.host_output() if out is None else out
        shares = sorted(neurons_of.items())
        work = [self.routed.work(expert, parts.store[step.layer, expert], neurons) for expert, neurons in shares]
        start_s = time.perf_counter()
        parts.cpu.run(parts.math[step.layer], self.x, work, out)
        end_s = time.perf_counter()
        parts.accounts.counters.cpu_s += end_s - start_s
        if parts.time.is_virtual:
            parts.time.run_cpu([Share((step.layer, e), step.tokens[e], len(neurons)) for e, neurons in shares])
        elif parts.timeline is not None:
            parts.timeline.add(Lane.CPU, (step.layer, shares[0][0]), start_s, end_s, "expert")
        return out

    def _wait(self) -> list[int]:
        """Wait until the device's work is launched.

        Returns:
            Experts that the device could not compute but the CPU can: their copy failed, or it had no memory for them.
        """
        parts, layer, lost = self.parts, self.step.layer, []
        start_s = time.perf_counter()
        for queued, experts, _ in self.ran:
            try:
                queued.wait()
            except (CopyError, torch.OutOfMemoryError) as error:
                if not all((layer, expert) in parts.store for expert in experts):
                    raise  # held on the device alone
                line = str(error).splitlines()[0]
                logger.warning("layer %d: %s; the CPU computes %s instead", layer, line, experts)
                lost += experts
        parts.accounts.counters.waited_s += time.perf_counter() - start_s
        return lost


def run_layer_step(
    parts: Parts, layer: int, phase: Phase, batch: HostBatch, total: StepSum, host_output: Callable[[], Tensor]
) -> Tensor | None:
    """Do one layer step, as `LayerStep.run` says; after a failure nothing of it is left on its way.

    Args:
        batch: what the router chose and the hidden states, on the host.
    """
    routed = group_by_expert(batch.index, batch.weights, parts.spec.layers[layer].experts)
    parts.time.begin_layer(layer, batch.x.shape[0])
    start_s, moved_bytes = parts.time.now_s, -parts.slots.moved_bytes
    step = routed.step(layer, phase, batch.guesses)
    if parts.listener is not None:
        parts.listener.asked(step, batch.index.shape[1])
    if (routing := parts.accounts.routing) is not None:
        routing.add(step)
    found = classify(step, parts.slots)
    running = LayerStep(parts, step, routed, batch.x, total, host_output)
    try:
        on_cpu, cpu_s = running.run()
    except BaseException:
        parts.end()
        begun = running.cancel()
        parts.copies.settle()
        for queued in begun:  # what it waited for is there or gone now
            with suppress(BaseException):  # a failure is being told already
                queued.wait()
        raise
    finally:
        parts.slots.release(layer)
    moved_bytes += parts.slots.moved_bytes
    wall_s = parts.time.now_s - start_s
    outcome = Outcome(layer, step.phase, *found, moved_bytes=moved_bytes, cpu_s=cpu_s, wall_s=wall_s)
    hits, joined, misses = len(outcome.hits), len(outcome.joined), len(outcome.misses)
    parts.accounts.add(phase, 1, sum(step.tokens.values()), hits, joined, misses)
    parts.accounts.counters.moved_bytes = parts.slots.moved_bytes
    parts.policy.observe(outcome)
    if parts.listener is not None:
        parts.listener.done(outcome)
    return on_cpu
