"""A CUDA GPU, by torch's streams and events.

The current stream computes; a side stream copies. The side stream waits for the computing one before it
overwrites a slot, and work that needs a copy waits for the copy's event, so the host waits once a layer,
in `read_router`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..experts import ExpertMath, ExpertWork, run_experts
from .base import Copy, HostBatch, Queued

PIECE_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class _Copy:
    event: torch.cuda.Event

    def done(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self.event)

    def cancel(self) -> bool:
        return False

    def hasten(self) -> None:
        pass  # a stream's order is fixed

    def left_bytes(self) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class _Queued:
    out: Tensor

    def result(self) -> Tensor:
        return self.out


class CudaDevice:
    """The current CUDA device."""

    name = "cuda"

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self._link = torch.cuda.Stream(self.torch_device)

    def memory_bytes(self) -> int:
        free_bytes, _ = torch.cuda.mem_get_info(self.torch_device)
        return int(free_bytes)

    def peak_bytes(self) -> int:
        return int(torch.cuda.max_memory_allocated(self.torch_device))

    def pool(self, slots: int, slot_bytes: int) -> Tensor:
        return torch.empty(slots, slot_bytes, dtype=torch.uint8, device=self.torch_device)

    def copy(self, source: Tensor, target: Tensor, urgent: bool, after: Queued | Copy | None = None) -> Copy:
        # Also behind `after`, which was queued on one of the two streams.
        self._link.wait_stream(torch.cuda.current_stream())
        event = torch.cuda.Event()
        with torch.cuda.stream(self._link):
            for begin in range(0, source.numel(), PIECE_BYTES):
                piece = slice(begin, begin + PIECE_BYTES)
                target[piece].copy_(source[piece], non_blocking=True)
            event.record()
        return _Copy(event)

    def read_router(self, index: Tensor, weights: Tensor, x: Tensor, guesses: Tensor | None = None) -> HostBatch:
        on_host = [t.to("cpu", non_blocking=True) for t in (index, weights.float(), x)]
        guessed = None if guesses is None else guesses.to("cpu", non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return HostBatch(on_host[0], on_host[1], on_host[2], guessed)

    def run(
        self,
        math: ExpertMath,
        x: Tensor,
        work: Sequence[ExpertWork],
        after: Copy | None = None,
        into: Queued | None = None,
    ) -> Queued:
        if after is not None:
            after.wait()
        out = torch.zeros(x.shape, dtype=torch.float32, device=self.torch_device) if into is None else into.result()
        on_device = []
        for item in work:
            rows, weights = (part.to(self.torch_device) for part in item.routed())
            on_device.append(ExpertWork(item.packed, item.neurons, rows, weights))
        run_experts(math, x, on_device, out)
        return _Queued(out)

    def combine(self, x: Tensor, on_cpu: Tensor | None, queued: Sequence[Queued]) -> Tensor:
        total = None if on_cpu is None else on_cpu.to(self.torch_device)
        for part in queued:
            total = part.result() if total is None else total.add_(part.result())
        return torch.zeros_like(x) if total is None else total.to(x.dtype)

    def close(self) -> None:
        torch.cuda.synchronize(self.torch_device)
