"""What is asked of a device, as four protocols: memory, a link, expert work, and ports of captured graphs.

Every device has memory for the dense part of a model and takes part in a layer step (`Device`); one beside the host
has the other three as well (`Accelerator`). Outside this folder a device's name and type decide nothing: there is a
property for each question.

Calls return at once where they can: `run` queues, `copy` starts. Those that may wait: `read_router` and the `read` of a
port for the device, and `Queued.wait` for work that is still to be launched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..compute.experts import ExpertMath, ExpertWork
from ..memory.slots import SlotUser
from ..planning.budget import Margin
from ..planning.clock import Traced
from ..planning.slots import Expert, Transfer
from .graphs import Graphs
from .link import LaneCopy, LinkLane
from .port import LayerPort
from .work import HeldLayer, HostBatch, Queued, StepSum


class DeviceMemory(Protocol):
    """Where dense weights, hidden states and slots are."""

    torch_device: torch.device  # of dense weights and hidden states
    margin: Margin  # what a budget leaves unused, for what torch and its libraries take
    dense_on_gpu: bool  # dense weights take the GPU's memory, not RAM
    dense_is_packable: bool  # dense layers there run by the CPU's kernels, which read packed weights
    graphs_have_memory: bool  # what captured graphs make is theirs for good, beside all else
    dense_keeps_form: bool  # quantized dense layers of a checkpoint are computed there as they are stored

    def memory_bytes(self) -> int:
        """Free memory for dense weights and slots; 0 where there is no such memory."""

    def peak_bytes(self) -> int:
        """The most memory of the device used at once so far."""

    def pool(self, slots: int, slot_bytes: int) -> Tensor:
        """uint8 [slots, slot_bytes] in the device's memory."""


class DeviceLink(Protocol):
    """What carries experts from host memory into slots."""

    link: LinkLane

    def pin(self, memory: Tensor) -> None:
        """Make host memory what the link reads fast. Where that fails, it says so once and copies are slower."""

    def copy(
        self, source: Tensor, target: Tensor, urgent: bool, label: Expert, after: Sequence[SlotUser] = ()
    ) -> LaneCopy:
        """Start copying an expert's bytes from host memory into device memory; both uint8 and of one length.

        An urgent copy overtakes those that are not. None overtakes `after`: work that reads the target, and copies
        that write it.
        """


class DeviceExperts(Protocol):
    """What computes experts that are in slots."""

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

    def busy_share(self) -> float | None:
        """Which share of the last moment it computed in, 0 to 1; None where nothing says so. Asked by one thread."""


class DevicePorts(Protocol):
    """What captures graphs, and where they meet the host."""

    def graphs(self) -> Graphs:
        """What captures this device's work, with memory of its own."""

    def port(self, x: Tensor, index: Tensor, guesses: Tensor | None, pool: Tensor, experts: int) -> LayerPort:
        """Memory for captured layer steps, in the place of `read_router`, `host_output` and `combine`.

        Args:
            x, index, guesses: as its `leave` will be given them. experts: the most of a layer.
        """

    def capture_slots(self, port: LayerPort, math: ExpertMath) -> None:
        """Have `run` take one call of the device for experts of such a layer in that port's steps, where it can."""


class Device(DeviceMemory, Traced, Protocol):
    """One accelerator, a pretended one, or none."""

    name: str  # as `--device` takes it
    is_pretended: bool  # the CPU does its work, and its memory and its link are as they were asked for
    waited_s: float  # by the host in `read_router` and ports, so far

    @property
    def card_name(self) -> str:
        """What it is, for reports."""

    @property
    def accelerator(self) -> Accelerator | None:
        """The device itself where it has slots and a link to fill them; None where the host does everything."""

    def stream_id(self) -> int:
        """Tells apart the streams of work that callers are on: work of one stream is done in order."""

    def follow(self) -> None:
        """Make the caller's current stream wait for work that this device queued on other streams.

        Two threads, each with a stream of its own, may share a model, but its buffers, slots and captured graphs exist
        once.
        """

    def read_router(self, index: Tensor, weights: Tensor, x: Tensor, guesses: Tensor | None = None) -> HostBatch:
        """Bring the routing, the hidden states and the guesses to the host; waits for the device."""

    def host_output(self, x: Tensor) -> Tensor:
        """Zeros for the CPU's part of a step: float32, as x, in host memory, until the next `read_router`."""

    def combine(self, on_cpu: Tensor | None, total: StepSum) -> Tensor:
        """Both parts added in float32, then in the dtype and on the device of the hidden states: [T, D]."""

    def finish(self) -> None:
        """Wait until all that was asked of it is done."""

    def close(self) -> None:
        """Stop threads and give back memory; the device is not used after."""


class Accelerator(Device, DeviceLink, DeviceExperts, DevicePorts, Protocol):
    """A device that has all four."""
