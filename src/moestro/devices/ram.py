"""A layer step where hidden states are in RAM, so that nothing has to be brought to the host or back."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ..planning.budget import Margin
from .work import HostBatch, StepSum


class InRam:
    """What devices share whose memory is RAM."""

    torch_device = torch.device("cpu")
    margin = Margin(0, 0)
    dense_on_gpu = graphs_have_memory = False  # what pretended graphs hold is no GPU's
    waited_s = 0.0

    def stream_id(self) -> int:
        return threading.get_ident()  # a thread's work is done in order

    def follow(self) -> None:
        pass  # there are no streams

    def read_router(self, index: Tensor, weights: Tensor, x: Tensor, guesses: Tensor | None = None) -> HostBatch:
        return HostBatch(index, weights.float(), x, guesses)

    def host_output(self, x: Tensor) -> Tensor:
        return torch.zeros(x.shape, dtype=torch.float32)

    def combine(self, on_cpu: Tensor | None, total: StepSum) -> Tensor:
        parts = [part for part in (on_cpu, total.out) if part is not None]
        if not parts:
            return torch.zeros_like(total.x)
        both = parts[0] if len(parts) == 1 else parts[0].add_(parts[1])
        return both.to(total.x.dtype)

    def finish(self) -> None:
        pass  # a step ends when its work is done
