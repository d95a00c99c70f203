"""No accelerator: everything is in RAM and the CPU computes it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..experts import ExpertMath, ExpertWork
from .base import Copy, HostBatch, Queued


class HostDevice:
    """The dense part on the CPU, no slots; `run` and `copy` never come, since `check` refuses what needs them."""

    name = "cpu"
    torch_device = torch.device("cpu")

    def memory_bytes(self) -> int:
        return 0

    def peak_bytes(self) -> int:
        return 0

    def pool(self, slots: int, slot_bytes: int) -> Tensor:
        return torch.empty(0, slot_bytes, dtype=torch.uint8, device="cpu")

    def copy(self, source: Tensor, target: Tensor, urgent: bool, after: Queued | Copy | None = None) -> Copy:
        raise NotImplementedError("there is no device memory to copy to")

    def read_router(self, index: Tensor, weights: Tensor, x: Tensor, guesses: Tensor | None = None) -> HostBatch:
        return HostBatch(index, weights.float(), x, guesses)

    def run(
        self,
        math: ExpertMath,
        x: Tensor,
        work: Sequence[ExpertWork],
        after: Copy | None = None,
        into: Queued | None = None,
    ) -> Queued:
        raise NotImplementedError("there is no device to run on")

    def combine(self, x: Tensor, on_cpu: Tensor | None, queued: Sequence[Queued]) -> Tensor:
        total = on_cpu
        for part in queued:
            total = part.result() if total is None else total.add_(part.result())
        return torch.zeros_like(x) if total is None else total.to(x.dtype)

    def close(self) -> None:
        pass
