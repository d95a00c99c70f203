"""Rates: real ones at toy size; the CUDA half against a fake runtime, and against a GPU where there is one.

The fake checks what a GPU cannot be made to do on request: a registration that fails halfway, bytes that
do not arrive. Its speeds mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import pytest
import torch

from benchmarks import rates, rates_cuda
from benchmarks.rates import NEED_GPU, Rates, Readers, host_buffer, measure_rates
from benchmarks.rates_cuda import Link, registered
from moestro.compute.cpu import core_cpus
from moestro.planning.costs import PIECE_BYTES

TOY = {"size_bytes": 4 * PIECE_BYTES, "window_s": 0.005, "repeats": 3}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class FakeCudart:
    """Host registration that remembers what is registered, and refuses the call number `refuse`."""

    def __init__(self, refuse: int | None = None) -> None:
        self.refuse, self.calls, self.sizes = refuse, 0, dict[int, int]()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.calls += 1
        if self.calls == self.refuse:
            return 2
        assert flags == 0
        assert address % 4096 == 0
        assert size <= rates_cuda.REGISTER_BYTES
        self.sizes[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        return 0 if self.sizes.pop(address, None) else 713

    def cudaGetErrorString(self, code: int) -> str:
        return {2: "out of memory"}.get(code, "not registered")


class FakeEvent:
    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        assert enable_timing or blocking

    def record(self, stream: object = None) -> None:
        self.time_s = time.perf_counter()

    def synchronize(self) -> None:
        assert self.time_s

    def elapsed_time(self, end: FakeEvent) -> float:
        return (end.time_s - self.time_s) * 1e3


class FakeStream:
    def synchronize(self) -> None: ...


class FakeCuda:
    """As much of `torch.cuda` as the rates use, over the CPU."""

    Event, Stream = FakeEvent, FakeStream

    def __init__(self) -> None:
        self.runtime = FakeCudart()

    def cudart(self) -> FakeCudart:
        return self.runtime

    def stream(self, stream: FakeStream) -> nullcontext[None]:
        return nullcontext()

    def synchronize(self) -> None: ...

    def mem_get_info(self) -> tuple[int, int]:
        return 8 * PIECE_BYTES, 16 * PIECE_BYTES


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(rates_cuda, "CUDA", fake)
    monkeypatch.setattr(rates_cuda, "GPU", "cpu")
    monkeypatch.setattr(rates_cuda, "SLOTS", 2)
    monkeypatch.setattr(rates_cuda, "REGISTER_BYTES", PIECE_BYTES)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: bool(fake.runtime.sizes), raising=False)
    return fake


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def reasons(found: Rates) -> dict[str, str]:
    return dict(note.split(": ", 1) for note in found.notes)


def assert_each_rate_or_reason(found: Rates) -> None:
    for field in fields(Rates):
        if field.name.endswith("ps"):
            rate = getattr(found, field.name)
            assert (rate is None) == (field.name in reasons(found)), field.name
            assert rate is None or field.name == "dram_read_by_threads_gbps" or 0 < rate < 1e5


@pytest.mark.usefixtures("no_cuda")
def test_without_a_gpu_dram_is_measured_and_the_rest_has_its_reason() -> None:
    found = measure_rates(**TOY)
    assert_each_rate_or_reason(found)
    assert found.dram_read_gbps is not None
    assert 0.1 < found.dram_read_gbps < 5000
    assert found.dram_read_gbps == max(found.dram_read_by_threads_gbps)
    assert len(found.dram_read_by_threads_gbps) == found.physical_cores == len(core_cpus())
    assert {reasons(found)[name] for name in NEED_GPU} == {"no CUDA device"}
    assert "caches" in reasons(found)["dram_read"]


@pytest.mark.usefixtures("no_cuda")
def test_json_gives_the_same_rates_back() -> None:
    found = measure_rates(**TOY, cores=core_cpus()[:1])
    assert Rates.from_json(found.to_json()) == found
    assert "\n" not in found.to_json()
    with pytest.raises(ValueError, match="unknown rates: warp_gbps"):
        Rates.from_json('{"size_bytes": 1, "physical_cores": 1, "warp_gbps": 9.9}')


@pytest.mark.usefixtures("no_cuda")
def test_a_core_that_is_not_there_is_a_reason_and_no_hang() -> None:
    found = measure_rates(**TOY, cores=[100_000])
    assert found.dram_read_gbps is None
    assert "Error" in reasons(found)["dram_read_gbps"]


def test_readers_count_every_byte() -> None:
    buffer = host_buffer(4 * PIECE_BYTES, [])
    start_s = time.perf_counter()
    with Readers(buffer, core_cpus()[:1]) as readers:
        _, gbps = readers.during(lambda: time.sleep(0.2))
        done_bytes = readers._progress[0][0]
    upper = done_bytes / 0.2 / 1e9
    assert done_bytes / (time.perf_counter() - start_s) / 1e9 / 2 < gbps < 2 * upper


def test_every_piece_of_the_host_buffer_holds_the_same_bytes() -> None:
    pieces = host_buffer(3 * PIECE_BYTES, []).view(-1, PIECE_BYTES)
    assert torch.equal(pieces[0], pieces[2])
    assert len(pieces[0].unique()) == 256


def test_with_a_fake_gpu_every_rate_is_found_and_nothing_stays_registered(cuda: FakeCuda) -> None:
    found = measure_rates(**TOY)
    assert_each_rate_or_reason(found)
    assert [name for name in NEED_GPU if getattr(found, name) is None] == []
    assert found.together_threads == max(1, min(found.dram_read_threads or 1, found.physical_cores - 1))
    assert cuda.runtime.calls == 4 * (3 + 1)  # 4 pieces; 3 timed registrations, 1 for the copies
    assert cuda.runtime.sizes == {}


@pytest.mark.parametrize("refuse", [2, 4 * 3 + 2])
def test_a_registration_that_fails_halfway_is_undone_and_said(cuda: FakeCuda, refuse: int) -> None:
    cuda.runtime = FakeCudart(refuse)
    found = measure_rates(**TOY)
    assert_each_rate_or_reason(found)
    assert cuda.runtime.sizes == {}
    assert found.link_h2d_gbps is found.dram_read_together_gbps is None
    assert found.link_h2d_pageable_gbps
    said = "cudaHostRegister at 16 MiB of 64 failed: out of memory (error 2)"
    assert any(said in note for note in found.notes)


def test_a_failed_unregistration_raises(cuda: FakeCuda) -> None:
    buffer = host_buffer(PIECE_BYTES, [])
    with pytest.raises(RuntimeError, match="cudaHostUnregister failed: not registered"), registered(buffer):
        cuda.runtime.sizes.clear()


@pytest.mark.parametrize("to_gpu", [True, False])
@pytest.mark.usefixtures("cuda")
def test_bytes_that_do_not_arrive_are_noticed(to_gpu: bool) -> None:
    link = Link(host_buffer(2 * PIECE_BYTES, []).view(-1, PIECE_BYTES))
    assert link.gbps(to_gpu, 0.001, 1) > 0
    link.spoil(to_gpu)
    with pytest.raises(RuntimeError, match="did not bring its bytes"):
        link.verify(to_gpu)


def test_one_broken_reading_costs_no_other(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> float:
        raise AttributeError("no such thing in this version")

    monkeypatch.setattr(rates, "gpu_memory_gbps", broken)
    found = measure_rates(**TOY)
    assert reasons(found)["gpu_memory_gbps"] == "AttributeError: no such thing in this version"
    assert found.link_h2d_gbps
    assert_each_rate_or_reason(found)


@pytest.mark.gpu
@needs_gpu
def test_every_rate_of_a_real_gpu() -> None:
    found = measure_rates(size_bytes=1 << 30, window_s=0.02, repeats=3)
    assert_each_rate_or_reason(found)
    assert [name for name in NEED_GPU if getattr(found, name) is None] == [], found.notes
    in_order: Callable[[Any, Any], bool] = lambda low, high: low < 1.2 * high  # noqa: E731
    assert in_order(found.link_h2d_together_gbps, found.link_h2d_gbps)
    assert in_order(found.link_h2d_gbps, found.gpu_memory_gbps)
    assert in_order(1.0, found.link_h2d_gbps)


@pytest.mark.gpu
@needs_gpu
def test_a_real_registration_pins_and_lets_go() -> None:
    buffer = host_buffer(4 * PIECE_BYTES, [])
    assert not buffer.is_pinned()
    with registered(buffer) as seconds:
        assert seconds > 0
        assert buffer.is_pinned()
        with pytest.raises(RuntimeError, match=r"cudaHostRegister .* failed"), registered(buffer):
            pass
        assert buffer.is_pinned()
    assert not buffer.is_pinned()
    assert torch.ones(8, device="cuda").sum().item() == 8  # the refused call left no error behind
