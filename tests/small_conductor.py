"""A conductor over a few small random experts, policies for it, and what its layers are to give."""

from __future__ import annotations

import random
from collections.abc import Mapping
from unittest import mock

import torch
from torch import Tensor

from moestro.compute.experts import ExpertMath
from moestro.devices import Device, LayerPort
from moestro.engine.conductor import Conductor
from moestro.memory.formats import FORMATS, ExpertFormat, ExpertShape
from moestro.memory.slots import SlotPool
from moestro.memory.store import ExpertStore
from moestro.planning.contract import (
    GPU0,
    Costs,
    Decision,
    Expert,
    LayerSpec,
    ModelSpec,
    Move,
    Outcome,
    Placement,
    Step,
    StepInfo,
    View,
)
from moestro.planning.policies import BasePolicy

SHAPE, FORMAT, LAYERS, EXPERTS, TOP_K = ExpertShape(hidden=24, neurons=160), FORMATS["fp32"], 3, 6, 2


def _gate(gate: Tensor | None, up: Tensor) -> Tensor:
    assert gate is not None
    return torch.nn.functional.silu(gate) * up


class Drawn(BasePolicy):
    """A policy that decides at random: who computes, what is copied, split, dropped and evicted."""

    name = "drawn"

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.outcomes: list[Outcome] = []

    def place(self, spec: ModelSpec, gpu_bytes: int, heat: Mapping[Expert, float]) -> Placement:
        raise NotImplementedError

    def begin(self, info: StepInfo, view: View, costs: Costs) -> tuple[Move, ...]:
        return ()

    def decide(self, step: Step, view: View, costs: Costs) -> Decision:
        """Slots are taken from whoever is there or in flight, and from those of this step once they were computed."""
        gpu, cpu, moves = {}, {}, []
        active = {(step.layer, e) for e in step.tokens}
        everybody = [(layer, e) for layer in range(LAYERS) for e in range(EXPERTS)]
        victims = [key for key in everybody if key not in active and view.ready_s(key, GPU0) < float("inf")]
        drop = [victims.pop(self._pick(victims))] if victims and self._random.random() < 0.5 else []
        empty = view.free_slots(GPU0, step.layer) + sum(key in view.evictable(GPU0, step.layer) for key in drop)

        def place() -> tuple[bool, Expert | None]:
            nonlocal empty
            if empty:
                empty -= 1
                return True, None
            return (True, victims.pop(self._pick(victims))) if victims else (False, None)

        for expert in sorted(step.tokens, key=lambda e: view.ready_s((step.layer, e), GPU0) == float("inf")):
            key = (step.layer, expert)
            there = view.ready_s(key, GPU0) < float("inf")
            how = self._random.choice(["cpu", "gpu", "split"])
            found, evict = (True, None) if there or how == "cpu" else place()
            edge = self._random.choice([FORMAT.block, 2 * FORMAT.block])
            if how == "cpu" or not found:
                cpu[expert] = range(SHAPE.neurons)
                continue
            gpu[expert] = range(SHAPE.neurons) if how == "gpu" else range(edge)
            if how == "split":
                cpu[expert] = range(edge, SHAPE.neurons)
            if not there:
                whole = how == "gpu"
                keep = whole and self._random.random() < 0.5
                moves.append(Move(key, evict=evict, neurons=None if whole else range(edge), keep=keep))
            victims.append(key)  # once it was computed
        for key in everybody:
            if key[0] != step.layer and key not in drop and self._random.random() < 0.25:
                if view.ready_s(key, GPU0) == float("inf"):
                    found, evict = place()
                    if found:
                        moves.append(Move(key, evict=evict, keep=self._random.random() < 0.5, urgent=False))
                elif key in victims:  # it joins
                    victims.remove(key)
                    moves.append(Move(key, urgent=self._random.random() < 0.5))
        return Decision(gpu=gpu, cpu=cpu, moves=tuple(moves), drop=tuple(drop))

    def _pick(self, among: list[Expert]) -> int:
        return self._random.randrange(len(among))

    def observe(self, done: Outcome) -> None:
        self.outcomes.append(done)


class Fixed(BasePolicy):
    """A policy that always says the same."""

    name = "fixed"

    def __init__(self, decision: Decision) -> None:
        self.decision = decision

    def begin(self, info: StepInfo, view: View, costs: Costs) -> tuple[Move, ...]:
        return ()

    def decide(self, step: Step, view: View, costs: Costs) -> Decision:
        return self.decision

    def observe(self, done: Outcome) -> None:
        pass


FULL = range(SHAPE.neurons)


def small_conductor(
    policy: object, slots: int, device: Device, fmt: ExpertFormat = FORMAT
) -> tuple[Conductor, list[list[dict[str, Tensor]]]]:
    """A conductor over random experts, and their parts."""
    size = fmt.expert_bytes(SHAPE)
    store = ExpertStore([[size] * EXPERTS] * LAYERS)
    parts = [
        [{name: torch.randn(s) / s[-1] ** 0.5 for name, s in SHAPE.parts.items()} for _ in range(EXPERTS)]
        for _ in range(LAYERS)
    ]
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            fmt.pack(store[layer, expert], SHAPE, parts[layer][expert])
    spec = ModelSpec((LayerSpec(EXPERTS, SHAPE.neurons, size, hidden=SHAPE.hidden, block=fmt.block),) * LAYERS, 0)
    memory = device.pool(slots, size).fill_(0xFF)
    math = [ExpertMath(SHAPE, fmt, _gate)] * LAYERS
    if device.accelerator is not None:
        with mock.patch("moestro.devices.cuda_memory._RUN_BYTES", 3 * size + 64):  # pieces cross from run to run
            device.accelerator.pin(store.memory)
    return Conductor(spec, math, policy, device, store, SlotPool(memory)), parts  # type: ignore[arg-type]


def reference_of(parts: list[dict[str, Tensor]], x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for k in range(index.shape[1]):
            if 0 <= (e := int(index[t, k])) < EXPERTS and weights[t, k] != 0:
                p = parts[e]
                out[t] += weights[t, k] * (p["down"] @ (torch.nn.functional.silu(p["gate"] @ x[t]) * (p["up"] @ x[t])))
    return out


class ByPort:
    """Layer steps as a captured step does them; its graphs are the calls themselves where there is no GPU."""

    def __init__(self, conductor: Conductor) -> None:
        self._conductor = conductor
        self._port: LayerPort | None = None

    def run_layer(self, layer: int, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        conductor, device = self._conductor, self._conductor.device.accelerator
        assert device is not None
        if self._port is None:
            self._port = device.port(x, index, None, conductor.slots.memory, EXPERTS)
        self._port.leave(x, index, weights, None)
        device.capture_slots(self._port, conductor.math[layer])
        conductor.run_port(layer, self._port)
        return self._port.enter()
