"""Layers whose experts are all on the device for good: there is nothing to decide, and the host waits for nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..compute.experts import ExpertMath
from ..devices import Device, HeldLayer
from ..memory.slots import SlotPool


class HeldLayers:
    """The held layers of one conductor, as operations."""

    def __init__(self, device: Device, math: Sequence[ExpertMath]) -> None:
        self._device, self._math = device, math
        self._ops: dict[tuple[int, torch.dtype], HeldLayer | None] = {}

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

    def clear(self) -> None:
        """Forget the operations, which hold the slots' memory."""
        self._ops.clear()
