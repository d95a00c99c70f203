"""The conductor on an emulated device: any lawful decision gives the reference's result."""

from __future__ import annotations

import contextlib
import gc
import random
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moestro.devices import make_device
from moestro.devices.emulated import EmulatedDevice, MemoryCarrier
from moestro.devices.host import HostDevice
from moestro.devices.link import LaneCopy, LinkLane
from moestro.engine.routing import Routed, group_by_expert
from moestro.errors import ContractError, CopyError
from moestro.memory.formats import ExpertFormat
from moestro.memory.slots import SlotPool
from moestro.memory.store import ExpertStore
from moestro.planning.contract import GPU0, Costs, Decision, Lane, Move, Phase, StepInfo, View
from moestro.planning.timeline import Timeline
from pretended_cuda import pretended_cuda
from small_conductor import (
    EXPERTS,
    FORMAT,
    FULL,
    LAYERS,
    SHAPE,
    TOP_K,
    ByPort,
    Drawn,
    Fixed,
    reference_of,
    small_conductor,
)


class _AnyOrder(EmulatedDevice):
    """Copies come in an order that a test draws, whatever is urgent."""

    def __init__(self, seed: int) -> None:
        super().__init__(link_gbps=None)
        self.link.close()
        self.link = _ShuffledLink(seed)


class _ShuffledLink(LinkLane):
    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        super().__init__(MemoryCarrier())

    def next(self) -> LaneCopy | None:
        ready = [copy for copy in self._queue if copy.may_go()]
        return self._random.choice(ready) if ready else None


DRAWN = given(
    seed=st.integers(0, 2**32 - 1),
    slots=st.sampled_from([0, 1, 2, 3, 7, EXPERTS * LAYERS]),
    tokens=st.sampled_from([1, 3, 17]),
    by_port=st.booleans(),
)


@settings(max_examples=80, deadline=None)
@DRAWN
def test_any_lawful_decision_gives_the_reference_result(seed: int, slots: int, tokens: int, by_port: bool) -> None:
    _check_drawn(_AnyOrder(seed), seed, slots, tokens, by_port)


@settings(max_examples=30, deadline=None)
@DRAWN
def test_any_lawful_decision_gives_the_reference_result_on_cuda(
    seed: int, slots: int, tokens: int, by_port: bool
) -> None:
    """Where there is no GPU its streams are pretended: who waits for whom is tested, what overlaps is not."""
    if torch.cuda.is_available():
        _check_drawn(make_device("cuda"), seed, slots, tokens, by_port)
        return
    with pretended_cuda() as (device, _), mock.patch.object(device, "_kernel", return_value=None):
        _check_drawn(device, seed, slots, tokens, by_port)


@pytest.mark.parametrize("by_port", [False, True], ids=["eagerly", "as captured"])
@pytest.mark.parametrize("seed", [1, 2])
def test_cuda_computes_by_the_kernels(seed: int, by_port: bool) -> None:
    """Interpreted where there is no GPU."""
    if torch.cuda.is_available():
        _check_drawn(make_device("cuda"), seed, 3, 3, by_port)
        return
    replays: list[int] = []

    def captured(graphs: object, work: Callable[[], None]) -> object:
        return SimpleNamespace(replay=lambda: (replays.append(1), work()))

    with (
        pretended_cuda() as (device, _),
        mock.patch("moestro.devices.cuda_slots.captured", captured),
        mock.patch("moestro.devices.cuda.CudaGraphs"),
    ):
        _check_drawn(device, seed, 3, 3, by_port)
        assert all(kernel is not None for _, kernel in device._kernels.values())
    assert bool(replays) == by_port


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_held_layer_waits_for_nobody(tokens: int) -> None:
    """One whose experts are all held is not decided about; another one is."""
    held = frozenset((1, e) for e in range(EXPERTS))
    with contextlib.ExitStack() as stack:
        cuda = torch.cuda.is_available()
        device = make_device("cuda") if cuda else stack.enter_context(pretended_cuda())[0]
        policy = Fixed(Decision(cpu={0: FULL}))
        conductor, parts = small_conductor(policy, EXPERTS, device)
        conductor.slots = SlotPool(conductor.slots.memory, held)
        for expert in held:
            conductor.slots[expert].copy_(conductor.store[expert])
        for name in ("read_router", "follow"):  # a stream that is captured may not even wait for another one
            stack.enter_context(mock.patch.object(device, name, side_effect=AssertionError("the host waited")))
        x, weights = torch.randn(tokens, SHAPE.hidden), torch.rand(tokens, TOP_K)
        index = torch.randint(0, EXPERTS + 1, (tokens, TOP_K))
        conductor.begin(StepInfo.alike(Phase.DECODE, tokens))
        at = device.torch_device
        out = conductor.run_layer(1, x.to(at), index.to(at), weights.to(at)).cpu()
        torch.testing.assert_close(out, reference_of(parts[1], x, index, weights), rtol=1e-4, atol=1e-5)
        ours = index[index < EXPERTS]
        assert (conductor.counters.hits, conductor.counters.tokens) == (len(ours.unique()), len(ours))
        assert conductor.held_op(0, torch.float32) is None
        conductor.listener = mock.Mock(lookahead=0)
        assert conductor.held_op(1, torch.float32) is None  # it wants to hear of it
        conductor.close()


