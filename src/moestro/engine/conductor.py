"""The conductor: one MoE layer step, from the router's choice to the combined output.

Asks the policy, checks its decision, starts copies, lets the device compute what is in slots while the
CPU computes the rest, and adds the parts in float32. Nothing else in the package moves weights. Does not
know families or checkpoints: `loading/plug.py` builds it and calls `run_layer`. What is done in which order is
`planning/dispatch.py`'s; a clock is told of it, the wall's or a virtual one. When a step begins is in `steps.py`, how
copies are carried out in `copies.py`.

Legend: T tokens, K top-k, D model width, E experts.
"""

from __future__ import annotations

import functools
import logging
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from ..compute.cpu import CpuExperts, KernelShape
from ..compute.experts import ExpertMath
from ..devices import Device, HeldLayer, HostBatch, LayerPort, Queued, StepSum
from ..errors import CopyError, ModelError
from ..memory.slots import SlotPool
from ..memory.store import ExpertStore
from ..planning.check import check, check_moves
from ..planning.clock import Clock, Share, WallClock
from ..planning.contract import Costs, Decision, Lane, ModelSpec, Move, Outcome, Phase, Policy, Step
from ..planning.dispatch import Found, classify, dispatch
from ..planning.gpu_plan import GpuPlan
from ..planning.slots import Transfer
from ..planning.timeline import Timeline
from ..planning.view import TableView
from .copies import Copies
from .counters import Counters, Recorder
from .forks import StepLock, only_here
from .gates import Gate, guess_next
from .held import HeldLayers
from .routing import Routed, group_by_expert
from .steps import BEFORE_LAYERS, StepOfThread, likely_phase

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
    math: list[ExpertMath]
    policy: Policy
    device: Device
    store: ExpertStore
    slots: SlotPool
    cpu: CpuExperts = field(default_factory=CpuExperts)
    costs: Costs = field(default_factory=Costs)
    gates: Sequence[Gate | None] = ()
    clock: Clock | None = None
    recorder: Recorder | None = None
    gpu_plan: GpuPlan | None = None
    timeline: Timeline | None = None  # of a run, see `note_on`

    def __post_init__(self) -> None:
        self._step = StepOfThread()
        self._accelerator = self.device.accelerator
        link = None if self._accelerator is None else self._accelerator.link
        self.time: Clock = self.clock or WallClock(self.costs, link)
        self._see_slots()
        self._held = HeldLayers(self.device, self.math)
        self._holds_all = len(self.slots.held) == sum(of.experts for of in self.spec.layers)
        self._counters = Counters()
        self._failures = 0  # of the slots, as far as the policy was told
        # Memory that is registered must not outlive its mapping, so a model that is let go closes its device.
        self._closing = weakref.finalize(self, only_here(self.device.close))
        self._lock = StepLock(None if link is None else self.device.name)

    def _see_slots(self) -> None:
        self.view = TableView(self.slots, self.time, self.store.experts)
        self._copies = Copies(self.math, self.device, self.store, self.slots, self.time)

    @property
    def phase(self) -> Phase:
        """Of the step that this thread is in."""
        return self._step.phase

    @property
    def counters(self) -> Counters:
        """What was done so far. Waits for the device where that counts for itself."""
        with self._lock:
            self._held.add_to(self._counters)
            return self._counters

    @property
    def host_s(self) -> tuple[float, float]:
        """Seconds so far in which the CPU computed experts, and in which the host waited for the device or the link."""
        return self._counters.cpu_s, self._counters.waited_s + self.device.waited_s

    def __reduce__(self) -> NoReturn:
        raise ModelError("a model in Moestro's hands cannot be copied or pickled; load it again")

    def begin(self, tokens: int, phase: Phase) -> None:
        """Before the first layer of a step of `tokens` tokens, over all its sequences; it lasts until `end`."""
        with self._lock:
            self._step.begin(phase, announced=True)
            self._begin(tokens)

    def begin_unless_announced(self, tokens: int) -> None:
        """The same for a step that is recorded or replayed, of which the conductor does not see each layer."""
        with self._lock:
            self.device.follow()
            self._enter(BEFORE_LAYERS, tokens)

    def end(self) -> None:
        """The step that was announced is over."""
        self._step.end()

    def _enter(self, layer: int, tokens: int) -> None:
        """A layer comes: with it a step begins, unless it belongs to one that has begun."""
        if self._step.begins_at(layer):
            self._step.begin(likely_phase(tokens), announced=False)
            self._begin(tokens)
        elif self._copies.is_unsettled or self._failures != self.slots.failures:  # another thread's step failed
            self._prepare(tokens)
        self._step.layer = layer

    def _begin(self, tokens: int) -> None:
        if self.recorder is not None:
            self.recorder.begin(tokens, self.phase)
        self._prepare(tokens)

    def _prepare(self, tokens: int) -> None:
        """Bring slots and policy to the same state, and start what the policy wants before a step."""
        try:
            self._copies.finish_settling()
            self._copies.warm()
            self._copies.forget_failed()
            self._failures = self.slots.failures
            moves = self.policy.begin(tokens, self.view, self.costs)
            check_moves(moves, self.view, self.spec, "before the first layer")
            for move in moves:
                self._copies.start(move)
        except BaseException:
            self._step.end()
            self._copies.settle()
            raise

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

        Without slots the contract allows one decision: all of an expert's neurons on the CPU. A step that is computed
        elsewhere, in fewer calls, is told by `count_only_choice`. Not to be done while a recorder listens.
        """
        experts = [(layer, expert) for expert in range(self.spec.layers[layer].experts)]
        shape = self.cpu.kernel_shape(self.math[layer])
        if self.slots or shape is None or not all(expert in self.store for expert in experts):
            return None
        return shape, [self.store[expert] for expert in experts]

    def count_only_choice(self, layers: int, experts: int) -> None:
        """Account for layer steps of one token, computed elsewhere by so many experts in all."""
        with self._lock:
            if not self._step.is_announced:  # whatever comes next begins anew, for which layers these were is not said
                self._step.begin(likely_phase(1), announced=False)
                self._step.end()
            self._counters.add(self.phase, layer_steps=layers, tokens=experts, misses=experts)

    def held_op(self, layer: int, dtype: torch.dtype) -> HeldLayer | None:
        """A layer as an operation that never waits for the host, if all its experts are held on the device.

        There is nothing to decide about it, so the policy is not asked; whoever calls it tells `count_held`. None of
        layers that must be decided about, and while a recorder or a timeline listens.
        """
        if self.recorder is not None or self.timeline is not None or self.time.is_virtual:
            return None
        if self.policy.lookahead > 0 and not self._holds_all:
            return None  # its hidden states give guesses for a layer that is not held
        return self._held.op(layer, dtype, self.slots, self.spec.layers[layer].experts)

    def count_held(self, layers: int, chosen: Tensor) -> None:
        """Account for steps of held layers, which have counted what they chose in `chosen`; sets it to zero."""
        with self._lock:
            self._counters.add(self.phase, layer_steps=layers)
            self._held.chosen(self.phase).add_(chosen)
            chosen.zero_()

    def _run_layer(self, layer: int, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        self._enter(layer, x.shape[0])
        if (op := self.held_op(layer, x.dtype)) is not None:
            self._counters.add(self.phase, layer_steps=1)
            return op(x, index, weights, self._held.chosen(self.phase))
        self.device.follow()  # not before: a held layer may be captured, where no stream may wait for another
        if self.guesses_wanted and layer < len(self.gates) and (gate := self.gates[layer]) is not None:
            gate.learn(x, index)
        batch = self.device.read_router(index, weights, x, self.guess_next(layer, x, index.shape[1]))
        total = StepSum(x, self.slots.memory)
        on_cpu = self._run_step(layer, batch, total, functools.partial(self.device.host_output, x))
        return self.device.combine(on_cpu, total)

    def run_port(self, layer: int, port: LayerPort) -> None:
        """The same for a recorded step: what its graph brought to the port, into the sum and the output of the port."""
        with self._lock:
            self._enter(layer, port.total.x.shape[0])
            self.device.follow()
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
            check(decision, step, self.view, self.spec)
            run = functools.partial(self._run_on_device, step, decision, total, routed, ran)
            dispatch(decision, layer, self.slots, self._start, run)
            cpu_start_s = self.time.now_s
            on_cpu = self._run_on_cpu(step, decision.cpu, batch.x, routed, host_output() if decision.cpu else None)
            cpu_s = self.time.lane_free_s(Lane.CPU) - cpu_start_s
            if lost := self._wait_for(step, ran):
                shares = {expert: decision.gpu[expert] for expert in lost}
                on_cpu = self._run_on_cpu(step, shares, batch.x, routed, host_output() if on_cpu is None else on_cpu)
            self.time.end_layer()
        except BaseException:
            self._step.end()
            begun = [one for one in ran if not one.queued.cancel()]
            self._copies.settle()
            for one in begun:  # what it waited for is there or gone now
                with suppress(BaseException):  # a failure is being told already
                    one.queued.wait()
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

    def _start(self, move: Move, after: _Ran | None) -> None:
        self._copies.start(move, 0.0 if after is None else after.end_s)

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
        assert self._accelerator is not None  # there are slots
        queued = self._accelerator.run(self.math[step.layer], total, work, keys[0], after=after)
        self.slots.note_work(keys, queued)
        end_s = 0.0
        if self.time.is_virtual:
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
        self._counters.cpu_s += end_s - start_s
        if self.timeline is not None and not self.time.is_virtual:
            self.timeline.add(Lane.CPU, (step.layer, shares[0][0]), start_s, end_s, "expert")
        if self.time.is_virtual:
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
        self._counters.waited_s += time.perf_counter() - start_s
        return lost

    def _account(self, step: Step, found: Found, moved_bytes: int, cpu_s: float, wall_s: float) -> None:
        counters = self._counters
        hits, joined, misses = len(found.hits), len(found.joined), len(found.misses)
        tokens = sum(step.tokens.values())
        counters.add(step.phase, layer_steps=1, tokens=tokens, hits=hits, joined=joined, misses=misses)
        counters.moved_bytes = self.slots.moved_bytes
        outcome = Outcome(step.layer, step.phase, *found, moved_bytes=moved_bytes, cpu_s=cpu_s, wall_s=wall_s)
        self.policy.observe(outcome)
        if self.recorder is not None:
            self.recorder.done(outcome)

    def let_go_of_slots(self) -> None:
        """Nothing of this conductor holds the device's memory any longer; it is not used after."""
        self._copies.settle()
        self.device.follow()
        self.device.finish()  # what it computes reads them
        self.slots = SlotPool(self.device.pool(0, self.spec.slot_bytes))
        self._see_slots()
        self._held.clear()

    def forget_math(self, layer: int) -> None:
        """Recognize anew what a layer's experts compute: their activation was changed."""
        self.math[layer] = replace(self.math[layer])  # another object, of which nothing is known yet
        self._held.clear()

    def hand_over(self, policy: Policy, slots: SlotPool, costs: Costs) -> Conductor:
        """A conductor of the same model with another policy and other slots; this one is not used after."""
        self._closing.detach()
        return replace(self, policy=policy, slots=slots, costs=costs)

    @contextmanager
    def note_on(self, timeline: Timeline) -> Iterator[None]:
        """Note what GPU, link and CPU do meanwhile."""
        lanes = self.time.lanes_of(self.device)
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
