"""Host time of a decode step besides computing and waiting: grouping, the policy, checks, enqueuing, counters.

    moestro bench host --shape qwen3-30b-a3b --slots 0.25

A pretended GPU says at once that its work is done, and the experts of the CPU are left out: what remains is Moestro's
own Python. Calls of CUDA are not in it, nor is what hands experts to the kernels (checks on the CPU, the table of a
captured step's hits). Steps run as captured ones do (decode/capture/). Routing is drawn at random: a few experts are
much more popular than others, and three in four guesses of the next layer's experts come true.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compute.cpu import CpuExperts
from ..compute.experts import ExpertMath, ExpertWork
from ..console import print_table
from ..devices.emulated import EmulatedDevice, Here, MemoryCarrier
from ..devices.link import LinkLane
from ..devices.work import Queued, StepSum, WorkOfThread
from ..engine.conductor import Conductor
from ..errors import RequestError
from ..machine.measure import machine_by_name
from ..memory.formats import FORMATS, ExpertShape
from ..memory.slots import SlotPool, SlotUser
from ..memory.store import ExpertStore
from ..planning.contract import SCORE, Costs, Expert, ModelSpec, Phase, StepInfo, guesses_kept
from ..planning.policies import POLICIES, make_policy
from ..planning.shapes import spec_of_shape, top_k_of_shape
from ..planning.slots import Transfer
from ..simulate.reshape import at_bits
from .machine_card import machine_card
from .report import Report

_HIDDEN = 64  # width of the stored experts, which are never computed; policies see the shape's own width
_RIGHT = 0.75  # share of the guesses that come true
_STEEPNESS = 0.75  # Zipf's exponent of the experts' popularity


@dataclass(frozen=True, slots=True)
class HostRow:
    """One policy. us: microseconds a layer step, the median over tokens. hits, copies: the mean of a layer step."""

    policy: str
    us: float
    hits: float
    copies: float


@dataclass(frozen=True, slots=True)
class HostReport(Report):
    """One run. loop_us: microseconds of a million turns of an empty loop in Python, as a measure of this machine."""

    shape: str
    machine: str
    slots: int
    experts: int
    loop_us: float
    rows: tuple[HostRow, ...]

    def to_json(self) -> dict[str, Any]:
        """All figures, the commit and the machine's card, as `--json` prints them."""
        return Report.to_json(self) | {"card": machine_card()}

    def print(self) -> None:
        """A row for each policy."""
        print(f"{self.shape}'s routing, {self.slots} of {self.experts} experts in slots, costs of {self.machine}")
        rows = [(row.policy, f"{row.us:.0f}", f"{row.hits:.2f}", f"{row.copies:.2f}") for row in self.rows]
        print_table(("policy", "us a layer", "hits", "copies"), rows)
        print(f"a million turns of an empty loop take {self.loop_us / 1e3:.0f} ms here")


class _AtOnce(MemoryCarrier):
    """A carrier that copies nothing and reports each copy as done."""

    def queues(self, source: Tensor) -> bool:
        return True

    def send(self, source: Tensor, target: Tensor, behind: Sequence[SlotUser]) -> Here:
        return Here()


class _Idle(EmulatedDevice):
    """A device that does nothing and reports all work as done at once."""

    name = "idle"

    def __init__(self) -> None:
        super().__init__()
        self.link.close()
        self.link = LinkLane(_AtOnce())
        done: Future[None] = Future()
        done.set_result(None)
        self._done = WorkOfThread(done)

    def run(
        self, math: ExpertMath, total: StepSum, work: Sequence[ExpertWork], label: Expert, after: Transfer | None = None
    ) -> Queued:
        if after is not None:
            after.wait()
        return self._done


class _NoExperts(CpuExperts):
    def run(self, math: ExpertMath, x: Tensor, work: Sequence[ExpertWork], out: Tensor) -> None:
        pass