def _check_drawn(device: Any, seed: int, slots: int, tokens: int, by_port: bool) -> None:
    torch.manual_seed(seed)
    policy = Drawn(seed)
    conductor, parts = small_conductor(policy, slots, device)
    at = device.torch_device
    run_layer = ByPort(conductor).run_layer if by_port else conductor.run_layer
    try:
        for step in range(2):
            conductor.begin(StepInfo.alike(Phase.PREFILL if step == 0 else Phase.DECODE, tokens))
            for layer in range(LAYERS):
                x, weights = torch.randn(tokens, SHAPE.hidden), torch.rand(tokens, TOP_K)
                index = torch.randint(0, EXPERTS + 1, (tokens, TOP_K))  # EXPERTS is the sentinel
                out = run_layer(layer, x.to(at), index.to(at), weights.to(at)).cpu()
                torch.testing.assert_close(out, reference_of(parts[layer], x, index, weights), rtol=1e-4, atol=1e-5)
    finally:
        conductor.close()
    decode = [o for o in policy.outcomes if o.phase is Phase.DECODE]
    counters = conductor.counters
    assert counters.layer_steps == 2 * LAYERS == len(policy.outcomes)
    assert counters.hits == sum(len(o.hits) for o in decode)
    assert counters.hits + counters.joined + counters.misses == sum(
        len(o.hits) + len(o.joined) + len(o.misses) for o in decode
    )
    assert counters.moved_bytes == sum(o.moved_bytes for o in policy.outcomes)


def test_a_kept_expert_is_a_hit_next_time_and_is_not_copied_again() -> None:
    conductor, _ = small_conductor(
        Fixed(Decision(gpu={2: FULL}, moves=(Move((0, 2)),))), 1, EmulatedDevice(link_gbps=None)
    )
    x, index, weights = torch.randn(1, SHAPE.hidden), torch.tensor([[2]]), torch.ones(1, 1)
    conductor.begin(StepInfo.alike(Phase.DECODE, 1))
    first = conductor.run_layer(0, x, index, weights)
    conductor.policy.decision = Decision(gpu={2: FULL})  # type: ignore[attr-defined]
    second = conductor.run_layer(0, x, index, weights)
    assert torch.equal(first, second)
    assert (conductor.counters.misses, conductor.counters.hits) == (1, 1)
    assert conductor.counters.moved_bytes == FORMAT.expert_bytes(SHAPE)
    conductor.close()


def test_an_unlawful_decision_stops_before_anything_moves() -> None:
    conductor, _ = small_conductor(Fixed(Decision(gpu={2: FULL})), 1, EmulatedDevice(link_gbps=None))
    with pytest.raises(ContractError, match="not there nor on its way"):
        conductor.run_layer(0, torch.randn(1, SHAPE.hidden), torch.tensor([[2]]), torch.ones(1, 1))
    assert conductor.counters.layer_steps == 0
    conductor.close()


class _SlowLink(EmulatedDevice):
    """A device whose copies wait for the test."""

    def __init__(self) -> None:
        super().__init__(link_gbps=None)
        self.go: Future[None] = Future()
        self.begun = threading.Event()
        send = self.link.carrier.send

        def wait_and_send(*args: Any) -> Any:
            self.begun.set()
            self.go.result()
            return send(*args)

        self.link.carrier.send = wait_and_send  # type: ignore[method-assign]


