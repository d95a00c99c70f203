"""What a policy sees: a slot table on a clock, live or in a replay."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from .clock import Clock
from .contract import GPU0, RAM, Expert, Lane, Place
from .slots import SlotTable

_INF = float("inf")


@dataclass(frozen=True, slots=True)
class TableView:
    """Where experts are now.

    Args:
        in_ram: experts that have a copy in RAM, or on the disk behind it.
    """

    table: SlotTable
    clock: Clock
    in_ram: Collection[Expert]

    @property
    def now_s(self) -> float:
        return self.clock.now_s

    @property
    def failures(self) -> int:
        return self.table.failures

    def ready_s(self, expert: Expert, at: Place) -> float:
        if at is not GPU0 and at != GPU0:
            return self.clock.in_ram_s(expert) if at == RAM and expert in self.in_ram else _INF
        slot = self.table.find(expert)
        if slot is None:
            return _INF
        if slot.filling is None or self.table.ready(expert):
            return 0.0  # and not the time, which goes on between two questions
        now_s = self.clock.now_s
        # Later than now while it is in flight, also where no rate is known to say when.
        return max(slot.eta_s, now_s + self.clock.left_s(slot.filling), math.nextafter(now_s, math.inf))

    def evictable(self, at: Place, layer: int) -> Collection[Expert]:
        return self.table.evictable() if at == GPU0 else ()

    def free_slots(self, at: Place, layer: int) -> int:
        return self.table.empty() if at == GPU0 else 0

    def lane_free_s(self, lane: Lane) -> float:
        return self.clock.lane_free_s(lane)
