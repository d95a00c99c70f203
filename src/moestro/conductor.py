"""The conductor: one MoE layer step, from the router's choice to the combined output.

Asks the policy, checks its decision, starts copies, lets the device compute what is in slots while the
CPU computes the rest, and adds the parts in float32. Nothing else in the package moves weights. Does not
know families or checkpoints: `plug.py` builds it and calls `run_layer`. What is done in which order is
`planning/dispatch.py`'s; a clock is told of it, the wall's or a virtual one.

Legend: T tokens, K top-k, D model width, E experts.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from .accounts import Counters, Recorder
from .compute.cpu import CpuExperts, KernelShape
from .compute.devices import Device, HeldLayer, HostBatch, LayerPort, Queued, StepSum
from .compute.experts import ExpertMath
from .errors import CopyError
from .forks import StepLock, only_here
from .grouping import Routed, group_by_expert
from .memory.formats import BLOCK
from .memory.slots import SlotPool
from .memory.store import ExpertStore
from .planning.budget import GpuPlan
from .planning.check import check, check_moves
from .planning.clock import Clock, Share, WallClock
from .planning.contract import Costs, Decision, Lane, ModelSpec, Move, Outcome, Phase, Policy, Step
from .planning.dispatch import Found, classify, dispatch
from .planning.slots import Transfer
from .planning.timeline import Timeline
from .planning.view import TableView
from .planning.virtual import VirtualMachine
from .planning.virtual_link import VirtualCopy
from .routers import Gate, guess_next

logger = logging.getLogger("moestro")


class _Ran(NamedTuple):
    """Experts queued on the device, and when its clock expects them to be done."""

    queued: Queued
    experts: list[int]
    end_s: float


@dataclass
class Conductor:
    """Carries out a policy's decisions for one model.

    math: for each MoE layer, what its experts compute. gates: for each MoE layer, its router, where one was found.
    clock: the wall's unless given. gpu_plan: how the GPU's memory is shared out, where there is one.
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
    gates: Sequence[Gate | None] = ()
    clock: Clock | None = None
    recorder: Recorder | None = None
    gpu_plan: GpuPlan | None = None
    timeline: Timeline | None = None  # of a run, see `note_on`

    def __post_init__(self) -> None:
        self._of_thread = threading.local()
        self.time: Clock = self.clock or WallClock(self.costs, self.device.link)
        self.view = TableView(self.slots, self.time, self.store.experts)
        self._to_warm = list(self.slots.warm)
        self._expert_bytes = [math.format.expert_bytes(math.shape) for math in self.math]
        self._last_ran: _Ran | None = None
        self._held_ops: dict[tuple[int, torch.dtype], HeldLayer | None] = {}
        self._failures = 0  # copies that have failed so far
        self._is_unsettled = False  # something failed, and the rest has not come to an end
        # Memory that is registered must not outlive its mapping, so a model that is let go closes its device.
        self._closing = weakref.finalize(self, only_here(self.device.close))
        self._lock = StepLock(None if self.device.link is None else self.device.name)

    @property
    def phase(self) -> Phase:
        """Of the step that this thread is in."""
        return getattr(self._of_thread, "phase", Phase.PREFILL)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model in Moestro's hands cannot be copied or pickled; load it again")

    def begin(self, tokens: int, phase: Phase) -> None:
        """Before the first layer of a step of `tokens` tokens, over all its sequences."""
        with self._lock:
            self._of_thread.phase = phase
            if self._is_unsettled:
                self._settle()
            self._warm()
            if self.recorder is not None:
                self.recorder.begin(tokens, phase)
            link = self.device.link
            if link is not None and link.counters.failed != self._failures:
                self._failures = link.counters.failed
                self.slots.forget_unfinished()  # not before: until now the policy may have them down as coming
            try:
                moves = self.policy.begin(tokens, self.view, self.costs)
                check_moves(moves, self.view, self.spec, "before the first layer")
                for move in moves:
                    self._start(move, None, reading=self._last_ran)
            except BaseException:
                self._settle()
                raise
            self._last_ran = None

    def _warm(self) -> None:
        """Before the first step: bring the experts that the policy wants in slots from the start."""
        copies = []
        for key in self._to_warm:
            source = self.store[key]
            copies.append(self.device.copy(source, self.slots[key][: source.numel()], False, key))
        for copy in copies:
            copy.wait()
        self._to_warm = []

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
        step elsewhere, in fewer calls, says so by `count_only_choice`; the policy is not asked. Not to be done
        while a recorder listens.
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

    def held_op(self, layer: int, dtype: torch.dtype) -> HeldLayer | None:
        """A layer as an operation that never waits for the host, if all its experts are held on the device.

        There is nothing to decide about it, so the policy is not asked; who calls it tells `count_held`. None of
        layers that must be decided about, and while a recorder or a timeline listens.
        """
        if self.recorder is not None or self.timeline is not None or self.clock is not None:
            return None
        key = layer, dtype
        if key not in self._held_ops:
            keys = [(layer, expert) for expert in range(self.spec.layers[layer].experts)]
            held = all(key in self.slots.held for key in keys)
            guesses = self.policy.lookahead > 0 and len(self.slots.held) < sum(of.experts for of in self.spec.layers)
            slots = [self.slots.find(key).index for key in keys] if held and not guesses else []  # type: ignore[union-attr]
            self._held_ops[key] = (
                self.device.held_layer(self.math[layer], self.slots.memory, slots, dtype) if slots else None
            )
        return self._held_ops[key]

    def count_held(self, layers: int, chosen: int) -> None:
        """Account for steps of held layers, in which so many experts were chosen in all, tokens times top-k.

        All are hits. An expert that several tokens chose counts for each, since nobody waited to see which it was.
        """
        with self._lock:
            self.counters.layer_steps += layers
            self.counters.tokens += chosen
            self.counters.hits += chosen if self.phase is Phase.DECODE else 0

    def _run_layer(self, layer: int, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if (op := self.held_op(layer, x.dtype)) is not None:
            self.count_held(1, index.numel())
            return op(x, index, weights)
        if self.guesses_wanted and layer < len(self.gates) and (gate := self.gates[layer]) is not None:
            gate.learn(x, index)
        batch = self.device.read_router(index, weights, x, self.guess_next(layer, x, index.shape[1]))
        total = StepSum(x, self.slots.memory)
        on_cpu = self._run_step(layer, batch, total, functools.partial(self.device.host_output, x))
        return self.device.combine(on_cpu, total)

    def run_port(self, layer: int, port: LayerPort) -> None:
        """The same for a recorded step: what its graph brought to the port, into the sum and the output of the port."""
        with self._lock:
            self._run_step(layer, port.read(), port.total, port.host_output)

    def _run_step(
        self, layer: int, batch: HostBatch, total: StepSum, host_output: Callable[[], Tensor]
    ) -> Tensor | None:
        """One layer step as the policy decides; returns the CPU's part, if it has one."""
        routed = group_by_expert(batch.index, batch.weights, self.spec.layers[layer].experts)
        self.time.begin_layer(layer, batch.x.shape[0])
        start_s = self.time.now_s
        step = routed.step(layer, self.phase, batch.guesses)
        if self.recorder is not None:
            self.recorder.record(step, batch.index.shape[1])
        found = classify(step, self.slots)
        moved_before = self.slots.moved_bytes
        ran: list[_Ran] = []
        try:
            decision = self.policy.decide(step, self.view, self.costs)
            check(decision, step, self.view, self.spec, BLOCK)
            run = functools.partial(self._run_on_device, step, decision, total, routed, ran)
            dispatch(decision, layer, self.slots, self._start, run)
            cpu_start_s = self.time.now_s
            on_cpu = self._run_on_cpu(step, decision.cpu, batch.x, routed, host_output() if decision.cpu else None)
            cpu_s = self.time.lane_free_s(Lane.CPU) - cpu_start_s
            if lost := self._wait_for(step, ran):
                shares = {expert: decision.gpu[expert] for expert in lost}
                on_cpu = self._run_on_cpu(step, shares, batch.x, routed, host_output() if on_cpu is None else on_cpu)
            self.time.end_layer()
            self._last_ran = ran[-1] if ran else self._last_ran
        except BaseException:
            begun = [one for one in ran if not one.queued.cancel()]
            self._settle()
            for one in begun:  # what it waited for is there or gone now
                with suppress(BaseException):  # a failure is being told already
                    one.queued.wait()
            self._last_ran = begun[-1] if begun else self._last_ran
            raise
        finally:
            self.slots.release(layer)
        self._account(step, found, self.slots.moved_bytes - moved_before, cpu_s, self.time.now_s - start_s)
        return on_cpu

    @property
    def guesses_wanted(self) -> int:
        """For how many later layers, by the policy or who listens."""
        wanted = self.policy.lookahead if self.slots else 0  # without slots no guess can be loaded
        return wanted if self.recorder is None else max(wanted, self.recorder.lookahead)

    def guess_next(self, layer: int, x: Tensor, top_k: int) -> Tensor | None:
        """The wanted guesses from a layer's hidden states, as `routers.guess_next` makes them. Can be recorded."""
        gates = self.gates[layer + 1 : layer + 1 + self.guesses_wanted]
        return guess_next(gates, x, top_k) if gates else None

    def _start(self, move: Move, after: _Ran | None, *, reading: _Ran | None = None) -> None:
        """Start a copy, behind work that must be over first; one that is there or on its way is joined.

        Args:
            reading: work of an earlier step, which may still read the slot.
        """
        key, math = move.expert, self.math[move.expert[0]]
        part = range(self._expert_bytes[key[0]])
        if move.neurons is not None:
            part = math.format.byte_range(math.shape, move.neurons)

        def fill(index: int, before: Transfer | None) -> tuple[Transfer, float]:
            source, target = self.store[key], self.slots.row(index)
            if move.neurons is not None:
                source = source[part.start : part.stop]
            if source.numel() != target.numel():
                target = target[part.start : part.stop]
            work = after or (reading if before is None else None)
            previous = before.real if isinstance(before, VirtualCopy) else before
            behind = previous if work is None else work.queued
            copy = self.device.copy(source, target, move.urgent, key, behind)
            after_s = 0.0 if after is None else after.end_s
            timed = self.time.copy(key, len(part), move.urgent, after_s, before, copy)
            return timed, self.time.arrival_s(timed, move.urgent)

        self.slots.load(key, move.evict, fill, len(part), move.keep, move.urgent, move.neurons is not None)

    def _run_on_device(
        self,
        step: Step,
        decision: Decision,
        total: StepSum,
        routed: Routed,
        ran: list[_Ran],
        experts: list[int],
        after: Transfer | None,
    ) -> _Ran:
        keys = [(step.layer, expert) for expert in experts]
        work = [routed.work(key[1], self.slots[key], decision.gpu[key[1]]) for key in keys]
        queued = self.device.run(self.math[step.layer], total, work, keys[0], after=after)
        end_s = 0.0
        if self.clock is not None:  # the wall needs no telling
            shares = [Share(key, step.tokens[key[1]], len(decision.gpu[key[1]])) for key in keys]
            end_s = self.time.run_gpu(shares, after)
        ran.append(_Ran(queued, experts, end_s))
        return ran[-1]

    def _run_on_cpu(
        self, step: Step, of: Mapping[int, range], x: Tensor, routed: Routed, out: Tensor | None
    ) -> Tensor | None:
        """Neurons of experts on the CPU, added to `out`, which is None where there are none."""
        if not of or out is None:
            return out
        shares = sorted(of.items())
        work = [routed.work(expert, self.store[step.layer, expert], neurons) for expert, neurons in shares]
        start_s = time.perf_counter()
        self.cpu.run(self.math[step.layer], x, work, out)
        end_s = time.perf_counter()
        self.counters.cpu_s += end_s - start_s
        if self.timeline is not None and not isinstance(self.time, VirtualMachine):
            self.timeline.add(Lane.CPU, (step.layer, shares[0][0]), start_s, end_s, "expert")
        if self.clock is not None:
            self.time.run_cpu([Share((step.layer, e), step.tokens[e], len(neurons)) for e, neurons in shares])
        return out

    def _wait_for(self, step: Step, ran: Sequence[_Ran]) -> list[int]:
        """Wait until the device's work is launched; returns the experts that it could not compute but the CPU can.

        Their copy failed, or the device had no memory for the work.
        """
        lost: list[int] = []
        start_s = time.perf_counter()
        for queued, experts, _ in ran:
            try:
                queued.wait()
            except (CopyError, torch.OutOfMemoryError) as error:
                if not all((step.layer, expert) in self.store for expert in experts):
                    raise  # held on the device alone
                line = str(error).splitlines()[0]
                logger.warning("layer %d: %s; the CPU computes %s instead", step.layer, line, experts)
                lost += experts
        self.counters.waited_s += time.perf_counter() - start_s
        return lost

    def _settle(self) -> None:
        """After a failure or an interrupt: nothing is on its way any longer, and the slots are as at the start."""
        self._is_unsettled = True  # until it is done, also if this is interrupted in turn
        if self.device.link is not None:
            self.device.link.settle()
        self.slots.forget_all()
        self._is_unsettled = False

    def _account(self, step: Step, found: Found, moved_bytes: int, cpu_s: float, wall_s: float) -> None:
        counters = self.counters
        counters.layer_steps += 1
        counters.tokens += sum(step.tokens.values())
        counters.moved_bytes = self.slots.moved_bytes
        if step.phase is Phase.DECODE:
            counters.hits += len(found.hits)
            counters.joined += len(found.joined)
            counters.misses += len(found.misses)
        outcome = Outcome(step.layer, step.phase, *found, moved_bytes=moved_bytes, cpu_s=cpu_s, wall_s=wall_s)
        self.policy.observe(outcome)
        if self.recorder is not None:
            self.recorder.done(outcome)

    def let_go_of_slots(self) -> None:
        """Nothing of this conductor holds the device's memory any longer; it is not used after."""
        self._settle()
        self.slots = SlotPool(self.device.pool(0, self.spec.slot_bytes))
        self.view = TableView(self.slots, self.time, self.store.experts)
        self._held_ops.clear()

    def hand_over(self, policy: Policy, slots: SlotPool, costs: Costs) -> Conductor:
        """A conductor of the same model with another policy and other slots; this one is not used after."""
        self._closing.detach()
        return replace(self, policy=policy, slots=slots, costs=costs, counters=Counters())

    @contextmanager
    def note_on(self, timeline: Timeline) -> Iterator[None]:
        """Note what GPU, link and CPU do meanwhile."""
        lanes = self.time if isinstance(self.time, VirtualMachine) else self.device
        self.timeline = timeline
        lanes.trace(timeline)
        try:
            yield
        finally:
            self.timeline = None
            lanes.trace(None)

    def close(self) -> None:
        """Stop the device's threads. The model cannot be used after."""
        self._closing()
