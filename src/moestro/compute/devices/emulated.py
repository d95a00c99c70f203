"""A pretended GPU: a worker thread that computes, another that copies at a paced rate.

For tests of concurrency and for seeing how the conductor works without a GPU: the overlaps, the orders
and the results are real, the speeds are not and are never quoted. Slots are plain RAM.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ..experts import ExpertMath, ExpertWork, run_experts
from .base import Copy, Queued
from .host import HostDevice

DEFAULT_MEMORY_BYTES = 8 * 2**30
DEFAULT_LINK_GBPS = 12.0  # PCIe 3.0 x16
PIECE_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class _Copy:
    future: Future[None]

    def done(self) -> bool:
        return self.future.done() and not self.future.cancelled() and self.future.exception() is None

    def wait(self) -> None:
        self.future.result()

    def cancel(self) -> bool:
        return self.future.cancel()


class EmulatedDevice(HostDevice):
    """Slots in RAM, one compute thread and one link thread.

    Args:
        memory_bytes: how much memory to pretend to have.
        link_gbps: how fast the pretended link is; None for no pacing.
    """

    name = "emulated"

    def __init__(self, memory_bytes: int = DEFAULT_MEMORY_BYTES, link_gbps: float | None = DEFAULT_LINK_GBPS) -> None:
        self._memory_bytes = memory_bytes
        self._link_gbps = link_gbps
        self._pool_bytes = 0
        self._compute = ThreadPoolExecutor(1, "moestro-emulated-gpu")
        self._link = ThreadPoolExecutor(1, "moestro-emulated-link")

    def memory_bytes(self) -> int:
        return self._memory_bytes

    def peak_bytes(self) -> int:
        return self._pool_bytes

    def pool(self, slots: int, slot_bytes: int) -> Tensor:
        self._pool_bytes += slots * slot_bytes
        # Named, since models are built under `torch.device("meta")`.
        return torch.empty(slots, slot_bytes, dtype=torch.uint8, device="cpu")

    def copy(self, source: Tensor, target: Tensor) -> Copy:
        return _Copy(self._link.submit(self._copy_pieces, source, target))

    def run(self, math: ExpertMath, x: Tensor, work: Sequence[ExpertWork], after: Copy | None = None) -> Queued:
        return self._compute.submit(self._run, math, x, work, after)

    def close(self) -> None:
        self._compute.shutdown(cancel_futures=True)
        self._link.shutdown(cancel_futures=True)

    def _copy_pieces(self, source: Tensor, target: Tensor) -> None:
        start_s = time.perf_counter()
        for begin in range(0, source.numel(), PIECE_BYTES):
            piece = slice(begin, begin + PIECE_BYTES)
            target[piece].copy_(source[piece])
            if self._link_gbps is not None:
                due_s = start_s + min(begin + PIECE_BYTES, source.numel()) / (self._link_gbps * 1e9)
                time.sleep(max(0.0, due_s - time.perf_counter()))

    @staticmethod
    def _run(math: ExpertMath, x: Tensor, work: Sequence[ExpertWork], after: Copy | None) -> Tensor:
        if after is not None:
            after.wait()
        out = torch.zeros(x.shape, dtype=torch.float32)
        run_experts(math, x, work, out)
        return out
