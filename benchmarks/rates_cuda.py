"""Rates that need a CUDA GPU: the link from pageable or registered memory, registration, GPU memory.

Every piece of the host buffer holds the same bytes, so a copy is checked by overwriting the first piece at its
destination and comparing it afterwards. Torch raises on a failed CUDA call; the return codes of `cudart` are checked
here. `benchmarks.rates` puts the readings together.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from statistics import median
from typing import Any

import torch

from moestro.planning.costs import PIECE_BYTES

CUDA: Any = torch.cuda  # parts of it are untyped, which mypy --strict refuses to call
GPU = "cuda"
SLOTS = 16  # destinations on the GPU, used in turn
IN_FLIGHT = 4  # pieces enqueued at once: 1.3 ms of work at 50 GB/s, longer than the host takes to wake up
REGISTER_BYTES = 4 << 30  # at most this much in one cudaHostRegister
MEMORY_BYTES = 4 << 30  # of a copy within the GPU: far past its L2 cache
WARM_UP = 2


class Link:
    """Copies pieces between host memory and the GPU on a stream of its own.

    Args:
        pieces: uint8 [pieces, PIECE_BYTES] in host memory.
    """

    def __init__(self, pieces: torch.Tensor) -> None:
        self._host = pieces  # [pieces, PIECE_BYTES]
        self._slots = pieces[:1].to(GPU).repeat(SLOTS, 1)  # [SLOTS, PIECE_BYTES]
        self._stream = CUDA.Stream()
        CUDA.synchronize()

    def gbps(self, to_gpu: bool, window_s: float, repeats: int) -> float:
        """Copy one way for some windows and return the median GB/s, after comparing the bytes at the destination.

        Raises:
            RuntimeError: the bytes did not arrive.
        """
        self.spoil(to_gpu)
        readings = [self.copy_for(to_gpu, window_s) for _ in range(repeats)]
        self.verify(to_gpu)
        return median(readings)

    def spoil(self, to_gpu: bool) -> None:
        """Overwrite the first destination with zeros."""
        target, _ = self._ends(0, to_gpu)
        target.zero_()
        CUDA.synchronize()

    def verify(self, to_gpu: bool) -> None:
        """Raise a RuntimeError if the first destination does not hold its source's bytes."""
        target, source = self._ends(0, to_gpu)
        if not torch.equal(target.to(GPU), source.to(GPU)):
            raise RuntimeError(f"a copy {'to' if to_gpu else 'from'} the GPU did not bring its bytes")

    def copy_for(self, to_gpu: bool, window_s: float) -> float:
        """Copy piece after piece for about `window_s` seconds; return GB/s, measured to the end of the last copy."""
        waiting: deque[Any] = deque()
        copied = 0
        start_s = time.perf_counter()
        try:
            while not copied or time.perf_counter() - start_s < window_s:
                target, source = self._ends(copied, to_gpu)
                done = CUDA.Event(blocking=True)  # sleeps, and leaves the core to the readers
                with CUDA.stream(self._stream):
                    target.copy_(source, non_blocking=True)
                    done.record(self._stream)
                waiting.append(done)
                if len(waiting) == IN_FLIGHT:
                    waiting.popleft().synchronize()
                copied += 1
        finally:
            self._stream.synchronize()  # no copy may outlive the registration of its memory
        return copied * PIECE_BYTES / (time.perf_counter() - start_s) / 1e9

    def _ends(self, index: int, to_gpu: bool) -> tuple[torch.Tensor, torch.Tensor]:
        host, slot = self._host[index % len(self._host)], self._slots[index % SLOTS]
        return (slot, host) if to_gpu else (host, slot)


@contextmanager
def registered(buffer: torch.Tensor) -> Iterator[float]:
    """Register a page-aligned host buffer with CUDA inside the block; yields the seconds that this took.

    Raises:
        RuntimeError: CUDA refused to register or to unregister it.
    """
    cudart = CUDA.cudart()
    done: list[int] = []
    try:
        start_s = time.perf_counter()
        for offset in range(0, buffer.numel(), REGISTER_BYTES):
            address = buffer.data_ptr() + offset
            code = cudart.cudaHostRegister(address, min(REGISTER_BYTES, buffer.numel() - offset), 0)
            _check(cudart, code, f"cudaHostRegister at {offset >> 20} MiB of {buffer.numel() >> 20}")
            done.append(address)
        yield time.perf_counter() - start_s
    finally:
        codes = [cudart.cudaHostUnregister(address) for address in done]  # all, before one may raise
        for code in codes:
            _check(cudart, code, "cudaHostUnregister")


def _check(cudart: Any, code: Any, what: str) -> None:
    if int(code) == 0:
        return
    # CUDA reports the error once more at the next kernel launch, so launch one here.
    with suppress(RuntimeError):
        torch.ones(1, device=GPU)
    raise RuntimeError(f"{what} failed: {cudart.cudaGetErrorString(code)} (error {int(code)})")


def gpu_memory_gbps(most_bytes: int, repeats: int) -> float:
    """GB/s of a copy within the GPU, bytes read plus bytes written, timed by events.

    Raises:
        RuntimeError: the bytes did not arrive.
    """
    free_bytes, _ = CUDA.mem_get_info()
    words = max(PIECE_BYTES, min(most_bytes, MEMORY_BYTES, free_bytes // 4)) // 8
    source = torch.randint(1 << 62, (words,), dtype=torch.int64, device=GPU)
    target = torch.zeros_like(source)
    times_s: list[float] = []
    for _ in range(WARM_UP + repeats):
        start, end = (CUDA.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times_s.append(start.elapsed_time(end) / 1e3)
    if not torch.equal(target, source):
        raise RuntimeError("a copy within the GPU did not bring its bytes")
    return 2 * source.nbytes / median(times_s[WARM_UP:]) / 1e9
