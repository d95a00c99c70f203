"""Two streams share a device: nothing is written while the other one may still read it, whoever comes when."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moestro.compute import gpu
from moestro.devices import LayerPort
from moestro.devices.cuda import CudaDevice
from moestro.engine.conductor import Conductor
from moestro.errors import CopyError
from moestro.planning.contract import Costs, Decision, Move, Phase, StepInfo, View
from ordered_cuda import HOST, Order, Stream, ordered_cuda
from small_conductor import EXPERTS, FULL, LAYERS, SHAPE, TOP_K, Drawn, Fixed, reference_of, small_conductor


class _Eager(Drawn):
    """Also brings experts before the first layer, into whatever slot may be taken."""

    def begin(self, info: StepInfo, view: View, costs: Costs) -> tuple[Move, ...]:
        everybody = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
        there = [expert for expert in everybody if expert in view.evictable(Move((0, 0)).to, 0)]
        moves = [
            Move(expert, urgent=False) for expert in everybody if view.ready_s(expert, Move(expert).to) == float("inf")
        ]
        self._random.shuffle(moves)
        empty = view.free_slots(Move((0, 0)).to, 0)
        victims = self._random.sample(there, len(there))
        return (
            *moves[:empty],
            *(move._replace(evict=evict) for move, evict in zip(moves[empty:], victims, strict=False)),
        )


@contextmanager
def _watched(device: CudaDevice, order: Order, pool: Tensor) -> Iterator[None]:
    """Tell the order of each access to slots, to buffers of the host and to ports."""

    def here() -> str:
        return order.current().name

    launch, send, read = device._launch, device.link.carrier.send, device._buffers.read
    combine, output = device.combine, device.host_output

    def watched_launch(math: Any, total: Any, work: Sequence[Any], label: Any) -> Any:
        for item in work:
            order.touch(here(), ("slot", gpu.slot_of(pool, item.packed)), write=False)
        return launch(math, total, work, label)

    def watched_send(source: Tensor, target: Tensor, behind: Sequence[Any]) -> Any:
        with torch.cuda.stream(device.link.carrier._stream):
            for work in behind:
                work.fence()
            slot = (target.data_ptr() - pool.data_ptr()) // pool.stride(0)
            order.touch(here(), ("slot", slot), write=True)
        return send(source, target, behind)

    def watched_read(name: str, tensor: Tensor) -> Tensor:
        order.touch(here(), ("buffer", name), write=True)
        return read(name, tensor)

    def watched_output(x: Tensor) -> Tensor:
        order.touch(HOST, ("buffer", "output"), write=True)
        return output(x)

    def watched_combine(on_cpu: Tensor | None, total: Any) -> Tensor:
        for name in ("x", "weights", "index"):  # which the CPU's experts have read meanwhile
            order.touch(HOST, ("buffer", name), write=False)
        if on_cpu is not None:
            order.touch(here(), ("buffer", "output"), write=False)
        return combine(on_cpu, total).clone()  # on the CPU it may be the buffer of the host itself

    names = {"_launch": watched_launch, "combine": watched_combine, "host_output": watched_output}
    with (
        mock.patch.multiple(device, **names),
        mock.patch.object(device.link.carrier, "send", watched_send),
        mock.patch.object(device._buffers, "read", watched_read),
    ):
        yield


class _SharedPort:
    """Layer steps through one port, as replays of a capture do them that two threads share."""

    def __init__(self, conductor: Conductor, order: Order) -> None:
        self._conductor, self._order = conductor, order
        self._port: LayerPort | None = None

    def run_layer(self, layer: int, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        order, here = self._order, self._order.current().name
        if self._port is None:
            self._port = self._conductor.device.port(x, index, None, self._conductor.slots.memory, EXPERTS)
            self._port.host_output = self._host_output(self._port.host_output)  # type: ignore[method-assign]
        order.touch(here, "port on the device", write=True)
        order.touch(here, "port on the host", write=True)
        self._port.leave(x, index, weights, None)
        self._conductor.run_port(layer, self._port)
        order.touch(HOST, "port on the host", write=False)
        order.touch(here, "port's output", write=False)
        order.touch(here, "port on the device", write=False)
        return self._port.enter()

    def _host_output(self, plain: Any) -> Any:
        def watched() -> Tensor:
            self._order.touch(HOST, "port's output", write=True)
            found: Tensor = plain()
            return found

        return watched


@contextmanager
def _shared(seed: int, slots: int, policy: Any = None) -> Iterator[tuple[Conductor, Any, Order]]:
    torch.manual_seed(seed)
    with ordered_cuda(seed) as (device, order):
        conductor, parts = small_conductor(policy or _Eager(seed), slots, device)
        with _watched(device, order, conductor.slots.memory):
            yield conductor, parts, order
            conductor.close()


def _layer(run_layer: Any, parts: Any, layer: int, tokens: int, draw: torch.Generator) -> None:
    x, weights = torch.randn(tokens, SHAPE.hidden, generator=draw), torch.rand(tokens, TOP_K, generator=draw)
    index = torch.randint(-1, EXPERTS + 1, (tokens, TOP_K), generator=draw)
    out = run_layer(layer, x, index, weights)
    torch.testing.assert_close(out, reference_of(parts[layer], x, index, weights), rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), slots=st.sampled_from([2, 3, 7]), by_port=st.booleans())
def test_a_thread_changes_streams(seed: int, slots: int, by_port: bool) -> None:
    """Steps of two sequences, each on a stream of its own, layer by layer in any turn; whole steps by a shared port."""
    with _shared(seed, slots) as (conductor, parts, order):
        turns, draw = random.Random(seed), torch.Generator().manual_seed(seed)
        streams, at = [Stream(order), Stream(order)], [0, 0]
        port = _SharedPort(conductor, order)
        for _ in range(4 if by_port else 12):
            turn = turns.randrange(2)
            with torch.cuda.stream(streams[turn]):
                if at[turn] == 0:
                    conductor.begin(StepInfo.alike(Phase.DECODE, 3))
                if by_port:
                    conductor.begin_unless_announced(3)  # as a replay does before it touches what it shares
                    for layer in range(LAYERS):
                        _layer(port.run_layer, parts, layer, 3, draw)
                else:
                    _layer(conductor.run_layer, parts, at[turn], 3, draw)
                    at[turn] = (at[turn] + 1) % LAYERS
        assert not order.races


@pytest.mark.parametrize("seed", range(6))
def test_two_threads(seed: int) -> None:
    with _shared(seed, 3) as (conductor, parts, order):
        errors: list[BaseException] = []

        def generate(number: int) -> None:
            draw = torch.Generator().manual_seed(number)
            try:
                with torch.cuda.stream(Stream(order)):
                    for step in range(4):
                        if step % 2:
                            conductor.begin(StepInfo.alike(Phase.DECODE, 2))
                        for layer in range(LAYERS):
                            _layer(conductor.run_layer, parts, layer, 2, draw)
                        conductor.end()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=generate, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert not order.races


@pytest.mark.parametrize("guard", ["users", "follow"])
def test_the_guards_are_needed(guard: str) -> None:
    """Without one of them these tests find what it guards against."""

    def nothing(*_: Any) -> Any:
        return []

    where = "moestro.memory.slots.SlotPool.users" if guard == "users" else "moestro.devices.cuda.CudaDevice.follow"
    found: set[str] = set()
    for seed in range(12):
        with mock.patch(where, nothing), _shared(seed, 3) as (conductor, parts, order):
            draw = torch.Generator().manual_seed(seed)
            for _ in range(4):
                with torch.cuda.stream(Stream(order)):
                    conductor.begin(StepInfo.alike(Phase.DECODE, 3))
                    for layer in range(LAYERS):
                        with mock.patch("torch.testing.assert_close"):
                            _layer(conductor.run_layer, parts, layer, 3, draw)
            found |= {race.split(" is ")[0] for race in order.races}
    assert any(("slot" if guard == "users" else "buffer") in race for race in found)


def test_a_copy_into_a_slot_waits_for_one_before_that_was_followed_by_a_dropped_one() -> None:
    """Of the three, the first has begun and comes in pieces, and the second never came."""
    moves = (Move((0, 2), urgent=False),)
    policy = Fixed(Decision(cpu={1: FULL}, moves=moves))
    with _shared(1, 1, policy) as (conductor, parts, _), mock.patch("moestro.devices.link.PIECE_BYTES", 4096):
        link, go, begun = conductor.device.link, threading.Event(), threading.Event()
        link.gbps = 1e3  # so that the lane's own thread sends
        send, sent = link.carrier.send, []

        def slowly(source: Tensor, target: Tensor, behind: Sequence[Any]) -> Any:
            sent.append(source.data_ptr())
            begun.set()
            go.wait(5)
            return send(source, target, behind)

        link.carrier.send = slowly
        x, weights = torch.randn(1, SHAPE.hidden), torch.ones(1, 1)
        only = torch.tensor([[1]])
        conductor.run_layer(0, x, only, weights)
        begun.wait()
        policy.decision = Decision(cpu={1: FULL}, moves=(Move((1, 3), evict=(0, 2), urgent=False),))
        conductor.run_layer(0, x, only, weights)
        policy.decision = Decision(cpu={1: FULL}, drop=((1, 3),))
        conductor.run_layer(0, x, only, weights)
        policy.decision = Decision(cpu={1: FULL}, moves=(Move((0, 4)),))
        conductor.run_layer(0, x, only, weights)
        policy.decision = Decision(gpu={4: FULL})
        threading.Timer(0.05, go.set).start()
        index = torch.tensor([[4]])
        out = conductor.run_layer(0, x, index, weights)
        torch.testing.assert_close(out, reference_of(parts[0], x, index, weights), rtol=1e-4, atol=1e-5)
        first, last = conductor.store[0, 2].data_ptr(), conductor.store[0, 4].data_ptr()
        size = conductor.store[0, 2].numel()
        order = [
            address >= last and address < last + size
            for address in sent
            if first <= address < first + size or address >= last
        ]
        assert order == sorted(order)  # all of the first before all of the last


def test_where_work_has_no_memory_a_later_copy_waits_for_the_one_that_it_waited_for() -> None:
    part = Move((0, 2), neurons=range(64), keep=False)
    policy = Fixed(Decision(gpu={2: range(64)}, cpu={2: range(64, SHAPE.neurons)}, moves=(part,)))
    with _shared(2, 1, policy) as (conductor, parts, order):
        full = mock.patch.object(conductor.device, "_prepare", side_effect=torch.OutOfMemoryError("no room"))
        x, weights, index = torch.randn(1, SHAPE.hidden), torch.ones(1, 1), torch.tensor([[2]])
        with full:
            out = conductor.run_layer(0, x, index, weights)
        torch.testing.assert_close(out, reference_of(parts[0], x, index, weights), rtol=1e-4, atol=1e-5)
        policy.decision = Decision(gpu={3: FULL}, moves=(Move((0, 3)),))
        index = torch.tensor([[3]])
        out = conductor.run_layer(0, x, index, weights)
        torch.testing.assert_close(out, reference_of(parts[0], x, index, weights), rtol=1e-4, atol=1e-5)
        assert not order.races


def test_work_that_failed_holds_up_no_copy() -> None:
    with _shared(3, 1, Fixed(Decision(gpu={2: FULL}, moves=(Move((0, 2)),)))) as (conductor, parts, order):
        x, weights, index = torch.randn(1, SHAPE.hidden), torch.ones(1, 1), torch.tensor([[2]])
        with mock.patch.object(conductor.device, "_prepare", side_effect=CopyError("lost")):
            conductor.run_layer(0, x, index, weights)
        conductor.policy.decision = Decision(gpu={3: FULL}, moves=(Move((0, 3), evict=(0, 2)),))  # type: ignore[attr-defined]
        index = torch.tensor([[3]])
        out = conductor.run_layer(0, x, index, weights)
        torch.testing.assert_close(out, reference_of(parts[0], x, index, weights), rtol=1e-4, atol=1e-5)
        assert not order.races
