"""Host memory that the link reads fast: the store registered in place, and small pinned buffers for each step.

torch's own pinned allocator rounds each block up to a power of two, so the store is never allocated by it: its mapping
is registered with the driver in runs of at most 4 GiB.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import torch
from torch import Tensor

_RUN_BYTES = 4 * 2**30


class PinnedMemory:
    """What was registered, until it is closed. `runtime` is `torch.cuda.cudart()` unless a test gives another."""

    def __init__(self, runtime: Any = None) -> None:
        self._runtime = runtime
        self._starts: list[int] = []  # addresses, ascending
        self._stops: list[int] = []

    @property
    def n_bytes(self) -> int:
        """How much is registered."""
        return sum(stop - start for start, stop in zip(self._starts, self._stops, strict=True))

    def add(self, memory: Tensor) -> str | None:
        """Register as much of some memory as the system allows; says why not all of it was."""
        runtime = self._runtime or torch.cuda.cudart()
        start, size = memory.data_ptr(), memory.numel()
        for offset in range(0, size, _RUN_BYTES):
            n_bytes = min(_RUN_BYTES, size - offset)
            if self.holds(memory[offset : offset + n_bytes]):
                continue
            code = int(runtime.cudaHostRegister(start + offset, n_bytes, 0))
            if code:
                return f"{offset / 2**30:.1f} of {size / 2**30:.1f} GiB of RAM could be pinned (CUDA error {code})"
            at = bisect_right(self._starts, start + offset)
            self._starts.insert(at, start + offset)
            self._stops.insert(at, start + offset + n_bytes)
        return None

    def holds(self, memory: Tensor) -> bool:
        """Whether all of it is registered, in one run: the driver refuses a copy that crosses from one to the next."""
        start = memory.data_ptr()
        at = bisect_right(self._starts, start) - 1
        return at >= 0 and start + memory.numel() <= self._stops[at]

    def close(self) -> None:
        """Give all of it back."""
        runtime = self._runtime or torch.cuda.cudart()
        for start in self._starts:
            runtime.cudaHostUnregister(start)
        self._starts, self._stops = [], []


def pinned_bytes(n_bytes: int) -> Tensor:
    """A buffer that torch pins: uint8 [n_bytes]."""
    return torch.empty(n_bytes, dtype=torch.uint8, device="cpu", pin_memory=torch.cuda.is_available())


class HostBuffers:
    """Pinned buffers by name, that grow and are used again in the next layer step."""

    def __init__(self) -> None:
        self._by_name: dict[str, Tensor] = {}
        self._latest: dict[str, Tensor] = {}  # of the shape of the latest step, which the next one mostly has too

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A buffer of that shape; what it held is lost."""
        latest = self._latest.get(name)
        if latest is not None and latest.shape == shape and latest.dtype == dtype:
            return latest
        n_bytes = torch.Size(shape).numel() * dtype.itemsize
        found = self._by_name.get(name)
        if found is None or found.numel() < n_bytes:
            found = self._by_name[name] = pinned_bytes(n_bytes)
        self._latest[name] = found[:n_bytes].view(dtype).view(shape)
        return self._latest[name]

    def read(self, name: str, tensor: Tensor) -> Tensor:
        """Begin to copy a tensor of the device into its buffer."""
        return self.take(name, tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)

    def clear(self) -> None:
        """Forget them."""
        self._by_name.clear()
        self._latest.clear()
