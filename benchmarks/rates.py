"""Measure how fast a machine moves bytes: DRAM, link, GPU memory and registration, DRAM and link also together.

It knows nothing of models or plans: it only fills in a `Rates`. A rate that could not be measured is None there, and
`notes` says why. 1 GB/s is 1e9 bytes/s, 1 GiB is 2**30 bytes; every figure is a median of repeats.

DRAM is read by NumPy's int64 sum, with one thread pinned to each physical core (float32 sums are slower than DRAM on
some cores). The compiled loops of `moestro bench kernels` read faster.

    python -m benchmarks.rates --toy
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from moestro.bench.machine_card import GIB
from moestro.compute.cpu import core_cpus
from moestro.machine.probe import available_ram_bytes
from moestro.planning.costs import PIECE_BYTES

from .rates_cuda import Link, gpu_memory_gbps, registered

FULL_BYTES = 8 * GIB  # two registrations of 4 GiB, and far past any last-level cache
HONEST_BYTES = 4 * GIB  # below this a cache may answer for DRAM
TOY_BYTES = 64 << 20
READ_BYTES = 64 << 20  # one NumPy call: long enough that threads seldom meet at the interpreter's lock

PAGEABLE = ("link_h2d_pageable_gbps", "link_d2h_pageable_gbps")
TOGETHER = ("dram_read_together_gbps", "link_h2d_together_gbps")
REGISTERED = ("link_h2d_gbps", "link_d2h_gbps", *TOGETHER)
NEED_GPU = ("gpu_memory_gbps", "host_register_gibps", *PAGEABLE, *REGISTERED)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Rates of one machine. A rate of None has its reason in `notes`, as "field: reason"."""

    size_bytes: int  # of the host buffer that was read, copied and registered
    physical_cores: int
    dram_read_gbps: float | None = None  # the best over thread counts
    dram_read_threads: int | None = None  # the thread count that gave it
    dram_read_by_threads_gbps: tuple[float, ...] = ()  # [i] is with i + 1 threads
    link_h2d_gbps: float | None = None  # from registered memory
    link_d2h_gbps: float | None = None
    link_h2d_pageable_gbps: float | None = None
    link_d2h_pageable_gbps: float | None = None
    gpu_memory_gbps: float | None = None  # a copy within the GPU, bytes read plus bytes written
    host_register_gibps: float | None = None  # cudaHostRegister of touched pages
    dram_read_together_gbps: float | None = None  # both during the same windows
    link_h2d_together_gbps: float | None = None
    together_threads: int | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """One line of JSON, read back by `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Rates:
        """The rates that `to_json` wrote.

        Raises:
            ValueError: a field that this version does not know.
        """
        found: dict[str, Any] = json.loads(text)
        unknown = found.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"unknown rates: {', '.join(sorted(unknown))}")
        for name in ("dram_read_by_threads_gbps", "notes"):
            found[name] = tuple(found.get(name, ()))
        return cls(**found)


def measure_rates(
    *, size_bytes: int | None = None, window_s: float = 0.1, repeats: int = 5, cores: Sequence[int] | None = None
) -> Rates:
    """Measure every rate that this machine has; takes about 20 s with 16 cores and a GPU.

    Args:
        size_bytes: the size of the host buffer; None for 8 GiB, or half of the available RAM where that is less.
        window_s: the length of one reading.
        repeats: readings of a figure, which is their median.
        cores: logical CPUs to read from, one for each physical core; None for all that this process may use.
    """
    found = _Findings()
    cores = core_cpus() if cores is None else cores
    size_bytes = min(FULL_BYTES, available_ram_bytes() // 2) if size_bytes is None else size_bytes
    size_bytes = max(size_bytes // PIECE_BYTES, 4) * PIECE_BYTES
    if size_bytes < HONEST_BYTES:
        found.notes.append(f"dram_read: a buffer of {size_bytes / GIB:.2f} GiB, so caches may have helped")
    host = found.attempt(("dram_read_gbps",), lambda: host_buffer(size_bytes, found.notes))
    if host is None:
        found.give_up(NEED_GPU, "no host buffer")
        return Rates(size_bytes=size_bytes, physical_cores=len(cores), notes=tuple(found.notes))

    by_threads = found.attempt(("dram_read_gbps",), lambda: _dram_by_threads(host, cores, window_s, repeats))
    if by_threads:
        best = max(by_threads)
        found.rates |= {"dram_read_gbps": best, "dram_read_threads": by_threads.index(best) + 1}
        found.rates["dram_read_by_threads_gbps"] = tuple(by_threads)
    if torch.cuda.is_available():
        _measure_gpu(found, host, cores, window_s, repeats)
    else:
        found.give_up(NEED_GPU, "no CUDA device")
    return Rates(size_bytes=size_bytes, physical_cores=len(cores), notes=tuple(found.notes), **found.rates)


class _Findings:
    """Rates found so far, and the reasons for those that are missing."""

    def __init__(self) -> None:
        self.rates: dict[str, Any] = {}
        self.notes: list[str] = []

    def give_up(self, names: Sequence[str], reason: str) -> None:
        self.notes += [f"{name}: {reason}" for name in names]

    def attempt(self, names: Sequence[str], measure: Callable[[], T]) -> T | None:
        """The measurement, or None with its error noted under each name."""
        try:
            return measure()
        except Exception as error:  # of any kind: a failed reading must not cost the others, and its note says why
            self.give_up(names, " ".join(f"{type(error).__name__}: {error}".split())[:200])
            return None

    def rate(self, name: str, measure: Callable[[], float]) -> None:
        self.rates[name] = self.attempt((name,), measure)


def _measure_gpu(found: _Findings, host: torch.Tensor, cores: Sequence[int], window_s: float, repeats: int) -> None:
    found.rate("gpu_memory_gbps", lambda: gpu_memory_gbps(host.numel(), repeats=2 * repeats))
    link = found.attempt((*PAGEABLE, *REGISTERED), lambda: Link(host.view(-1, PIECE_BYTES)))
    if link is not None:
        found.rate("link_h2d_pageable_gbps", lambda: link.gbps(True, window_s, repeats))
        found.rate("link_d2h_pageable_gbps", lambda: link.gbps(False, window_s, repeats))
    found.rate("host_register_gibps", lambda: _register_gibps(host, repeats=min(repeats, 3)))
    if link is None:
        return
    if found.rates["host_register_gibps"] is None:
        found.give_up(REGISTERED, "the host buffer could not be registered")
        return

    def from_registered() -> bool:
        with registered(host):
            if not host.is_pinned():
                raise RuntimeError("torch does not see the registered buffer as pinned")
            found.rate("link_h2d_gbps", lambda: link.gbps(True, window_s, repeats))
            found.rate("link_d2h_gbps", lambda: link.gbps(False, window_s, repeats))
            threads = found.rates.get("dram_read_threads") or len(cores)
            together = found.attempt(TOGETHER, lambda: _together(host, cores, threads, window_s, repeats))
            found.rates |= together or dict.fromkeys(TOGETHER)
        return True

    if not found.attempt(("registered memory",), from_registered):
        missing = [name for name in REGISTERED if name not in found.rates]
        found.give_up(missing, "not reached, see registered memory")


def _dram_by_threads(host: torch.Tensor, cores: Sequence[int], window_s: float, repeats: int) -> list[float]:
    def gbps(threads: int) -> float:
        with Readers(host, cores[:threads]) as readers:
            return median(readers.during(lambda: time.sleep(window_s))[1] for _ in range(repeats))

    return [gbps(threads) for threads in range(1, len(cores) + 1)]


def _together(
    host: torch.Tensor, cores: Sequence[int], threads: int, window_s: float, repeats: int
) -> dict[str, float]:
    """Read three quarters of the buffer while the link copies from the rest.

    Where there are two cores or more, one is left to the thread that enqueues copies: without a core of its own it
    would leave the link idle.
    """
    threads = max(1, min(threads, len(cores) - 1))
    pieces = host.view(-1, PIECE_BYTES)
    share = len(pieces) // 4
    link = Link(pieces[:share])
    readings: list[tuple[float, float]] = []
    with Readers(pieces[share:].view(-1), cores[len(cores) - threads :]) as readers:
        for _ in range(repeats):
            link.spoil(to_gpu=True)
            readings.append(readers.during(lambda: link.copy_for(True, 5 * window_s)))
            link.verify(to_gpu=True)
    link_gbps, dram_gbps = (median(column) for column in zip(*readings, strict=True))
    return {"dram_read_together_gbps": dram_gbps, "link_h2d_together_gbps": link_gbps, "together_threads": threads}


def _register_gibps(host: torch.Tensor, repeats: int) -> float:
    def once() -> float:
        with registered(host) as seconds:
            return host.numel() / GIB / seconds

    return median(once() for _ in range(repeats))


class Readers:
    """Threads, each pinned to a core, that sum their slice of a buffer again and again until `with` ends."""

    def __init__(self, buffer: torch.Tensor, cores: Sequence[int]) -> None:
        words: NDArray[np.int64] = buffer.view(torch.int64).numpy()
        self._progress: list[tuple[int, float]] = [(0, 0.0)] * len(cores)  # bytes read, and when
        self._stop = threading.Event()
        self._error: Exception | None = None
        slices = np.array_split(words, len(cores))
        self._threads = [
            threading.Thread(target=self._read, args=(index, core, part), daemon=True)
            for index, (core, part) in enumerate(zip(cores, slices, strict=True))
        ]

    def __enter__(self) -> Readers:
        for thread in self._threads:
            thread.start()
        self._after([0] * len(self._threads))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def during(self, work: Callable[[], T]) -> tuple[T, float]:
        """Run `work`; return its result and the GB/s that the threads read meanwhile.

        Each thread's rate is taken between the ends of two of its own reads, so that only whole reads count.
        """
        before = list(self._progress)
        result = work()
        after = self._after([done for done, _ in before])
        spans = zip(before, after, strict=True)
        return result, sum((b1 - b0) / (t1 - t0) for (b0, t0), (b1, t1) in spans) / 1e9

    def _after(self, done_bytes: Sequence[int]) -> list[tuple[int, float]]:
        """Wait until every thread has read more than the given bytes; return (bytes, time in s) of each."""
        while True:
            progress = list(self._progress)
            if self._error is not None:
                raise self._error
            if all(now > then for (now, _), then in zip(progress, done_bytes, strict=True)):
                return progress
            time.sleep(0.0005)

    def _read(self, index: int, core: int, words: NDArray[np.int64]) -> None:
        try:
            os.sched_setaffinity(0, {core})  # 0: this thread alone
            self._sum(index, words)
        except Exception as error:  # the thread that waits for progress raises it
            self._error = error

    def _sum(self, index: int, words: NDArray[np.int64]) -> None:
        step = max(1, min(READ_BYTES, words.nbytes // 4) // words.itemsize)
        done_bytes = 0
        while True:
            for start in range(0, len(words), step):
                part = words[start : start + step]
                part.sum()
                done_bytes += part.nbytes
                self._progress[index] = (done_bytes, time.perf_counter())
                if self._stop.is_set():
                    return


def host_buffer(size_bytes: int, notes: list[str]) -> torch.Tensor:
    """A private, anonymous mapping with huge pages, all of it written once, as a uint8 tensor that keeps it alive.

    Every piece of 16 MiB holds the same random bytes.
    """
    # Python maps anonymous memory as shared by default, which mostly gets no huge pages.
    mapping = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        notes.append(f"host buffer: no huge pages ({error})")
    buffer = torch.frombuffer(mapping, dtype=torch.uint8)
    buffer.view(-1, PIECE_BYTES).copy_(torch.randint(0, 256, (PIECE_BYTES,), dtype=torch.uint8))
    return buffer


def main(argv: Sequence[str] | None = None) -> int:
    """Print the rates as one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rates", description=main.__doc__)
    parser.add_argument("--toy", action="store_true", help="64 MiB and short readings, to try the code")
    parser.add_argument("--size-bytes", type=int, help="host buffer (default: 8 GiB, half of the RAM at most)")
    options = parser.parse_args(argv)
    if options.toy:
        print(measure_rates(size_bytes=TOY_BYTES, window_s=0.02, repeats=3).to_json())
    else:
        print(measure_rates(size_bytes=options.size_bytes).to_json())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
