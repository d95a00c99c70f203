"""What the conductor asks of a device.

Calls return at once where they can: `run` queues, `copy` starts. Those that may wait: `read_router` and the `read` of a
port for the device, and `Queued.wait` for work that is still to be launched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..compute.experts import ExpertMath, ExpertWork
from ..errors import BudgetError
from ..memory.slots import SlotUser
from ..planning.slots import Expert, Transfer
from ..planning.timeline import Timeline
from .link import LaneCopy, LinkLane

if TYPE_CHECKING:
    from .port import LayerPort

# x [T, D], index int [T, K], weights float [T, K], counts -> [T, D] in the dtype of x, all on the device. Adds to
# counts, int64 [2], how many choices there were of an expert with a weight, and how many experts were chosen.
HeldLayer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class HostBatch:
    """What the host must see of a layer step: index int [T, K], weights float32 [T, K], x [T, D].

    guesses: int32 [ahead, 2, G], as `routers.guess_next` makes them; None where nobody asked.
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
        """Another step, in the same memory."""
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
                "the GPU ran out of memory in the middle of a layer step; give --gpu-memory less, or a shorter prompt"
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
        """Do not launch it, if nobody has begun to; False when somebody has."""


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


class Device(Protocol):
    """One accelerator, a pretended one, or none."""

    name: str
    torch_device: torch.device  # where dense weights and hidden states are
    waited_s: float  # by the host in `read_router` and ports, so far

    @property
    def link(self) -> LinkLane | None:
        """What carries copies; None where nothing is ever copied."""

    def memory_bytes(self) -> int:
        """Free memory for dense weights and slots; 0 where there is no such memory."""

    def peak_bytes(self) -> int:
        """The most memory of the device used at once so far."""

    def pool(self, slots: int, slot_bytes: int) -> Tensor:
        """uint8 [slots, slot_bytes] in the device's memory."""

    def pin(self, memory: Tensor) -> None:
        """Make host memory what the link reads fast. Where that fails, it says so once and copies are slower."""

    def trace(self, timeline: Timeline | None) -> None:
        """Note on a timeline what the device and its link do from now on; None to stop, which fills it in."""

    def copy(
        self, source: Tensor, target: Tensor, urgent: bool, label: Expert, after: Sequence[SlotUser] = ()
    ) -> LaneCopy:
        """Start copying an expert's bytes from host memory into device memory; both uint8 and of one length.

        An urgent copy overtakes those that are not. None overtakes `after`: work that reads the target, and copies
        that write it.
        """

    def follow(self) -> None:
        """Let the caller's stream wait for what was asked of the device on another one: two threads may share a model,
        each on a stream of its own, while buffers, slots and recorded graphs are there once."""

    def read_router(self, index: Tensor, weights: Tensor, x: Tensor, guesses: Tensor | None = None) -> HostBatch:
        """Bring the routing, the hidden states and the guesses to the host; waits for the device."""

    def port(self, x: Tensor, index: Tensor, guesses: Tensor | None, pool: Tensor, experts: int) -> LayerPort:
        """Memory for recorded layer steps, in the place of `read_router`, `host_output` and `combine`.

        Args:
            x, index, guesses: as its `leave` will be given them. experts: the most of a layer.
        """

    def record_slots(self, port: LayerPort, math: ExpertMath) -> None:
        """Have `run` take one call of the device for experts of such a layer in that port's steps, where it can."""

    def host_output(self, x: Tensor) -> Tensor:
        """Zeros for the CPU's part of a step: float32, as x, in host memory, until the next `read_router`."""

    def run(
        self, math: ExpertMath, total: StepSum, work: Sequence[ExpertWork], label: Expert, after: Transfer | None = None
    ) -> Queued:
        """Queue expert work on the device's slots, behind `after` where it needs a copy's bytes; it adds to `total`.

        Args:
            label: the layer and the first expert, for the timeline.
        """

    def held_layer(self, math: ExpertMath, pool: Tensor, slots: Sequence[int], dtype: torch.dtype) -> HeldLayer | None:
        """A layer whose experts are all in slots for good, as an operation that never waits for the host.

        Args:
            slots: of its experts, in order. dtype: of the hidden states.

        Returns:
            None where the device has no such operation for it; the layer then goes the way of all.
        """

    def finish(self) -> None:
        """Wait until all that was asked of it is done."""

    def combine(self, on_cpu: Tensor | None, total: StepSum) -> Tensor:
        """Both parts added in float32, then in the dtype and on the device of the hidden states: [T, D]."""

    def close(self) -> None:
        """Stop threads and give back memory; the device is not used after."""
