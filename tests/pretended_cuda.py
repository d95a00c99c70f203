"""torch.cuda's streams and events on the CPU, as far as `CudaDevice` uses them: all work is over when it is queued.

It shows that the device's threads wait for the right things and come to an end; not what a GPU computes or overlaps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch

from moestro.compute.devices.cuda import CudaDevice


class Event:
    """Over when it was recorded."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.at_s: float | None = None

    def record(self, stream: Any = None) -> None:
        self.at_s = time.perf_counter()

    def query(self) -> bool:
        assert self.at_s is not None
        return True

    def synchronize(self) -> None:
        assert self.at_s is not None

    def elapsed_time(self, other: Event) -> float:
        assert self.at_s is not None
        assert other.at_s is not None
        return (other.at_s - self.at_s) * 1e3


class Stream:
    """Waits for events that were recorded."""

    def __init__(self, device: Any = None) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        event.synchronize()


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
