"""No accelerator: everything is in RAM and the CPU computes it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..compute.experts import ExpertMath, ExpertWork
from ..memory.slots import SlotUser
from ..planning.slots import Expert, Transfer
from ..planning.timeline import Timeline
from .base import HeldLayer, HostBatch, Queued, StepSum
from .link import LaneCopy, LinkLane
from .port import LayerPort


class HostDevice:
    """The dense part on the CPU, no slots; `run` and `copy` never come, since `check` refuses what needs them."""

    name = "cpu"
    torch_device = torch.device("cpu")
    link: LinkLane | None = None  # nothing is ever copied
    waited_s = 0.0

    def memory_bytes(self) -> int:
        return 0

    def peak_bytes(self) -> int:
        return 0

    def pool(self, slots: int, slot_bytes: int) -> Tensor:
        return torch.empty(0, slot_bytes, dtype=torch.uint8, device="cpu")

    def pin(self, memory: Tensor) -> None:
        pass

    def trace(self, timeline: Timeline | None) -> None:
        pass

    def copy(
        self, source: Tensor, target: Tensor, urgent: bool, label: Expert, after: Sequence[SlotUser] = ()
    ) -> LaneCopy:
        raise NotImplementedError("there is no device memory to copy to")

    def follow(self) -> None:
        pass

    def read_router(self, index: Tensor, weights: Tensor, x: Tensor, guesses: Tensor | None = None) -> HostBatch:
        return HostBatch(index, weights.float(), x, guesses)

    def port(self, x: Tensor, index: Tensor, guesses: Tensor | None, pool: Tensor, experts: int) -> LayerPort:
        return LayerPort(x, index, guesses, pool, _host_bytes, lambda: None)

    def record_slots(self, port: LayerPort, math: ExpertMath) -> None:
        pass

    def host_output(self, x: Tensor) -> Tensor:
        return torch.zeros(x.shape, dtype=torch.float32)

    def run(
        self, math: ExpertMath, total: StepSum, work: Sequence[ExpertWork], label: Expert, after: Transfer | None = None
    ) -> Queued:
        raise NotImplementedError("there is no device to run on")

    def held_layer(self, math: ExpertMath, pool: Tensor, slots: Sequence[int], dtype: torch.dtype) -> HeldLayer | None:
        return None

    def finish(self) -> None:
        pass  # a step ends when its work is done

    def combine(self, on_cpu: Tensor | None, total: StepSum) -> Tensor:
        parts = [part for part in (on_cpu, total.out) if part is not None]
        if not parts:
            return torch.zeros_like(total.x)
        both = parts[0] if len(parts) == 1 else parts[0].add_(parts[1])
        return both.to(total.x.dtype)

    def close(self) -> None:
        pass


def _host_bytes(n_bytes: int) -> Tensor:
    return torch.empty(n_bytes, dtype=torch.uint8, device="cpu")
