"""Layers whose experts are all on the device for good: there is nothing to decide, and the host waits for nothing.

So the host does not see what their routers choose. The device counts it, and is asked when the counters are read.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ..compute.experts import ExpertMath
from ..devices import Device, HeldLayer
from ..memory.slots import SlotPool
from ..planning.contract import Phase
from .counters import Counters


class HeldLayers:
    """The held layers of one conductor, as operations."""

    def __init__(self, device: Device, math: Sequence[ExpertMath]) -> None:
        self._device, self._math = device, math
        self._ops: dict[tuple[int, torch.dtype], HeldLayer | None] = {}
        # By the steps of each thread, so that no two streams add to one, and how much of it is in the counters.
        self._chosen: dict[tuple[Phase, int], Tensor] = {}
        self._counted: dict[tuple[Phase, int], tuple[int, int]] = {}

    def op(self, layer: int, dtype: torch.dtype, slots: SlotPool, experts: int) -> HeldLayer | None:
        """One layer of so many experts; None where they are not all held, or the device has no such operation."""
        key = layer, dtype
        if key not in self._ops:
            keys = [(layer, expert) for expert in range(experts)]
            places = [slots.find(key) for key in keys] if slots.held.issuperset(keys) else []
            indices = [place.index for place in places if place is not None]
            self._ops[key] = (
                accelerator.held_layer(self._math[layer], slots.memory, indices, dtype)
                if indices and (accelerator := self._device.accelerator) is not None
                else None
            )
        return self._ops[key]

    def chosen(self, phase: Phase) -> Tensor:
        """Where this thread's steps of a phase count what they choose, as `new_counts` makes it."""
        key = phase, threading.get_ident()
        if key not in self._chosen:
            self._chosen[key] = new_counts(self._device.torch_device)
        return self._chosen[key]

    def add_to(self, counters: Counters) -> None:
        """Add what was counted since the last time; waits for the device, if there is anything to count."""
        if self._chosen:
            self._device.finish()
        for key, chosen in self._chosen.items():
            choices, experts = chosen.tolist()
            known_choices, known_experts = self._counted.get(key, (0, 0))
            self._counted[key] = choices, experts
            counters.add(key[0], tokens=choices - known_choices, hits=experts - known_experts)

    def clear(self) -> None:
        """Forget the operations, which hold the slots' memory."""
        self._ops.clear()


def new_counts(device: torch.device) -> Tensor:
    """Zeros for held layers to count in: int64 [2], choices (token, expert), and experts that a step chose."""
    with torch.inference_mode(False):  # steps outside of it write to it as well
        return torch.zeros(2, dtype=torch.int64, device=device)
