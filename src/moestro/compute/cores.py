"""Which processors compute. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

import psutil


def core_cpus() -> list[int]:
    """One processor of each physical core that this process may use."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(psutil.cpu_count(logical=False) or 1))
    first: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        first.setdefault(siblings.read_text("utf-8").strip() if siblings.exists() else str(cpu), cpu)
    return list(first.values())
