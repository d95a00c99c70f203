"""No accelerator: everything is in RAM and the CPU computes it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..planning.timeline import Timeline
from .base import Accelerator
from .ram import InRam


class HostDevice(InRam):
    """The dense part on the CPU, and no slots."""

    name, card_name = "cpu", "no GPU"
    accelerator: Accelerator | None = None
    dense_is_packable = dense_keeps_form = True
    is_pretended = False

    def memory_bytes(self) -> int:
        return 0

    def peak_bytes(self) -> int:
        return 0

    def pool(self, slots: int, slot_bytes: int) -> Tensor:
        return torch.empty(0, slot_bytes, dtype=torch.uint8, device="cpu")

    def trace(self, timeline: Timeline | None) -> None:
        pass  # the CPU's work is noted by what hands it out

    def close(self) -> None:
        pass
