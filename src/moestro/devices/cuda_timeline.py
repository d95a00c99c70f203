"""What a GPU did when, by timing events that are read at the end: to ask earlier would wait for the device."""

from __future__ import annotations

import time

import torch

from ..planning.contract import Lane
from ..planning.slots import Expert
from ..planning.timeline import Timeline


class GpuSpans:
    """Pairs of events on the compute stream, and the host's time at the first one."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._spans: list[tuple[Expert, torch.cuda.Event, torch.cuda.Event]] = []
        self._zero = self.mark()
        self._zero.synchronize()
        self._zero_s = time.perf_counter()

    def mark(self) -> torch.cuda.Event:
        """An event on the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, label: Expert, begin: torch.cuda.Event) -> None:
        """Work that began there ends here."""
        self._spans.append((label, begin, self.mark()))

    def fill_in(self) -> None:
        """Write all spans to the timeline; waits for the last."""
        for label, begin, end in self._spans:
            end.synchronize()
            start_s, end_s = (self._zero_s + self._zero.elapsed_time(event) / 1e3 for event in (begin, end))
            self._timeline.add(Lane.GPU, label, start_s, end_s, "expert")
        self._spans = []