def test_a_second_request_joins_a_copy_in_flight() -> None:
    device = _SlowLink()
    conductor, parts = small_conductor(Fixed(Decision(cpu={1: FULL}, moves=(Move((1, 4), urgent=False),))), 1, device)
    x, index, weights = torch.randn(1, SHAPE.hidden), torch.tensor([[1]]), torch.ones(1, 1)
    conductor.begin(StepInfo.alike(Phase.DECODE, 1))
    conductor.run_layer(0, x, index, weights)  # starts a guess for layer 1 and does not wait for it
    assert not conductor.slots.ready((1, 4))
    assert not conductor.slots.evictable()
    conductor.policy.decision = Decision(gpu={4: FULL})  # type: ignore[attr-defined]
    threading.Timer(0.3, device.go.set_result, [None]).start()
    index = torch.tensor([[4]])
    out = conductor.run_layer(1, x, index, weights)
    torch.testing.assert_close(out, reference_of(parts[1], x, index, weights), rtol=1e-4, atol=1e-5)
    assert conductor.counters.joined == 1
    assert conductor.counters.moved_bytes == FORMAT.expert_bytes(SHAPE)
    conductor.close()


def test_a_queued_guess_can_be_dropped() -> None:
    device = _SlowLink()
    policy = Fixed(Decision(cpu={1: FULL}, moves=(Move((1, 4)), Move((2, 4)))))
    conductor, _ = small_conductor(policy, 2, device)
    x, index, weights = torch.randn(1, SHAPE.hidden), torch.tensor([[1]]), torch.ones(1, 1)
    conductor.run_layer(0, x, index, weights)
    device.begun.wait()
    policy.decision = Decision(cpu={1: FULL}, drop=((1, 4), (2, 4)))
    conductor.run_layer(0, x, index, weights)
    assert conductor.slots.find((1, 4)) is not None  # was running: cannot be dropped
    assert conductor.slots.find((2, 4)) is None
    device.go.set_result(None)
    conductor.close()


def test_an_expert_that_a_later_move_joins_is_computed_once() -> None:
    """Its first move waits for the work that frees its slot, so that it has not run when the second one comes."""
    moves = (Move((0, 1)), Move((0, 2), evict=(0, 1)), Move((0, 2), keep=True))
    conductor, parts = small_conductor(Fixed(Decision(gpu={1: FULL, 2: FULL}, moves=moves)), 1, EmulatedDevice())
    x, index, weights = torch.randn(1, SHAPE.hidden), torch.tensor([[1, 2]]), torch.ones(1, 2)
    out = conductor.run_layer(0, x, index, weights)
    torch.testing.assert_close(out, reference_of(parts[0], x, index, weights), rtol=1e-4, atol=1e-5)
    conductor.close()


class _BrokenLink(EmulatedDevice):
    """A device whose copies fail while `broken`."""

    def __init__(self) -> None:
        super().__init__(link_gbps=None)
        self.broken = True
        send = self.link.carrier.send

        def fail_or_send(*args: Any) -> Any:
            if self.broken:
                raise OSError("the link is down")
            return send(*args)

        self.link.carrier.send = fail_or_send  # type: ignore[method-assign]


def test_where_a_copy_fails_the_cpu_computes_and_the_slot_is_usable_again(caplog: pytest.LogCaptureFixture) -> None:
    device = _BrokenLink()
    conductor, parts = small_conductor(Fixed(Decision(gpu={2: FULL}, moves=(Move((0, 2)),))), 1, device)
    x, index, weights = torch.randn(1, SHAPE.hidden), torch.tensor([[2]]), torch.ones(1, 1)
    for device.broken in (True, False):
        conductor.begin(StepInfo.alike(Phase.DECODE, 1))
        assert conductor.slots.find((0, 2)) is None
        out = conductor.run_layer(0, x, index, weights)
        torch.testing.assert_close(out, reference_of(parts[0], x, index, weights), rtol=1e-4, atol=1e-5)
        assert conductor.slots.ready((0, 2)) is not device.broken
    says = "layer 0: the copy of expert (0, 2) failed: the link is down; the CPU computes [2] instead"
    assert [capture.message for capture in caplog.records] == [says]
    conductor.close()


