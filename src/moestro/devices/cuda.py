"""A CUDA GPU, by torch's streams and events.

What waits where: the caller's stream computes; a side stream carries the link lane's pieces. Experts that are in slots
are launched at once, and so are those whose copy is all on its way, behind the event of its last piece. The others are
launched by a thread of this device, while the caller computes on the CPU. A copy into a slot that is still read waits
on the side stream for the event of that work. The host waits for the device once a layer, in `read_router` or a port's
`read`, and never for all of the device.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compute import gpu
from ..compute.experts import ExpertMath, ExpertWork, run_experts
from ..memory.slots import SlotUser
from ..planning.budget import CUDA_MARGIN
from ..planning.costs import PIECE_BYTES
from ..planning.slots import Expert, Transfer
from ..planning.timeline import Timeline
from .base import Accelerator
from .cuda_memory import HostBuffers, PinnedMemory, pinned_bytes
from .cuda_slots import CapturedSum
from .cuda_timeline import GpuSpans
from .graphs import CudaGraphs
from .link import MOST_IN_FLIGHT, LaneCopy, LinkLane
from .port import LayerPort
from .work import HeldLayer, HostBatch, Queued, StepSum, WorkOfThread

logger = logging.getLogger("moestro")


@dataclass(frozen=True, slots=True)
class _Piece:
    event: torch.cuda.Event

    def arrived(self) -> bool:
        return bool(self.event.query())

    def arrive(self) -> None:
        self.event.synchronize()

    def fence(self) -> None:
        torch.cuda.current_stream().wait_event(self.event)


class StreamCarrier:
    """Sends pieces on a stream; those of memory that could not be pinned through a ring of pinned buffers."""

    def __init__(self, device: torch.device, pinned: PinnedMemory) -> None:
        self._stream, self._pinned = torch.cuda.Stream(device), pinned
        self._ring: list[Tensor] = []
        self._next = 0

    def queues(self, source: Tensor) -> bool:
        return self._pinned.holds(source)

    def send(self, source: Tensor, target: Tensor, behind: Sequence[SlotUser]) -> _Piece:
        if not self._pinned.holds(source):
            source = self._staged(source)
        event = torch.cuda.Event(blocking=True)  # the lane's thread sleeps for it: the cores are for the experts
        with torch.cuda.stream(self._stream):
            for work in behind:
                assert isinstance(work, _Launched)
                work.fence()
            target.copy_(source, non_blocking=True)
            event.record()
        return _Piece(event)

    def _staged(self, source: Tensor) -> Tensor:
        if not self._ring:  # one more than fly, so that the one that is written is no longer read
            self._ring = [pinned_bytes(PIECE_BYTES) for _ in range(MOST_IN_FLIGHT + 1)]
        buffer = self._ring[self._next][: source.numel()]
        self._next = (self._next + 1) % len(self._ring)
        return buffer.copy_(source)


class _Launched(WorkOfThread):
    """Work on the compute stream, or on its way there; its future has the event behind it."""

    __slots__ = ()

    def over(self) -> bool:
        if not self.future.done():
            return False
        failed = self.future.cancelled() or self.future.exception() is not None
        return failed or bool(self.future.result().query())

    def fence(self) -> None:
        torch.cuda.current_stream().wait_event(self.future.result())


class CudaDevice:
    """The current CUDA device.

    Args:
        link_gbps: paces the copies to that rate; None for as fast as the link is.
    """

    name = "cuda"
    margin = CUDA_MARGIN
    dense_on_gpu = graphs_have_memory = True
    dense_is_packable = is_pretended = False

    def __init__(self, link_gbps: float | None = None) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.dense_keeps_form = gpu.has_kernels()
        self._pinned = PinnedMemory()
        self._buffers = HostBuffers()
        self._spans: GpuSpans | None = None
        self._reached = torch.cuda.Event()  # by the device, when the host may read on
        self._stream: Any = torch.cuda.current_stream()  # on which it was asked last
        self.waited_s = 0.0
        # By the id of a layer's math, which is held so that no other can take its id.
        self._kernels: dict[tuple[int, torch.dtype], tuple[ExpertMath, gpu.GpuKernel | None]] = {}
        self._launcher = ThreadPoolExecutor(1, "moestro-launch")
        self._launched: Future[Any] | None = None  # what it was given last
        self.link: LinkLane = LinkLane(StreamCarrier(self.torch_device, self._pinned), link_gbps)

    @property
    def accelerator(self) -> Accelerator:
        return self

    @property
    def card_name(self) -> str:
        return torch.cuda.get_device_name(self.torch_device)

    def memory_bytes(self) -> int:
        free_bytes, _ = torch.cuda.mem_get_info(self.torch_device)
        return int(free_bytes)

    def peak_bytes(self) -> int:
        return int(torch.cuda.max_memory_allocated(self.torch_device))

    def pool(self, slots: int, slot_bytes: int) -> Tensor:
        memory = torch.empty(slots, slot_bytes, dtype=torch.uint8, device=self.torch_device)
        self.finish()  # what had this memory before may still be read, and the link's stream waits for no other
        return memory

    def pin(self, memory: Tensor) -> None:
        if (why := self._pinned.add(memory)) is not None:
            logger.warning("%s; copies of what is not pinned go through a buffer, more slowly", why)
            with suppress(RuntimeError):  # the next launch tells of the failure once more
                torch.zeros(1, device=self.torch_device)

    def trace(self, timeline: Timeline | None) -> None:
        if self._spans is not None:
            self._spans.fill_in()
        self._spans = None if timeline is None else GpuSpans(timeline)
        self.link.timeline = timeline

    def copy(
        self, source: Tensor, target: Tensor, urgent: bool, label: Expert, after: Sequence[SlotUser] = ()
    ) -> LaneCopy:
        return self.link.submit(source, target, urgent, label, after)

    def stream_id(self) -> int:
        return int(torch.cuda.current_stream().cuda_stream)

    def follow(self) -> None:
        stream = torch.cuda.current_stream()
        if stream != self._stream:
            event = torch.cuda.Event()
            event.record(self._stream)
            stream.wait_event(event)
            self._stream = stream

    def read_router(self, index: Tensor, weights: Tensor, x: Tensor, guesses: Tensor | None = None) -> HostBatch:
        read = self._buffers.read
        batch = HostBatch(
            read("index", index.long()),
            read("weights", weights.float()),
            read("x", x),
            None if guesses is None else read("guesses", guesses),
        )
        self._wait()
        return batch

    def _wait(self) -> None:
        start_s = time.perf_counter()
        self._reached.record()
        self._reached.synchronize()
        self.waited_s += time.perf_counter() - start_s

    def port(self, x: Tensor, index: Tensor, guesses: Tensor | None, pool: Tensor, experts: int) -> LayerPort:
        port = LayerPort(x, index, guesses, pool, pinned_bytes, self._wait)
        port.total = CapturedSum(port, experts)
        return port

    def capture_slots(self, port: LayerPort, math: ExpertMath) -> None:
        total = port.total
        kernel = self._kernel(math, total.x.dtype) if len(total.pool) else None
        if kernel is not None and isinstance(total, CapturedSum):
            total.capture(kernel, self._slot_graphs)

    def graphs(self) -> CudaGraphs:
        return CudaGraphs(self.torch_device)

    @functools.cached_property
    def _slot_graphs(self) -> CudaGraphs:
        """Graphs with memory of their own: they run between the graphs of a step, whose memory is in use then."""
        return CudaGraphs(self.torch_device)

    def host_output(self, x: Tensor) -> Tensor:
        return self._buffers.take("output", x.shape, torch.float32).zero_()

    def run(
        self, math: ExpertMath, total: StepSum, work: Sequence[ExpertWork], label: Expert, after: Transfer | None = None
    ) -> Queued:
        is_idle = self._launched is None or self._launched.done()
        if after is not None and not (isinstance(after, LaneCopy) and after.is_sent and is_idle):
            given = torch.cuda.current_stream(), math, total, work, label, after
            self._launched = self._launcher.submit(self._launch_behind, *given)
            return _Launched(self._launched)
        future: Future[torch.cuda.Event] = Future()
        try:
            if after is not None:
                after.wait()
            future.set_result(self._launch(math, total, work, label))
        except Exception as error:
            future.set_exception(error)
        return _Launched(future)

    def _launch_behind(
        self, stream: Any, math: ExpertMath, total: StepSum, work: Sequence[ExpertWork], label: Expert, after: Transfer
    ) -> torch.cuda.Event:
        with torch.no_grad(), torch.cuda.device(self.torch_device), torch.cuda.stream(stream):
            after.wait()
            return self._launch(math, total, work, label)

    def _launch(self, math: ExpertMath, total: StepSum, work: Sequence[ExpertWork], label: Expert) -> torch.cuda.Event:
        begin = None if self._spans is None else self._spans.mark()
        total.add(functools.partial(self._prepare, math, total, work))
        event = torch.cuda.Event()
        event.record()
        if self._spans is not None and begin is not None:
            self._spans.add(label, begin)
        return event

    def _prepare(self, math: ExpertMath, total: StepSum, work: Sequence[ExpertWork]) -> Callable[[Tensor], None]:
        """What runs the experts, with the memory that it needs."""
        kernel, x = self._kernel(math, total.x.dtype), total.x
        if kernel is not None:
            if isinstance(total, CapturedSum) and (ready := total.prepared(kernel, work)) is not None:
                return ready
            plan = gpu.plan_of(kernel, total.pool, work, len(x))
            workspace = torch.empty(gpu.workspace_bytes(kernel, plan), dtype=torch.uint8, device=x.device)
            return lambda out: gpu.run_grouped(kernel, total.pool, plan, x, out, workspace=workspace)
        on_device = []
        for item in work:
            rows, weights = (part.to(self.torch_device, non_blocking=True) for part in item.routed())
            on_device.append(ExpertWork(item.packed, item.neurons, rows, weights))
        return functools.partial(run_experts, math, x, on_device)

    def _kernel(self, math: ExpertMath, dtype: torch.dtype) -> gpu.GpuKernel | None:
        """The kernels' form of a layer's experts; None for the twin."""
        key = id(math), dtype
        if key not in self._kernels:
            self._kernels[key] = math, gpu.kernel_of(math, dtype, self.torch_device)
        return self._kernels[key][1]

    def held_layer(self, math: ExpertMath, pool: Tensor, slots: Sequence[int], dtype: torch.dtype) -> HeldLayer | None:
        kernel = self._kernel(math, dtype)
        if kernel is None:
            return None
        table = gpu.table_of(kernel, slots, self.torch_device)

        def run(x: Tensor, index: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
            out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
            plan = gpu.plan_on_device(kernel, index, weights, table, counts=counts)
            gpu.run_grouped(kernel, pool, plan, x, out, add=False)
            return out.to(x.dtype)

        return run

    def busy_share(self) -> float | None:
        try:
            return torch.cuda.utilization(self.torch_device) / 100
        except Exception:  # nvidia-ml-py is missing, or the driver does not say: an error of a kind of its own
            return None

    def finish(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def combine(self, on_cpu: Tensor | None, total: StepSum) -> Tensor:
        if on_cpu is not None:
            here = on_cpu.to(self.torch_device, non_blocking=True)
            total.out = here if total.out is None else total.out.add_(here)
        return torch.zeros_like(total.x) if total.out is None else total.out.to(total.x.dtype)

    def close(self) -> None:
        self.link.close()
        self._launcher.shutdown(wait=False, cancel_futures=True)  # it may be the launcher's thread that closes
        self.finish()
        self._pinned.close()
        self._buffers.clear()
