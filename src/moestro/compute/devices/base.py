"""What the conductor asks of a device.

Calls return at once where they can: `run` queues, `copy` starts. Two calls may wait: `read_router` for the
device, and `combine` for the parts that it adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..experts import ExpertMath, ExpertWork


@dataclass(frozen=True, slots=True)
class HostBatch:
    """What the host must see of a layer step: index int64 [T, K], weights float32 [T, K], x [T, D].

    guesses: float32 [ahead, E], how much the next layers' gates would give each expert; None where nobody asked.
    """

    index: Tensor
    weights: Tensor
    x: Tensor
    guesses: Tensor | None = None


class Copy(Protocol):
    """A copy of bytes in flight."""

    def done(self) -> bool:
        """Whether the bytes have arrived."""

    def wait(self) -> None:
        """Let the device's next work wait for the bytes; raises what the copy raised."""

    def cancel(self) -> bool:
        """Drop the copy if it has not begun; False when it has. One that failed is gone as well."""

    def hasten(self) -> None:
        """A step waits for it now: it goes before what nobody waits for, where the device can order copies."""

    def left_bytes(self) -> int:
        """How much of it has not crossed yet; 0 where that is not known."""


class Queued(Protocol):
    """Work queued on the device."""

    def result(self) -> Tensor:
        """float32 [T, D] where the device keeps hidden states; raises what the work raised."""


class Device(Protocol):
    """One accelerator, a pretended one, or none."""

    name: str
    torch_device: torch.device  # where dense weights and hidden states are

    def memory_bytes(self) -> int:
        """Free memory for dense weights and slots; 0 where there is no such memory."""

    def peak_bytes(self) -> int:
        """The most memory of the device used at once so far."""

    def pool(self, slots: int, slot_bytes: int) -> Tensor:
        """uint8 [slots, slot_bytes] in the device's memory."""

    def copy(self, source: Tensor, target: Tensor, urgent: bool, after: Queued | Copy | None = None) -> Copy:
        """Start copying bytes of host memory into device memory; both uint8 and of one length.

        An urgent copy overtakes those that are not, where the device can order them. With `after` it begins when that
        work is over, which reads the target, or that copy, which writes it.
        """

    def read_router(self, index: Tensor, weights: Tensor, x: Tensor, guesses: Tensor | None = None) -> HostBatch:
        """Bring the routing, the hidden states and the guesses to the host; waits for the device."""

    def run(
        self,
        math: ExpertMath,
        x: Tensor,
        work: Sequence[ExpertWork],
        after: Copy | None = None,
        into: Queued | None = None,
    ) -> Queued:
        """Queue expert work on the device's slots, behind `after` where it needs a copy's bytes.

        With `into` it adds to the result of that earlier work of the same step, so that a step has one sum there.
        """

    def combine(self, x: Tensor, on_cpu: Tensor | None, queued: Sequence[Queued]) -> Tensor:
        """Sum of the parts in float32, then in the dtype and on the device of x: [T, D]."""

    def close(self) -> None:
        """Stop threads and give back memory; the device is not used after."""
