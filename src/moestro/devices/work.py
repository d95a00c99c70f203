"""What a device is given of a layer step and gives back: routing and hidden states, a sum, work that is queued."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import BudgetError
from ..memory.slots import SlotUser
from ..planning.spelling import spelled

# x [T, D], index int [T, K], weights float [T, K], counts -> [T, D] in the dtype of x, all on the device. Adds to
# counts, int64 [2], how many choices there were of an expert with a weight, and how many experts were chosen.
HeldLayer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class HostBatch:
    """What the host must see of a layer step: index int [T, K], weights float32 [T, K], x [T, D].

    guesses: int32 [ahead, 2, G], as `gates.guess_next` makes them; None where none were asked for.
    Valid until the next `read_router`, or the next `read` of its port.
    """

    index: Tensor
    weights: Tensor
    x: Tensor
    guesses: Tensor | None = None


@dataclass(slots=True)
class StepSum:
    """What the device has of a layer step so far. One for all of its works: Qwen3's 128 experts could come one by one.

    x: hidden states [T, D], where the device keeps them. pool: uint8 [slots, slot_bytes], where experts are.
    out: float32 [T, D], from the first work on; a fixed one is there before, and zero.
    """

    x: Tensor
    pool: Tensor
    out: Tensor | None = None
    is_fixed: bool = False
    is_begun: bool = False  # something was added

    def begin(self) -> None:
        """Begin the sum of another step in the same memory."""
        self.is_begun = False

    def add(self, prepare: Callable[[], Callable[[Tensor], None]]) -> None:
        """Call what adds to a float32 [T, D].

        Args:
            prepare: takes the memory that is needed and gives what adds.

        Raises:
            torch.OutOfMemoryError: no memory, and nothing was added. BudgetError: no memory after something was.
        """
        run = prepare()
        try:
            if self.out is None:
                self.out = torch.zeros(self.x.shape, dtype=torch.float32, device=self.x.device)
            run(self.out)
        except torch.OutOfMemoryError as error:
            if not self.is_begun:
                self.out = self.out.zero_() if self.is_fixed and self.out is not None else None
                raise
            raise BudgetError(
                f"the GPU ran out of memory in the middle of a layer step; give {spelled('gpu_memory')} less, or a "
                "shorter prompt"
            ) from error
        self.is_begun = True


class Queued(SlotUser, Protocol):
    """Work queued on the device; a copy into what it reads can be queued behind it."""

    def wait(self) -> None:
        """Wait until it is launched, so that what is queued next comes after it.

        Raises:
            CopyError: a copy that it needs failed. torch.OutOfMemoryError: there was no memory for it. After either
                of them the sum is as if it had not been asked for. BudgetError: no memory in the midst of it.
        """

    def cancel(self) -> bool:
        """Cancel the launch; False when it has begun."""


@dataclass(frozen=True, slots=True)
class WorkOfThread:
    """Work that a thread of the device does or launches, whose future says when; a `Queued`."""

    future: Future[Any]

    def wait(self) -> None:
        self.future.result()

    def cancel(self) -> bool:
        return self.future.cancel()

    def launched(self) -> bool:
        return self.future.done()

    def over(self) -> bool:
        return self.future.done()

    def when_launched(self, call: Callable[[], None]) -> None:
        self.future.add_done_callback(lambda _: call())
