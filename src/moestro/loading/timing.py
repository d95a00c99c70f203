"""Where the seconds of a load go.

    >>> with timing() as times, spent("packing"):
    ...     time.sleep(0.01)
    >>> times.packing_s >= 0.01 > times.reading_s
    True

A load says by `spent` which part of it goes on; outside of a block of `timing` nothing is noted. Knows no model. Needs
the standard library and psutil.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Literal

import psutil


@dataclass(slots=True)
class LoadTimes:
    """Seconds of a load.

    reading_s: config, tokenizer, names and pages of the files, and making and planning the model without weights.
    packing_s: getting memory, and writing the weights into it in the form in which they are computed with.
    warm_up_s: recognizing layers that go through faster code, by trying them.
    """

    reading_s: float = 0.0
    packing_s: float = 0.0
    warm_up_s: float = 0.0

    def to_json(self) -> dict[str, float]:
        """All of them by name."""
        return asdict(self)

    def __str__(self) -> str:
        read, packed = f"{self.reading_s:.2f} s to read the weights", f"{self.packing_s:.2f} s to pack them"
        return f"{read}, {packed}, {self.warm_up_s:.2f} s to warm up"


_TIMES: ContextVar[LoadTimes | None] = ContextVar("times", default=None)


@contextmanager
def timing() -> Iterator[LoadTimes]:
    """Note the times of the loads inside the block, in this thread; what is not packing or warm-up is reading."""
    times = LoadTimes()
    token, start_s = _TIMES.set(times), time.perf_counter()
    try:
        yield times
    finally:
        _TIMES.reset(token)
        times.reading_s += time.perf_counter() - start_s - times.packing_s - times.warm_up_s


@contextmanager
def spent(on: Literal["packing", "warm_up"]) -> Iterator[None]:
    """Count the time inside the block as that; blocks do not lie in each other."""
    times, start_s = _TIMES.get(), time.perf_counter()
    try:
        yield
    finally:
        if times is not None:
            name = f"{on}_s"
            setattr(times, name, getattr(times, name) + time.perf_counter() - start_s)


def process_s() -> float:
    """Seconds since this process was started: at the end of the imports, what they took."""
    return time.time() - psutil.Process().create_time()
