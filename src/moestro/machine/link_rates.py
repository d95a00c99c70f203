"""Measures a device's link, alone and while the CPU reads, by the lane that carries experts in a run.

A rate measured alone lies where CPU and link share the RAM, so both are measured at once too.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch

from ..compute.cpu import read_gbps
from ..devices import Device
from ..devices.link import LaneCopy
from ..memory.store import map_memory

_BYTES = 256 * 2**20
_TURNS, _COPIES = 3, 4
_READ_BYTES = 64 * 2**20  # of one look at how fast the CPU reads meanwhile


class LinkRates(NamedTuple):
    """GB/s: of the link alone; of the link, and of the CPU's reading, while both are busy."""

    link_gbps: float
    link_beside_cpu_gbps: float
    cpu_beside_link_gbps: float


def measure_link(device: Device, threads: int, n_bytes: int = _BYTES) -> LinkRates | None:
    """The rates of a device's link; None where it has none.

    Args:
        n_bytes: of a copy.
    """
    accelerator = device.accelerator
    if accelerator is None:
        return None
    with torch.device("cpu"):
        source, memory = map_memory(n_bytes).fill_(1), torch.ones(max(_READ_BYTES, n_bytes) // 4)
    accelerator.pin(source)
    targets = accelerator.pool(_COPIES, n_bytes)

    def copies(count: int) -> list[LaneCopy]:
        return [accelerator.copy(source, targets[place], True, (0, place)) for place in range(count)]

    def rate(count: int, start_s: float) -> float:
        return count * n_bytes / (perf_counter() - start_s) / 1e9

    copies(1)[0].wait()
    device.finish()
    alone, beside, reads = [], [], []
    for _ in range(_TURNS):
        start_s = perf_counter()
        copies(1)[0].wait()
        device.finish()
        alone.append(rate(1, start_s))
        start_s, under_way = perf_counter(), copies(_COPIES)
        while not under_way[-1].done():
            reads.append(read_gbps(memory, threads, 512))
        beside.append(rate(_COPIES, start_s))
    return LinkRates(median(alone), median(beside), median(reads))
