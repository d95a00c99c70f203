"""The conductor of a model: begins and ends its steps, runs their MoE layers, and holds all parts that this takes.

A layer comes by one of three ways. `run_layer` and `run_port` (captured steps) have it decided and dispatched by
`layer_step.py`. A layer whose experts are all held on the device is one operation (`held_op`), and one without slots
leaves nothing to decide (`only_choice`): what computes these elsewhere says so by `count_held` and `count_only_choice`.
Nothing else in the package moves weights. Does not know families or checkpoints: `loading/plug.py` calls it.

Legend: T tokens, K top-k, D model width, E experts.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NoReturn

import torch
from torch import Tensor

from ..compute.cpu import CpuExperts, KernelShape
from ..compute.experts import ExpertMath
from ..devices import Device, HeldLayer, LayerPort, StepSum
from ..errors import ModelError
from ..memory.slots import SlotPool
from ..memory.store import ExpertStore
from ..planning.check import check_moves
from ..planning.clock import Clock, WallClock
from ..planning.contract import Costs, ModelSpec, Phase, Policy, StepInfo
from ..planning.gpu_plan import GpuPlan
from ..planning.timeline import Timeline
from ..planning.view import TableView
from .card import HasCard
from .copies import Copies
from .counters import Accounts, Counters, Listener
from .forks import StepLock, only_here
from .gates import Gate, guess_next
from .held import HeldLayers
from .layer_step import run_layer_step
from .steps import BEFORE_LAYERS, StepOfThread, likely_info


@dataclass(repr=False)
class Conductor(HasCard):
    """Carries out a policy's decisions for one model.

    math: for each MoE layer, what its experts compute. gates: for each MoE layer, its router, where one was found.
    clock: the wall's unless given. gpu_plan: how the GPU's memory is shared out, where there is one. listener: hears
    each layer step. timeline: of a run, see `note_on`. ram_budget_bytes: that the user named; None for all that is
    free. progress: called with a layer's number and its tokens before the layer, in steps that read a prompt.
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
    listener: Listener | None = None
    gpu_plan: GpuPlan | None = None
    timeline: Timeline | None = None
    ram_budget_bytes: int | None = None
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        self._step = StepOfThread()
        link = None if self.device.accelerator is None else self.device.accelerator.link
        self.time: Clock = self.clock or WallClock(self.costs, link)
        self.accounts = Accounts(self.device)
        self._see_slots()
        self._held = HeldLayers(self.device, self.math)
        self._holds_all = len(self.slots.held) == sum(of.experts for of in self.spec.layers)
        self._failures = 0  # of the slots, as far as the policy was told
        # Memory that is registered must not outlive its mapping, so a model that is let go closes its device.
        self._closing = weakref.finalize(self, only_here(self.device.close))
        self._lock = StepLock(None if link is None else self.device.name)

    def _see_slots(self) -> None:
        self.view = TableView(self.slots, self.time, self.store.experts)
        self.copies = Copies(self.math, self.device, self.store, self.slots, self.time)

    def __reduce__(self) -> NoReturn:
        raise ModelError("a model in Moestro's hands cannot be copied or pickled; load it again")

    # Steps.

    @property
    def phase(self) -> Phase:
        """Of the step that this thread is in."""
        return self._step.phase

    def begin(self, info: StepInfo) -> None:
        """Begin a step before its first layer; it lasts until `end`."""
        with self._lock:
            self._step.begin(info, announced=True)
            self._begin()

    def begin_unless_announced(self, tokens: int) -> None:
        """Begin a step of so many tokens that is captured or replayed, since the conductor does not see each layer."""
        with self._lock:
            self.device.follow()
            self._enter(BEFORE_LAYERS, tokens)

    def end(self) -> None:
        """End the step that was announced."""
        self._step.end()

    def _enter(self, layer: int, tokens: int) -> None:
        """A layer comes: with it a step begins, unless it belongs to one that has begun."""
        if self._step.begins_at(layer):
            self._step.begin(likely_info(tokens, self.device.stream_id()), announced=False)
            self._begin()
        elif self.copies.is_unsettled or self._failures != self.slots.failures:  # another thread's step failed
            self._prepare()
        self._step.layer = layer
        if self.progress is not None and layer != BEFORE_LAYERS and self._step.phase is Phase.PREFILL:
            self.progress(layer, tokens)

    def _begin(self) -> None:
        if self.listener is not None:
            self.listener.begin(self._step.info)
        self._prepare()

    def _prepare(self) -> None:
        """Bring slots and policy to one state, and start what the policy wants before a step."""
        try:
            self.copies.finish_settling()
            self.copies.warm()
            self.copies.forget_failed()
            self._failures = self.slots.failures
            moves = self.policy.begin(self._step.info, self.view, self.costs)
            check_moves(moves, self.view, self.spec, "before the first layer")
            for move in moves:
                self.copies.start(move)
        except BaseException:
            self._step.end()
            self.copies.settle()
            raise

    # Layers.

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
            self._enter(layer, x.shape[0])
            if (op := self.held_op(layer, x.dtype)) is not None:
                self.accounts.add(self.phase, layer_steps=1)
                return op(x, index, weights, self.accounts.chosen(self._step.info))
            self.device.follow()  # not before: a held layer may be captured, where no stream may wait for another
            if self.guesses_wanted and layer < len(self.gates) and (gate := self.gates[layer]) is not None:
                gate.learn(x, index)
            batch = self.device.read_router(index, weights, x, self.guess_next(layer, x, index.shape[1]))
            total = StepSum(x, self.slots.memory)
            host_output = functools.partial(self.device.host_output, x)
            on_cpu = run_layer_step(self, layer, self._step.phase, batch, total, host_output)
            return self.device.combine(on_cpu, total)

    def run_port(self, layer: int, port: LayerPort) -> None:
        """Do a layer of a captured step: from what its graph brought to the port, into the port's sum and output."""
        with self._lock:
            self._enter(layer, port.total.x.shape[0])
            self.device.follow()
            run_layer_step(self, layer, self._step.phase, port.read(), port.total, port.host_output)

    @property
    def guesses_wanted(self) -> int:
        """For how many later layers the policy or a listener wants guesses."""
        wanted = self.policy.lookahead if self.slots else 0  # without slots no guess can be loaded
        return wanted if self.listener is None else max(wanted, self.listener.lookahead)

    def guess_next(self, layer: int, x: Tensor, top_k: int) -> Tensor | None:
        """The wanted guesses from a layer's hidden states, as `gates.guess_next` makes them. Can be captured."""
        gates = self.gates[layer + 1 : layer + 1 + self.guesses_wanted]
        return guess_next(gates, x, top_k) if gates else None

    # Layers that leave nothing to decide.

    def only_choice(self, layer: int) -> tuple[KernelShape, list[Tensor]] | None:
        """What the kernels need of a layer about which there is nothing to decide; None of others.

        Without slots the contract allows one decision: all of an expert's neurons on the CPU. Not to be used while
        `must_see_layers`.
        """
        experts = [(layer, expert) for expert in range(self.spec.layers[layer].experts)]
        shape = self.cpu.kernel_shape(self.math[layer])
        if self.slots or shape is None or not all(expert in self.store for expert in experts):
            return None
        return shape, [self.store[expert] for expert in experts]

    def count_only_choice(self, layers: int, experts: int, chosen: int, tokens: int) -> None:
        """Account for layer steps of few tokens, computed elsewhere.

        Args:
            experts: that computed, in all layers. chosen: tokens, each counted for each of its experts in each layer.
            tokens: of the step.
        """
        with self._lock:
            if not self._step.is_announced:  # the next layer begins a step: which layers these were is not said
                self._step.begin(likely_info(tokens), announced=False)
                self._step.end()
            self.accounts.add(self.phase, layer_steps=layers, tokens=chosen, misses=experts)

    def held_op(self, layer: int, dtype: torch.dtype) -> HeldLayer | None:
        """A layer as an operation that never waits for the host, if all its experts are held on the device.

        The policy is not asked, since there is nothing to decide. None of layers that must be decided about, and while
        a listener or a timeline wants to see each layer.
        """
        if self.must_see_layers or self.time.is_virtual:
            return None
        if self.policy.lookahead > 0 and not self._holds_all:
            return None  # its hidden states give guesses for a layer that is not held
        return self._held.op(layer, dtype, self.slots, self.spec.layers[layer].experts)

    def count_held(self, layers: int, chosen: Tensor) -> None:
        """Account for steps of held layers, which have counted what they chose in `chosen`; sets it to zero."""
        with self._lock:
            self.accounts.add(self.phase, layer_steps=layers)
            self.accounts.chosen(self._step.info).add_(chosen)
            chosen.zero_()

    @property
    def must_see_layers(self) -> bool:
        """Whether a listener or a timeline wants each layer to pass through the conductor."""
        return self.listener is not None or self.timeline is not None

    # What was done.

    @property
    def counters(self) -> Counters:
        """What was done so far. Waits for the device where that counts for itself."""
        with self._lock:
            return self.accounts.total()

    @property
    def host_s(self) -> tuple[float, float]:
        """Seconds so far in which the CPU computed experts, and in which the host waited for the device or the link."""
        counters = self.accounts.counters
        return counters.cpu_s, counters.waited_s + self.device.waited_s

    @contextmanager
    def note_on(self, timeline: Timeline) -> Iterator[None]:
        """Note in a timeline what GPU, link and CPU do inside the block."""
        lanes = self.time.lanes_of(self.device)
        self.timeline = timeline
        lanes.trace(timeline)
        try:
            yield
        finally:
            self.timeline = None
            lanes.trace(None)

    # Changes.

    def forget_math(self, layer: int) -> None:
        """Recognize anew what a layer's experts compute: their activation was changed."""
        self.math[layer] = replace(self.math[layer])  # another object, of which nothing is known yet
        self._held.clear()

    def let_go_of_slots(self) -> None:
        """Give the slots' memory back to the device. This conductor is not used after."""
        self.copies.settle()
        self.device.follow()
        self.device.finish()  # what it computes reads them
        self.slots = SlotPool(self.device.pool(0, self.spec.slot_bytes))
        self._see_slots()
        self._held.clear()

    def hand_over(self, policy: Policy, slots: SlotPool, costs: Costs) -> Conductor:
        """A conductor of the same model with another policy and other slots. This one is not used after."""
        self._closing.detach()
        return replace(self, policy=policy, slots=slots, costs=costs)

    def close(self) -> None:
        """Stop the device's threads. The model cannot be used after."""
        self._closing()