def test_a_failed_guess_does_not_poison_its_slot() -> None:
    device = _BrokenLink()
    policy = Fixed(Decision(cpu={1: FULL}, moves=(Move((1, 4), urgent=False),)))
    conductor, parts = small_conductor(policy, 1, device)
    x, weights = torch.randn(1, SHAPE.hidden), torch.ones(1, 1)
    conductor.run_layer(0, x, torch.tensor([[1]]), weights)
    joins, copies = Decision(gpu={4: FULL}), Decision(gpu={4: FULL}, moves=(Move((1, 4)),))
    for device.broken, policy.decision in ((True, joins), (False, copies)):
        if not device.broken:
            conductor.begin(StepInfo.alike(Phase.DECODE, 1))
        out = conductor.run_layer(1, x, torch.tensor([[4]]), weights)
        torch.testing.assert_close(out, reference_of(parts[1], x, torch.tensor([[4]]), weights), rtol=1e-4, atol=1e-5)
    conductor.close()


def test_a_step_whose_end_is_interrupted_as_well_is_settled_by_the_next_one() -> None:
    device, policy = EmulatedDevice(link_gbps=None), Fixed(Decision(gpu={2: FULL}, moves=(Move((0, 2)),)))
    conductor, parts = small_conductor(policy, 1, device)
    x, index, weights = torch.randn(1, SHAPE.hidden), torch.tensor([[2]]), torch.ones(1, 1)
    with (
        mock.patch.object(policy, "observe"),
        mock.patch.object(device, "run", side_effect=KeyboardInterrupt),
        mock.patch.object(device.link, "settle", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        conductor.run_layer(0, x, index, weights)
    assert conductor.slots.find((0, 2)) is not None
    failures = conductor.view.failures
    conductor.begin(StepInfo.alike(Phase.DECODE, 1))
    assert conductor.slots.find((0, 2)) is None
    assert conductor.view.failures == failures + 1
    out = conductor.run_layer(0, x, index, weights)
    torch.testing.assert_close(out, reference_of(parts[0], x, index, weights), rtol=1e-4, atol=1e-5)
    conductor.close()


def test_cuda_launches_at_once_what_waits_for_nobody_else() -> None:
    """Behind a copy that is all on its way; behind one that is not, a thread of the device does it."""
    with pretended_cuda() as (device, _):
        conductor, _ = small_conductor(Fixed(Decision()), 2, device)
        launchers: list[int] = []
        with mock.patch.object(device, "_launch", side_effect=lambda *_: launchers.append(threading.get_ident())):
            for pace in (None, 0.001):
                device.link.gbps = pace
                copy = device.copy(conductor.store[0, 0], conductor.slots.row(0), True, (0, 0))
                device.run(conductor.math[0], mock.Mock(), [], (0, 0), after=copy).wait()
        assert launchers[0] == threading.get_ident() != launchers[1]
        conductor.close()


def test_a_port_that_is_let_go_gives_its_memory_back_at_once() -> None:
    """Without the collector's help: the next policy's slots need that room."""
    with pretended_cuda() as (device, _):
        pool = device.pool(2, 64)
        port = device.port(torch.zeros(1, 8), torch.zeros(1, 2, dtype=torch.int64), None, pool, 4)
        gone = weakref.ref(pool)
        gc.disable()
        try:
            del pool, port
            assert gone() is None
        finally:
            gc.enable()
        device.close()


def test_where_the_device_has_no_memory_the_cpu_computes(caplog: pytest.LogCaptureFixture) -> None:
    device = EmulatedDevice(link_gbps=None)
    conductor, parts = small_conductor(Fixed(Decision(gpu={2: FULL}, moves=(Move((0, 2)),))), 1, device)
    x, index, weights = torch.randn(1, SHAPE.hidden), torch.tensor([[2]]), torch.ones(1, 1)

    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("no room for 3 GiB")

    compute, by_port = device._run, ByPort(conductor).run_layer
    for device._run, run_layer in (  # type: ignore[method-assign]
        (full, conductor.run_layer),
        (compute, conductor.run_layer),
        (full, by_port),
        (compute, by_port),
    ):
        out = run_layer(0, x, index, weights)
        torch.testing.assert_close(out, reference_of(parts[0], x, index, weights), rtol=1e-4, atol=1e-5)
    assert "no room for 3 GiB; the CPU computes [2] instead" in caplog.text
    conductor.close()


def test_a_held_expert_whose_work_fails_ends_the_step() -> None:
    """Nobody else has its weights."""
    device = EmulatedDevice(link_gbps=None)
    conductor, _ = small_conductor(Fixed(Decision(gpu={2: FULL}, moves=(Move((0, 2)),))), 1, device)
    x, index, weights = torch.randn(1, SHAPE.hidden), torch.tensor([[2]]), torch.ones(1, 1)
    conductor.run_layer(0, x, index, weights)
    conductor.store = ExpertStore([[64] * EXPERTS] * LAYERS, absent={(0, 2)})

    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("no room for 3 GiB")

    device._run = full  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        conductor.run_layer(0, x, index, weights)
    conductor.close()


def test_an_urgent_copy_overtakes_guesses() -> None:
    device = _SlowLink()
    guesses = Fixed(Decision(cpu={1: FULL}, moves=tuple(Move((1, e), urgent=False) for e in (3, 4, 5))))
    conductor, _ = small_conductor(guesses, 4, device)
    x, weights = torch.randn(1, SHAPE.hidden), torch.ones(1, 1)
    conductor.run_layer(0, x, torch.tensor([[1]]), weights)
    conductor.policy.decision = Decision(gpu={2: FULL}, moves=(Move((1, 2)),))  # type: ignore[attr-defined]
    threading.Timer(0.3, device.go.set_result, [None]).start()
    timeline = Timeline()
    with conductor.note_on(timeline):
        conductor.run_layer(1, x, torch.tensor([[2]]), weights)
        while len(timeline.spans) < 5:  # four copies and what was computed
            time.sleep(0.001)
    order = [expert for lane, expert, *_ in timeline.spans if lane is Lane.LINK]
    assert order.index((1, 2)) <= 1  # behind the piece that was running, before the other guesses
    conductor.close()


def test_a_borrowed_guess_stays_until_its_layer_has_run() -> None:
    guess = Fixed(Decision(cpu={1: FULL}, moves=(Move((1, 4), keep=False, urgent=False),)))
    conductor, _ = small_conductor(guess, 1, EmulatedDevice(link_gbps=None))
    x, weights = torch.randn(1, SHAPE.hidden), torch.ones(1, 1)
    conductor.run_layer(0, x, torch.tensor([[1]]), weights)
    assert conductor.slots.find((1, 4)) is not None
    assert conductor.view.ready_s((1, 4), GPU0) < float("inf")
    guess.decision = Decision(gpu={4: FULL})
    conductor.run_layer(1, x, torch.tensor([[4]]), weights)
    assert conductor.slots.find((1, 4)) is None
    assert conductor.slots.empty() == 1
    conductor.close()


def test_a_copy_in_flight_is_later_than_now() -> None:
    device = _SlowLink()
    conductor, _ = small_conductor(Fixed(Decision(cpu={1: FULL}, moves=(Move((1, 4)),))), 1, device)
    conductor.run_layer(0, torch.randn(1, SHAPE.hidden), torch.tensor([[1]]), torch.ones(1, 1))
    before_s = conductor.view.now_s
    assert before_s < conductor.view.ready_s((1, 4), GPU0) < float("inf")
    device.go.set_result(None)
    conductor.close()


def test_moves_before_the_first_layer_are_checked() -> None:
    class Eager(Fixed):
        moves: tuple[Move, ...] = ()

        def begin(self, info: StepInfo, view: View, costs: Costs) -> tuple[Move, ...]:
            return self.moves

    policy = Eager(Decision(cpu={1: FULL}))
    conductor, _ = small_conductor(policy, 1, EmulatedDevice(link_gbps=None))
    for moves, says in (
        ((Move((0, 1)), Move((0, 2))), "no more are empty"),
        ((Move((0, 1), neurons=range(64), keep=False),), "needs keep=False and a GPU share"),
        ((Move((9, 1)),), "which the model does not have"),
    ):
        policy.moves = moves
        with pytest.raises(ContractError, match=says):
            conductor.begin(StepInfo.alike(Phase.DECODE, 1))
    conductor.close()


def test_closing_during_a_copy_ends_what_waits_for_it() -> None:
    device = _SlowLink()
    conductor, _ = small_conductor(Fixed(Decision(cpu={1: FULL}, moves=(Move((1, 4)), Move((1, 5))))), 2, device)
    conductor.run_layer(0, torch.randn(1, SHAPE.hidden), torch.tensor([[1]]), torch.ones(1, 1))
    waiting = conductor.slots.find((1, 5)).filling  # type: ignore[union-attr]
    threading.Timer(0.2, device.go.set_result, [None]).start()
    conductor.close()
    with pytest.raises(CopyError, match="was dropped"):
        waiting.wait()  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="the device is closed"):
        device.copy(torch.zeros(4, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8), True, (0, 0))


@pytest.mark.parametrize("closed", [True, False])
def test_no_host_memory_stays_registered(closed: bool) -> None:
    """Neither after close nor after a conductor is let go, also when a step failed."""
    with pretended_cuda() as (device, runtime):
        conductor, _ = small_conductor(Fixed(Decision(gpu={2: FULL}, moves=(Move((0, 2)),))), 1, device)
        assert sum(runtime.registered.values()) == conductor.store.n_bytes
        x, weights = torch.randn(1, SHAPE.hidden), torch.ones(1, 1)
        conductor.run_layer(0, x, torch.tensor([[2]]), weights)
        with pytest.raises(ContractError):
            conductor.run_layer(0, x, torch.tensor([[3]]), weights)
        if closed:
            conductor.close()
        else:
            del conductor
        assert not runtime.registered


def test_an_expert_of_which_a_part_came_is_not_taken_for_a_whole_one() -> None:
    """Its copy may still be on its way when its step is over on the host."""
    split = {"gpu": {2: range(64)}, "cpu": {2: range(64, SHAPE.neurons)}}
    part = Move((0, 2), neurons=range(64), keep=False)
    with pretended_cuda() as (device, _), mock.patch("pretended_cuda.LATE_S", 0.2):
        conductor, _ = small_conductor(Fixed(Decision(**split, moves=(part,))), 2, device)
        x, weights = torch.randn(1, SHAPE.hidden), torch.ones(1, 1)
        conductor.run_layer(0, x, torch.tensor([[2]]), weights)
        assert conductor.view.ready_s((0, 2), GPU0) == float("inf")
        assert conductor.slots.empty() == 2
        conductor.close()


@pytest.mark.parametrize("edge", [32, 96])
def test_an_expert_is_split_at_the_blocks_of_its_own_format(edge: int) -> None:
    """Blocks of 32 neurons, which no kernel takes, and 96 is no edge of the others' blocks of 64."""
    narrow = ExpertFormat(FORMAT.matrices["down"], block=32)
    decision = Decision(
        gpu={2: range(edge)},
        cpu={2: range(edge, SHAPE.neurons)},
        moves=(Move((0, 2), neurons=range(edge), keep=False),),
    )
    conductor, parts = small_conductor(Fixed(decision), 1, EmulatedDevice(link_gbps=None), narrow)
    x, index, weights = torch.randn(3, SHAPE.hidden), torch.full((3, 1), 2), torch.rand(3, 1)
    out = conductor.run_layer(0, x, index, weights)
    torch.testing.assert_close(out, reference_of(parts[0], x, index, weights), rtol=1e-4, atol=1e-4)
    conductor.close()
    wide, _ = small_conductor(Fixed(decision), 1, EmulatedDevice(link_gbps=None))
    with pytest.raises(ContractError, match="not at a multiple of the block of 64"):
        wide.run_layer(0, x, index, weights)
    wide.close()


def test_an_interrupt_while_a_copy_is_queued_leaves_no_slot_with_half_an_expert() -> None:
    device = EmulatedDevice(link_gbps=None)
    conductor, parts = small_conductor(Fixed(Decision(gpu={2: FULL}, moves=(Move((0, 2)),))), 1, device)
    x, weights = torch.randn(1, SHAPE.hidden), torch.ones(1, 1)
    conductor.run_layer(0, x, torch.tensor([[2]]), weights)
    conductor.policy.decision = Decision(gpu={3: FULL}, moves=(Move((0, 3), evict=(0, 2)),))  # type: ignore[attr-defined]
    with (
        mock.patch.object(conductor.time, "arrival_s", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        conductor.run_layer(0, x, torch.tensor([[3]]), weights)
    assert conductor.slots.find((0, 2)) is None  # the copy has written over it
    conductor.policy.decision = Decision(gpu={2: FULL}, moves=(Move((0, 2)),))  # type: ignore[attr-defined]
    out = conductor.run_layer(0, x, torch.tensor([[2]]), weights)
    torch.testing.assert_close(out, reference_of(parts[0], x, torch.tensor([[2]]), weights), rtol=1e-4, atol=1e-5)
    conductor.close()


def test_one_token_is_grouped_as_one_of_many() -> None:
    for _ in range(20):
        index, weights = torch.randperm(8)[:4][None], torch.rand(1, 4) * (torch.rand(1, 4) < 0.8)
        alone = group_by_expert(index, weights, 6)
        among = group_by_expert(torch.cat((index, torch.full_like(index, 6))), torch.cat((weights, weights)), 6)
        assert list(alone.tokens.items()) == list(among.tokens.items())
        assert alone.mass == pytest.approx(among.mass)
        for expert in alone.tokens:
            both = [_parts(routed, expert) for routed in (alone, among)]
            assert all(torch.equal(one, other) for one, other in zip(*both, strict=True))


def test_grouping_skips_the_sentinel_and_keeps_order() -> None:
    index = torch.tensor([[1, 6], [6, 6], [0, 1]])
    weights = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    routed = group_by_expert(index, weights, 6)
    assert routed.tokens == {0: 1, 1: 2}
    assert _parts(routed, 0)[0].tolist() == [2]
    rows, weights = _parts(routed, 1)
    assert rows.tolist() == [0, 2]
    assert weights.tolist() == pytest.approx([0.1, 0.6])


def _parts(routed: Routed, expert: int) -> tuple[Tensor, Tensor]:
    return routed.work(expert, torch.empty(0), range(0)).routed()


def test_no_token_for_us_gives_zeros() -> None:
    conductor, _ = small_conductor(Fixed(Decision()), 0, HostDevice())
    out = conductor.run_layer(0, torch.randn(2, SHAPE.hidden), torch.full((2, TOP_K), EXPERTS), torch.rand(2, TOP_K))
    assert torch.equal(out, torch.zeros(2, SHAPE.hidden))


def test_held_experts_have_no_copy_in_ram() -> None:
    store = ExpertStore([[64, 64], [128, 128]], absent={(0, 1), (1, 0)})
    assert store.n_bytes == 64 + 128
    assert (0, 0) in store
    assert (0, 1) not in store
    assert store[1, 1].numel() == 128


def test_a_part_of_an_expert_is_not_kept_for_the_whole() -> None:
    """A move that only some neurons belong to cannot be joined by one of all."""
    part = Move((0, 2), neurons=range(64), keep=False)
    split = {"gpu": {2: range(64)}, "cpu": {2: range(64, SHAPE.neurons)}}
    conductor, _ = small_conductor(
        Fixed(Decision(**split, moves=(part, Move((0, 2))))), 2, EmulatedDevice(link_gbps=None)
    )
    with pytest.raises(ContractError, match="is moved again, but only some neurons of it are on their way"):
        conductor.run_layer(0, torch.randn(1, SHAPE.hidden), torch.tensor([[2]]), torch.ones(1, 1))
    conductor.close()


def test_threads_have_a_phase_each() -> None:
    conductor, _ = small_conductor(Fixed(Decision(cpu={1: FULL})), 0, EmulatedDevice(link_gbps=None))
    conductor.begin(StepInfo.alike(Phase.DECODE, 1))
    seen = []

    def begin_another() -> None:
        conductor.begin(StepInfo.alike(Phase.PREFILL, 40))
        seen.append(conductor.phase)

    other = threading.Thread(target=begin_another)
    other.start()
    other.join()
    assert seen == [Phase.PREFILL]
    assert conductor.phase is Phase.DECODE
    conductor.close()
