"""Host memory that CUDA's driver registers, against a stand-in for its runtime."""

from __future__ import annotations

import pytest
import torch

from moestro.devices.cuda_memory import PinnedMemory


class Runtime:
    """CUDA's registration of host memory, as far as it is used."""

    def __init__(self, allowed: int) -> None:
        self.allowed, self.registered = allowed, dict[int, int]()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if len(self.registered) == self.allowed:
            return 2
        self.registered[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


def test_memory_is_registered_in_runs_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moestro.devices.cuda_memory._RUN_BYTES", 1000)
    memory, other = torch.zeros(2500, dtype=torch.uint8), torch.zeros(100, dtype=torch.uint8)
    runtime = Runtime(allowed=10)
    pinned = PinnedMemory(runtime)
    assert pinned.add(memory) is None
    assert sorted(runtime.registered.values()) == [500, 1000, 1000]
    assert pinned.holds(memory[1000:2000])
    assert not pinned.holds(memory[900:1100])  # it crosses from one run to the next
    assert pinned.add(memory) is None
    assert len(runtime.registered) == 3
    assert not pinned.holds(other)
    assert pinned.n_bytes == 2500
    pinned.close()
    assert not runtime.registered


def test_memory_that_cannot_be_registered_is_said_and_not_taken_for_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moestro.devices.cuda_memory._RUN_BYTES", 1000)
    memory = torch.zeros(2500, dtype=torch.uint8)
    runtime = Runtime(allowed=1)
    pinned = PinnedMemory(runtime)
    assert pinned.add(memory) == "0.0 of 0.0 GiB of RAM could be pinned (CUDA error 2)"
    assert pinned.holds(memory[:1000])
    assert not pinned.holds(memory[500:1500])
    pinned.close()
    assert not runtime.registered
