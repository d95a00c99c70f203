"""A pretended GPU: a thread that computes, another that copies at a paced rate.

For tests of concurrency and for seeing how the conductor works without a GPU: the overlaps, the orders
and the results are real, the speeds are not and are never quoted. Slots are plain RAM.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..experts import ExpertMath, ExpertWork, run_experts
from .base import Copy, Queued
from .host import HostDevice

DEFAULT_MEMORY_BYTES = 8 * 2**30
DEFAULT_LINK_GBPS = 12.0  # PCIe 3.0 x16
PIECE_BYTES = 16 * 2**20


@dataclass(slots=True, eq=False)
class _Job:
    """A copy on the link. rank: urgent ones first, then as they came."""

    rank: tuple[bool, int]
    link: _Link
    source: Tensor
    target: Tensor
    after: Future[Any] | None
    future: Future[None] = field(default_factory=Future)
    copied_bytes: int = 0

    def done(self) -> bool:
        return self.future.done() and not self.future.cancelled() and self.future.exception() is None

    def wait(self) -> None:
        self.future.result()

    def cancel(self) -> bool:
        return self.future.cancel() or (self.future.done() and self.future.exception() is not None)

    def hasten(self) -> None:
        self.link.hasten(self)

    def left_bytes(self) -> int:
        return self.source.numel() - self.copied_bytes


class _Link:
    """One thread that copies piece by piece, so that an urgent copy overtakes between two pieces."""

    def __init__(self, gbps: float | None) -> None:
        self._gbps = gbps
        self._queue: list[_Job] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._closed = False
        # A daemon, so that a program may end while copies are queued that nobody will read.
        threading.Thread(target=self._work, name="moestro-emulated-link", daemon=True).start()

    def submit(self, source: Tensor, target: Tensor, urgent: bool, after: Future[Any] | None) -> _Job:
        with self._changed:
            if self._closed:
                raise RuntimeError("the device is closed; load the model again")
            job = _Job((not urgent, next(self._order)), self, source, target, after)
            self._queue.append(job)
            self._changed.notify()
        if after is not None:
            after.add_done_callback(self._wake)
        return job

    def hasten(self, job: _Job) -> None:
        with self._changed:
            job.rank = (False, job.rank[1])

    def _wake(self, _: object) -> None:
        with self._changed:
            self._changed.notify()

    def _next(self) -> _Job | None:
        """The first job whose turn has come; None while all wait for work that reads their targets."""
        ready = (job for job in self._queue if job.after is None or job.after.done())
        return min(ready, key=lambda job: job.rank, default=None)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            for job in self._queue:
                job.future.cancel()
            self._changed.notify()

    def _work(self) -> None:
        free_s = 0.0  # when the link will have carried all pieces so far
        while True:
            with self._changed:
                while (job := self._next()) is None and not self._closed:
                    self._changed.wait()
                if self._closed:
                    for job in self._queue:
                        if not job.future.done():
                            job.future.set_exception(RuntimeError("the device was closed during a copy"))
                    return
            assert job is not None
            if not job.copied_bytes and not job.future.set_running_or_notify_cancel():
                self._finish(job)
                continue
            try:
                piece_bytes = self.copy_piece(job)
            except Exception as error:
                self._finish(job)
                job.future.set_exception(error)
                continue
            if self._gbps is not None:
                free_s = max(free_s, time.perf_counter()) + piece_bytes / (self._gbps * 1e9)
                time.sleep(max(0.0, free_s - time.perf_counter()))
            if job.copied_bytes == job.source.numel():
                self._finish(job)
                job.future.set_result(None)

    def copy_piece(self, job: _Job) -> int:
        """Copy the job's next piece; returns its bytes."""
        piece = slice(job.copied_bytes, job.copied_bytes + PIECE_BYTES)
        job.target[piece].copy_(job.source[piece])
        piece_bytes = len(range(*piece.indices(job.source.numel())))
        job.copied_bytes += piece_bytes
        return piece_bytes

    def _finish(self, job: _Job) -> None:
        with self._changed:
            self._queue.remove(job)
            job.after = None  # whose result nobody needs any longer


def _job_of(copy: Any) -> _Job:
    """The job of a copy, also of one that a virtual clock watches."""
    found = copy if isinstance(copy, _Job) else copy.real
    assert isinstance(found, _Job)
    return found


class EmulatedDevice(HostDevice):
    """Slots in RAM, one compute thread and one link thread.

    Args:
        memory_bytes: how much memory to pretend to have.
        link_gbps: how fast the pretended link is; None for no pacing.
    """

    name = "emulated"

    def __init__(self, memory_bytes: int = DEFAULT_MEMORY_BYTES, link_gbps: float | None = DEFAULT_LINK_GBPS) -> None:
        self._memory_bytes, self.link_gbps = memory_bytes, link_gbps
        self._pool_bytes = 0
        self._compute = ThreadPoolExecutor(1, "moestro-emulated-gpu")
        self._link = _Link(link_gbps)

    def memory_bytes(self) -> int:
        return self._memory_bytes

    def peak_bytes(self) -> int:
        return self._pool_bytes

    def pool(self, slots: int, slot_bytes: int) -> Tensor:
        self._pool_bytes += slots * slot_bytes
        # Named, since models are built under `torch.device("meta")`.
        return torch.empty(slots, slot_bytes, dtype=torch.uint8, device="cpu")

    def copy(self, source: Tensor, target: Tensor, urgent: bool, after: Queued | Copy | None = None) -> Copy:
        if urgent and after is not None and not isinstance(after, Future):
            _job_of(after).hasten()
        waits_for = after if after is None or isinstance(after, Future) else _job_of(after).future
        return self._link.submit(source, target, urgent, waits_for)

    def run(
        self,
        math: ExpertMath,
        x: Tensor,
        work: Sequence[ExpertWork],
        after: Copy | None = None,
        into: Queued | None = None,
    ) -> Queued:
        return self._compute.submit(self._run, math, x, work, after, into)

    def close(self) -> None:
        self._link.close()
        self._compute.shutdown(cancel_futures=True)

    @staticmethod
    def _run(
        math: ExpertMath, x: Tensor, work: Sequence[ExpertWork], after: Copy | None, into: Queued | None
    ) -> Tensor:
        if after is not None:
            after.wait()
        out = torch.zeros(x.shape, dtype=torch.float32) if into is None else into.result()
        run_experts(math, x, work, out)
        return out
