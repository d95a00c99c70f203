"""RAM that is smaller than the model: an operating system's page cache over the checkpoint, expert by expert."""

from __future__ import annotations

from collections import OrderedDict

from ..planning.contract import Expert, Lane
from ..planning.timeline import Timeline


class PageCache:
    """RAM over a disk: experts in the order of their last use; what does not fit is read again when it is used.

    Args:
        gbps: of the disk. ram_bytes: room for experts; None where all fit, and nothing is ever read.
    """

    def __init__(self, gbps: float | None, ram_bytes: int | None, timeline: Timeline | None = None) -> None:
        self._gbps, self._room_bytes, self.timeline = gbps, ram_bytes, timeline
        self._in_ram: OrderedDict[Expert, tuple[float, int]] = OrderedDict()  # when it came, bytes
        self.holds_all = ram_bytes is None
        self.free_s = 0.0
        self.busy_s = 0.0
        self.n_bytes = 0

    def ready_s(self, expert: Expert, n_bytes: int, now_s: float) -> float:
        """When an expert can be in RAM if it is asked for now."""
        if self._room_bytes is None:
            return 0.0
        if expert in self._in_ram:
            return self._in_ram[expert][0]
        return max(now_s, self.free_s) + self._read_s(n_bytes)

    def read(self, expert: Expert, n_bytes: int, now_s: float) -> float:
        """Use an expert, from the disk if it is not in RAM; when it is there."""
        if self._room_bytes is None:
            return 0.0
        if expert in self._in_ram:
            self._in_ram.move_to_end(expert)
            return self._in_ram[expert][0]
        start_s = max(now_s, self.free_s)
        self.free_s = start_s + self._read_s(n_bytes)
        self.busy_s += self.free_s - start_s
        self.n_bytes += n_bytes
        if self.timeline is not None:
            self.timeline.add(Lane.DISK, expert, start_s, self.free_s, "read")
        self._in_ram[expert] = (self.free_s, n_bytes)
        self._room_bytes -= n_bytes
        while self._room_bytes < 0 and len(self._in_ram) > 1:
            _, (_, freed_bytes) = self._in_ram.popitem(last=False)
            self._room_bytes += freed_bytes
        return self.free_s

    def _read_s(self, n_bytes: int) -> float:
        return n_bytes / (self._gbps * 1e9) if self._gbps else float("inf")
