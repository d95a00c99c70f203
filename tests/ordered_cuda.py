"""torch.cuda's streams and events as what orders things: finds who touches memory that another stream still uses.

Work is done when it is queued, as in `pretended_cuda`; here each stream and the host have a clock of what is surely
over before their next operation. An event takes its stream's clock along; whatever waits for it, or sees that it is
over, knows of all that came before. So an access that nothing puts behind an earlier one is found, however threads run.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from moestro.devices.cuda import CudaDevice

Clock = dict[Hashable, int]  # of each stream, and of the host, how many operations are over
HOST = "host"


class Order:
    """All clocks, and who touched which memory last. What any thread of the host knows to be over is over for all."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.lock = threading.RLock()
        self.clocks: dict[Hashable, Clock] = {HOST: {}}
        self.races: list[str] = []
        self._writes: dict[Hashable, tuple[Hashable, int]] = {}
        self._reads: dict[Hashable, list[tuple[Hashable, int]]] = {}
        self.of_thread = threading.local()
        self.first = Stream(self)

    def current(self) -> Stream:
        found: Stream = getattr(self.of_thread, "stream", self.first)
        return found

    def learn(self, who: Hashable, what: Clock) -> None:
        """What is over before the next operation."""
        clock = self.clocks[who]
        for other, count in what.items():
            clock[other] = max(clock.get(other, 0), count)

    def touch(self, who: Hashable, memory: Hashable, *, write: bool) -> None:
        """The next operation of a stream, or of the host, reads or writes some memory."""
        with self.lock:
            if who is not HOST:
                self.learn(who, self.clocks[HOST])  # it is queued now
            clock = self.clocks[who]
            before = [self._writes[memory]] if memory in self._writes else []
            before += self._reads.get(memory, []) if write else []
            for other, count in before:
                if clock.get(other, 0) < count and other != who:
                    kind = "written" if write else "read"
                    self.races.append(f"{memory} is {kind} by {who} while {other} may still use it")
            clock[who] = clock.get(who, 0) + 1
            if write:
                self._writes[memory], self._reads[memory] = (who, clock[who]), []
            else:
                self._reads.setdefault(memory, []).append((who, clock[who]))


class Stream:
    @property
    def cuda_stream(self) -> int:
        return id(self)

    def __init__(self, order: Order) -> None:
        self.order = order
        with order.lock:
            self.name = f"stream {len(order.clocks)}"
            order.clocks[self.name] = {}

    def wait_event(self, event: Event) -> None:
        with self.order.lock:
            assert event.clock is not None
            self.order.learn(self.name, event.clock)


class Event:
    def __init__(self, order: Order) -> None:
        self._order = order
        self.clock: Clock | None = None

    def record(self, stream: Stream | None = None) -> None:
        order = self._order
        with order.lock:
            name = (stream or order.current()).name
            order.learn(name, order.clocks[HOST])
            self.clock = dict(order.clocks[name])

    def query(self) -> bool:
        """As chance will have it, once or never; what is known to be over stays so."""
        order = self._order
        with order.lock:
            assert self.clock is not None
            known = all(order.clocks[HOST].get(who, 0) >= count for who, count in self.clock.items())
            if not known and order.random.random() < 0.3:
                self.synchronize()
                known = True
            return known

    def synchronize(self) -> None:
        with self._order.lock:
            assert self.clock is not None
            self._order.learn(HOST, self.clock)


@contextmanager
def ordered_cuda(seed: int) -> Iterator[tuple[CudaDevice, Order]]:
    """A CUDA device whose streams and events are those above, its tensors on the CPU and its experts in plain torch."""
    order = Order(seed)

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        outer, order.of_thread.stream = order.current(), stream
        try:
            yield
        finally:
            order.of_thread.stream = outer

    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)
    fakes: dict[str, Any] = {
        "Event": lambda enable_timing=False, blocking=False: Event(order),
        "Stream": lambda device=None: Stream(order),
        "cudart": lambda: runtime,
        "current_device": lambda: 0,
        "current_stream": order.current,
        "device": lambda _: on(order.current()),
        "stream": on,
        "synchronize": lambda _: None,
    }
    with mock.patch.multiple(torch.cuda, **fakes):
        device = CudaDevice()
        device.torch_device = torch.device("cpu")
        with mock.patch.object(device, "_kernel", return_value=None):
            yield device, order
