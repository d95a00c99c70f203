"""A pretended GPU: a thread that computes, and the link lane at a pace.

For tests of concurrency and for seeing how the conductor works without a GPU: the overlaps, the orders
and the results are real, the speeds are not and are never quoted. Slots are plain RAM.
"""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..compute.experts import ExpertMath, ExpertWork, run_experts
from ..memory.slots import SlotUser
from ..planning.contract import Lane
from ..planning.slots import Expert, Transfer
from ..planning.timeline import Timeline
from .base import Accelerator
from .graphs import Graphs, PretendedGraphs
from .link import LaneCopy, LinkLane
from .port import LayerPort
from .ram import InRam
from .work import HeldLayer, Queued, StepSum, WorkOfThread

DEFAULT_MEMORY_BYTES = 8 * 2**30
DEFAULT_LINK_GBPS = 12.0  # PCIe 3.0 x16


class Here:
    """A piece that was copied while it was sent."""

    def arrived(self) -> bool:
        return True

    def arrive(self) -> None:
        pass

    def fence(self) -> None:
        pass


class MemoryCarrier:
    """Copies by hand, in the lane's own thread."""

    def queues(self, source: Tensor) -> bool:
        return False

    def send(self, source: Tensor, target: Tensor, behind: Sequence[SlotUser]) -> Here:
        target.copy_(source)
        return Here()


class EmulatedDevice(InRam):
    """Slots in RAM, one compute thread and one link thread.

    Args:
        memory_bytes: how much memory to pretend to have.
        link_gbps: how fast the pretended link is; None for no pacing.
    """

    name, card_name = "emulated", "an emulated GPU"
    dense_is_packable = False
    dense_keeps_form = is_pretended = True

    def __init__(self, memory_bytes: int = DEFAULT_MEMORY_BYTES, link_gbps: float | None = DEFAULT_LINK_GBPS) -> None:
        self._memory_bytes = memory_bytes
        self._pool_bytes = self._peak_bytes = 0
        self._timeline: Timeline | None = None
        self._busy_s = 0.0
        self._asked = (time.perf_counter(), 0.0)  # when `busy_share` was asked last, and what was busy then
        self._compute = ThreadPoolExecutor(1, "moestro-emulated-gpu")
        self.link: LinkLane = LinkLane(MemoryCarrier(), link_gbps)

    @property
    def accelerator(self) -> Accelerator:
        return self

    def memory_bytes(self) -> int:
        return self._memory_bytes

    def peak_bytes(self) -> int:
        return self._peak_bytes

    def pool(self, slots: int, slot_bytes: int) -> Tensor:
        # Named, since models are built under `torch.device("meta")`.
        memory = torch.empty(slots, slot_bytes, dtype=torch.uint8, device="cpu")
        self._count(memory.numel())
        weakref.finalize(memory, self._count, -memory.numel())
        return memory

    def _count(self, n_bytes: int) -> None:
        self._pool_bytes += n_bytes
        self._peak_bytes = max(self._peak_bytes, self._pool_bytes)

    def trace(self, timeline: Timeline | None) -> None:
        self._timeline = self.link.timeline = timeline

    def pin(self, memory: Tensor) -> None:
        pass  # its link reads all memory alike

    def copy(
        self, source: Tensor, target: Tensor, urgent: bool, label: Expert, after: Sequence[SlotUser] = ()
    ) -> LaneCopy:
        return self.link.submit(source, target, urgent, label, after)

    def run(
        self, math: ExpertMath, total: StepSum, work: Sequence[ExpertWork], label: Expert, after: Transfer | None = None
    ) -> Queued:
        return WorkOfThread(self._compute.submit(self._run, math, total, work, label, after))

    def held_layer(self, math: ExpertMath, pool: Tensor, slots: Sequence[int], dtype: torch.dtype) -> HeldLayer | None:
        return None

    def busy_share(self) -> float | None:
        now_s, busy_s = time.perf_counter(), self._busy_s
        (before_s, before_busy_s), self._asked = self._asked, (now_s, busy_s)
        return min(1.0, (busy_s - before_busy_s) / max(now_s - before_s, 1e-9))

    def graphs(self) -> Graphs:
        return PretendedGraphs()

    def port(self, x: Tensor, index: Tensor, guesses: Tensor | None, pool: Tensor, experts: int) -> LayerPort:
        return LayerPort(x, index, guesses, pool, _ram, lambda: None)

    def capture_slots(self, port: LayerPort, math: ExpertMath) -> None:
        pass  # its work is no graph's

    def close(self) -> None:
        self.link.close()
        self._compute.shutdown(wait=False, cancel_futures=True)  # it may be its own thread that closes

    def _run(
        self, math: ExpertMath, total: StepSum, work: Sequence[ExpertWork], label: Expert, after: Transfer | None
    ) -> None:
        if after is not None:
            after.wait()
        start_s = time.perf_counter()
        total.add(lambda: functools.partial(run_experts, math, total.x, work))
        end_s = time.perf_counter()
        self._busy_s += end_s - start_s
        if self._timeline is not None:
            self._timeline.add(Lane.GPU, label, start_s, end_s, "expert")


def _ram(n_bytes: int) -> Tensor:
    return torch.empty(n_bytes, dtype=torch.uint8, device="cpu")
