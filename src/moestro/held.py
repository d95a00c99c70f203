"""Layers whose experts are all on the device for good: there is nothing to decide, and the host waits for nothing.

So the host does not see what their routers choose. The device counts it, and is asked when the counters are read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .accounts import Counters
from .compute.devices import Device, HeldLayer
from .compute.experts import ExpertMath
from .memory.slots import SlotPool
from .planning.contract import Phase


class HeldLayers:
    """The held layers of one conductor, as operations."""

    def __init__(self, device: Device, math: Sequence[ExpertMath]) -> None:
        self._device, self._math = device, math
        self._ops: dict[tuple[int, torch.dtype], HeldLayer | None] = {}
        self._chosen: dict[Phase, Tensor] = {}  # by all steps since the counters were read

    def op(self, layer: int, dtype: torch.dtype, slots: SlotPool, experts: int) -> HeldLayer | None:
        """One layer of so many experts; None where they are not all held, or the device has no such operation."""
        key = layer, dtype
        if key not in self._ops:
            keys = [(layer, expert) for expert in range(experts)]
            places = [slots.find(key) for key in keys] if slots.held.issuperset(keys) else []
            indices = [place.index for place in places if place is not None]
            self._ops[key] = (
                self._device.held_layer(self._math[layer], slots.memory, indices, dtype) if indices else None
            )
        return self._ops[key]

    def chosen(self, phase: Phase) -> Tensor:
        """Where steps of a phase count what they choose, as `new_counts` makes it."""
        if phase not in self._chosen:
            self._chosen[phase] = new_counts(self._device.torch_device)
        return self._chosen[phase]

    def add_to(self, counters: Counters) -> None:
        """Move what was counted to the counters; waits for the device."""
        for phase, chosen in self._chosen.items():
            choices, experts = chosen.tolist()
            chosen.zero_()
            counters.tokens += choices
            counters.hits += experts if phase is Phase.DECODE else 0

    def clear(self) -> None:
        """Forget the operations, which hold the slots' memory."""
        self._ops.clear()


def new_counts(device: torch.device) -> Tensor:
    """Zeros for held layers to count in: int64 [2], choices (token, expert), and experts that a step chose."""
    with torch.inference_mode(False):  # steps outside of it write to it as well
        return torch.zeros(2, dtype=torch.int64, device=device)