class _Routing:
    """Decode steps of one token, drawn before anything is timed: for each layer experts, weights, and a guess."""

    def __init__(self, spec: ModelSpec, top_k: int, tokens: int) -> None:
        random = torch.Generator().manual_seed(0)
        popularity = torch.arange(1, spec.layers[0].experts + 1) ** -_STEEPNESS
        of_layer = [popularity[torch.randperm(len(popularity), generator=random)] for _ in spec.layers]
        self.weights = torch.full((1, top_k), 1 / top_k)
        self.steps = [[torch.multinomial(p, top_k, generator=random)[None] for p in of_layer] for _ in range(tokens)]
        kept = min(guesses_kept(top_k), len(popularity))
        scores = torch.linspace(0.5, 0.0, kept + 1)[:-1] * SCORE
        self.guesses: list[list[Tensor]] = []
        for step in self.steps:
            likely = [torch.multinomial(p, kept, generator=random) for p in of_layer]
            for mine, true in zip(likely, step, strict=True):
                right = torch.rand(top_k, generator=random) < _RIGHT
                mine[:top_k][right] = true[0, right]
            stored = [torch.stack([mine, scores]).int()[None] for mine in likely]
            self.guesses.append([*stored[1:], torch.zeros_like(stored[0])])  # of the next layer, where there is one


def measure_host(
    shape: str,
    *,
    slots: float = 0.25,
    bits: int | None = None,
    machine: str = "rtx4090",
    names: Sequence[str] = tuple(POLICIES),
    tokens: int = 16,
    rounds: int = 5,
) -> HostReport:
    """Time the host's work of each policy, policies in turns.

    Args:
        slots: the share of the experts that fits on the GPU.
        tokens: decoded in each round; the first one is not timed.

    Raises:
        RequestError: no such shape, machine or policy, or no such share.
    """
    if not 0 <= slots < 1:
        raise RequestError(f"--slots {slots:g}: a share of the experts is wanted, from 0 to below 1")
    spec = spec_of_shape(shape) if bits is None else at_bits(spec_of_shape(shape), bits)
    count = int(slots * sum(layer.experts for layer in spec.layers))
    routing = _Routing(spec, top_k_of_shape(shape), tokens)
    costs = machine_by_name(machine).costs
    runs = [_Run(name, spec, count, costs, routing) for name in names]
    loops = []
    try:
        for _ in range(rounds):
            start_s = time.perf_counter()
            for _ in range(1_000_000):
                pass
            loops.append(time.perf_counter() - start_s)
            for run in runs:
                run.time_round()
    finally:
        for run in runs:
            run.conductor.close()
    rows = tuple(run.row() for run in runs)
    experts = sum(layer.experts for layer in spec.layers)
    return HostReport(shape, machine, count, experts, statistics.median(loops) * 1e6, rows)


class _Run:
    def __init__(self, name: str, spec: ModelSpec, slots: int, costs: Costs, routing: _Routing) -> None:
        policy, self._name, self._routing = make_policy(name), name, routing
        layer = spec.layers[0]
        shape, form = ExpertShape(_HIDDEN, layer.neurons), FORMATS["bf16"]
        size = form.expert_bytes(shape)
        place = policy.place(spec, slots * spec.slot_bytes, {})
        device = _Idle()
        memory = device.pool(len(place.held) + place.slots, size)
        math = ExpertMath(shape, form, lambda gate, up: up)
        self.conductor = Conductor(
            spec,
            [math] * len(spec.layers),
            policy,
            device,
            ExpertStore([[size] * of.experts for of in spec.layers]),
            SlotPool(memory, place.held),
            cpu=_NoExperts(),
            costs=costs,
        )
        self._seconds: list[float] = []
        x, index = torch.zeros(1, layer.hidden, dtype=torch.bfloat16), routing.steps[0][0]
        guesses = routing.guesses[0][0] if policy.lookahead and len(self.conductor.slots) else None
        self._x = x
        self._port = device.port(x, index, guesses, memory, layer.experts)

    def time_round(self) -> None:
        """Decode all tokens once, and note the seconds of each token's layer steps."""
        conductor, port, routing = self.conductor, self._port, self._routing
        for number, (step, guesses) in enumerate(zip(routing.steps, routing.guesses, strict=True)):
            took_s = -time.perf_counter()
            conductor.begin(StepInfo.alike(Phase.DECODE, 1))
            took_s += time.perf_counter()
            for layer, index in enumerate(step):
                port.leave(self._x, index, routing.weights, guesses[layer])
                took_s -= time.perf_counter()
                conductor.run_port(layer, port)
                took_s += time.perf_counter()
            if number:
                self._seconds.append(took_s / len(step))

    def row(self) -> HostRow:
        """The figures of all rounds so far."""
        counters = self.conductor.counters
        copies = counters.moved_bytes / self.conductor.store[0, 0].numel()
        steps = max(1, counters.layer_steps)
        return HostRow(self._name, statistics.median(self._seconds) * 1e6, counters.hits / steps, copies / steps)
