"""What the lanes did when, in a replay or a run, written as a Chrome trace.

Open it in chrome://tracing or ui.perfetto.dev.
"""

from __future__ import annotations

import json
from pathlib import Path

from .contract import Expert, Lane

_ROWS = {Lane.GPU: 1, Lane.LINK: 2, Lane.CPU: 3, Lane.DISK: 4}


class Timeline:
    """Spans of time on lanes."""

    def __init__(self) -> None:
        self.spans: list[tuple[Lane, Expert, float, float, str]] = []

    def add(self, lane: Lane, expert: Expert, start_s: float, end_s: float, kind: str) -> None:
        """Note what a lane did; an expert of -1 is a layer's dense part."""
        self.spans.append((lane, expert, start_s, end_s, kind))

    def save(self, path: Path) -> None:
        """Write the spans as a Chrome trace (JSON, times in microseconds)."""
        names = [
            {"ph": "M", "pid": 1, "tid": row, "name": "thread_name", "args": {"name": lane.value}}
            for lane, row in _ROWS.items()
        ]
        zero_s = min((start_s for _, _, start_s, _, _ in self.spans), default=0.0)
        spans = [
            {
                "ph": "X",
                "pid": 1,
                "tid": _ROWS[lane],
                "name": f"{kind} L{layer}" + (f" E{expert}" if expert >= 0 else ""),
                "cat": kind,
                "ts": round((start_s - zero_s) * 1e6, 3),
                "dur": round((end_s - start_s) * 1e6, 3),
                "args": {"layer": layer, "expert": expert},
            }
            for lane, (layer, expert), start_s, end_s, kind in self.spans
        ]
        path.write_text(json.dumps({"traceEvents": names + spans, "displayTimeUnit": "ms"}))
