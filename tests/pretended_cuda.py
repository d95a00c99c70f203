"""torch.cuda's streams and events on the CPU, as far as `CudaDevice` uses them: work is done when it is queued, but the
events behind it come a while later, as on a GPU.

It shows that the device's threads wait for the right things and come to an end; not what a GPU computes or overlaps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch

from moestro.devices.cuda import CudaDevice

LATE_S = 0.002


class Event:
    """Over a while after it was captured."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.at_s: float | None = None

    def record(self, stream: Any = None) -> None:
        self.at_s = time.perf_counter() + LATE_S

    def query(self) -> bool:
        assert self.at_s is not None
        return time.perf_counter() >= self.at_s

    def synchronize(self) -> None:
        assert self.at_s is not None
        time.sleep(max(0.0, self.at_s - time.perf_counter()))

    def elapsed_time(self, other: Event) -> float:
        assert self.at_s is not None
        assert other.at_s is not None
        return (other.at_s - self.at_s) * 1e3


class Stream:
    """Takes events that were captured, and lets the host go on."""

    cuda_stream = 0

    def __init__(self, device: Any = None) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        assert event.at_s is not None


class Runtime:
    """Registers all host memory that it is given."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.registered[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


@contextmanager
def pretended_cuda(memory_bytes: int = 2**33) -> Iterator[tuple[CudaDevice, Runtime]]:
    """A CUDA device on pretended streams, its tensors on the CPU."""
    runtime, stream = Runtime(), Stream()
    fakes = {
        "Event": Event,
        "Stream": Stream,
        "cudart": lambda: runtime,
        "current_device": lambda: 0,
        "current_stream": lambda: stream,
        "device": lambda _: nullcontext(),
        "max_memory_allocated": lambda _: 0,
        "mem_get_info": lambda _: (memory_bytes, memory_bytes),
        "stream": lambda _: nullcontext(),
        "synchronize": lambda _: None,
    }
    with mock.patch.multiple(torch.cuda, **fakes):
        device = CudaDevice()
        device.torch_device = torch.device("cpu")
        yield device, runtime
