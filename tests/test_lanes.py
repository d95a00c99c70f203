"""The link lane: priorities, pieces, faults, pace."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.devices.link import IN_FLIGHT_BYTES, MOST_IN_FLIGHT, LinkLane
from moestro.errors import CopyError
from moestro.planning.contract import Lane
from moestro.planning.costs import PIECE_BYTES
from moestro.planning.timeline import Timeline

IN_FLIGHT = IN_FLIGHT_BYTES // PIECE_BYTES  # pieces of full size


class Piece:
    """Arrives when the test says so."""

    def __init__(self) -> None:
        self.there = threading.Event()
        self.fenced = 0

    def arrived(self) -> bool:
        return self.there.is_set()

    def arrive(self) -> None:
        self.there.wait()

    def fence(self) -> None:
        self.fenced += 1


class Carrier:
    """Notes what is sent; pieces arrive at once unless `held`. is_quick: who submits may send."""

    is_quick = False

    def __init__(self, held: bool = False) -> None:
        self.sent: list[tuple[int, int]] = []  # of the target's first byte and its size
        self.behind: list[Any] = []
        self.pieces: list[Piece] = []
        self.held = held
        self.senders: set[int] = set()  # threads
        self.fails_at: int | None = None
        self.changed = threading.Condition()

    def queues(self, source: Tensor) -> bool:
        return self.is_quick

    def send(self, source: Tensor, target: Tensor, behind: Any) -> Piece:
        self.senders.add(threading.get_ident())
        if self.fails_at == len(self.pieces):
            self.fails_at = None
            raise OSError("no link")
        target.copy_(source)
        piece = Piece()
        if not self.held:
            piece.there.set()
        with self.changed:
            self.sent.append((int(source[0]), source.numel()))
            self.behind.append(behind)
            self.pieces.append(piece)
            self.changed.notify_all()
        return piece

    def release(self) -> None:
        """Let everything arrive, also what is sent later."""
        self.held = False
        for piece in self.pieces:
            piece.there.set()

    def wait_for(self, pieces: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.pieces) >= pieces, 10)


@pytest.fixture(autouse=True, params=[False, True], ids=["the lane's thread sends", "who submits sends"])
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Carrier, "is_quick", request.param)


class Work:
    """Work on a device, launched and over when the test says so."""

    def __init__(self) -> None:
        self.is_launched = self.is_over = False
        self.calls: list[Callable[[], None]] = []

    def launched(self) -> bool:
        return self.is_launched

    def over(self) -> bool:
        return self.is_over

    def when_launched(self, call: Callable[[], None]) -> None:
        self.calls.append(call)

    def launch(self) -> None:
        self.is_launched = True
        for call in self.calls:
            call()


def _bytes(number: int, pieces: float = 0.001) -> Tensor:
    return torch.full((int(pieces * PIECE_BYTES),), number, dtype=torch.uint8)


def _arrived(*copies: Any) -> None:
    end_s = time.monotonic() + 10
    while not all(copy.done() for copy in copies):
        assert time.monotonic() < end_s
        time.sleep(0.001)


def test_what_is_urgent_overtakes_between_two_pieces() -> None:
    carrier = Carrier(held=True)
    lane = LinkLane(carrier)
    long, target = _bytes(1, 3.5), _bytes(0, 3.5)
    guess = lane.submit(long, target, False, (0, 1))
    carrier.wait_for(IN_FLIGHT)
    other = lane.submit(_bytes(2), _bytes(0), False, (0, 2))
    urgent = lane.submit(_bytes(3), _bytes(0), True, (0, 3))
    assert lane.queued_bytes(urgent=True) == urgent.left_bytes()
    carrier.release()
    _arrived(guess, other, urgent)
    assert [number for number, _ in carrier.sent] == [1, 1, 3, 1, 1, 2]
    assert [size for _, size in carrier.sent[:2]] == [PIECE_BYTES] * 2
    assert torch.equal(long, target)
    assert lane.queued_bytes() == 0
    assert lane.counters.n_bytes == long.numel() + 2 * _bytes(0).numel()
    lane.close()


def test_no_more_than_two_pieces_fly_at_once() -> None:
    carrier = Carrier(held=True)
    lane = LinkLane(carrier)
    copy = lane.submit(_bytes(1, 4), _bytes(0, 4), True, (0, 1))
    for arrived in range(4):
        carrier.wait_for(min(4, arrived + IN_FLIGHT))
        time.sleep(0.02)
        assert len(carrier.pieces) == min(4, arrived + IN_FLIGHT)
        carrier.pieces[arrived].there.set()
    _arrived(copy)
    lane.close()


def test_a_hastened_copy_goes_first_and_a_dropped_one_never() -> None:
    carrier = Carrier(held=True)
    lane = LinkLane(carrier)
    first = lane.submit(_bytes(1, IN_FLIGHT), _bytes(0, IN_FLIGHT), False, (0, 1))
    carrier.wait_for(IN_FLIGHT)
    second, third, fourth = (lane.submit(_bytes(n), _bytes(0), False, (0, n)) for n in (2, 3, 4))
    third.hasten()
    assert second.cancel()
    assert not first.cancel()
    with pytest.raises(CopyError, match=r"the copy of expert \(0, 2\) was dropped"):
        second.wait()
    carrier.release()
    _arrived(first, third, fourth)
    assert [number for number, _ in carrier.sent] == [1, 1, 3, 4]
    lane.close()


def test_who_needs_a_copy_waits_until_it_is_sent_and_then_for_its_last_piece_alone() -> None:
    carrier = Carrier(held=True)
    lane = LinkLane(carrier)
    copy = lane.submit(_bytes(1, IN_FLIGHT), _bytes(0, IN_FLIGHT), True, (0, 1))
    copy.wait()  # the pieces have not arrived
    assert not copy.done()
    assert [piece.fenced for piece in carrier.pieces] == [0, 1]
    for piece in carrier.pieces:
        piece.there.set()
    _arrived(copy)
    lane.close()


def test_a_copy_waits_for_work_that_reads_its_target() -> None:
    """Not sent before the work is launched; then behind it, but only while nothing else can go."""
    carrier, work, other = Carrier(), Work(), Work()
    lane = LinkLane(carrier)
    waits = lane.submit(_bytes(1), _bytes(0), True, (0, 1), [work])
    _arrived(lane.submit(_bytes(2), _bytes(0), False, (0, 2)))
    assert not waits.done()
    work.launch()
    _arrived(waits)
    assert carrier.behind == [[], [work]]
    other.is_over = True
    after = lane.submit(_bytes(3), _bytes(0), True, (0, 3), [other])
    other.launch()
    _arrived(after)
    assert carrier.behind[2] == []
    lane.close()


def test_a_copy_into_a_slot_in_flight_follows_and_hastens_the_one_before() -> None:
    carrier = Carrier(held=True)
    lane = LinkLane(carrier)
    first = lane.submit(_bytes(1, IN_FLIGHT), _bytes(0, IN_FLIGHT), True, (0, 1))
    carrier.wait_for(IN_FLIGHT)
    target = _bytes(0)
    guess = lane.submit(_bytes(2), target, False, (0, 2))
    third = lane.submit(_bytes(3), _bytes(0), False, (0, 3))
    follows = lane.submit(_bytes(4), target, True, (0, 4), [guess])
    carrier.release()
    _arrived(first, guess, third, follows)
    assert [number for number, _ in carrier.sent] == [1, 1, 2, 4, 3]
    assert int(target[0]) == 4
    lane.close()


def test_a_failed_copy_says_why_and_holds_up_nobody() -> None:
    carrier = Carrier()
    carrier.fails_at = 1
    lane = LinkLane(carrier)
    target = _bytes(0, 2)
    failed = lane.submit(_bytes(1, 2), target, True, (2, 5))
    follows = lane.submit(_bytes(7, 2), target, True, (2, 6), [failed])
    with pytest.raises(CopyError, match=r"the copy of expert \(2, 5\) failed: no link"):
        failed.wait()
    assert failed.cancel()
    _arrived(follows)
    assert int(target.min()) == 7
    lane.close()


def test_a_pace_is_kept_and_the_link_is_never_idle_while_a_copy_is_queued() -> None:
    """A pace slow enough for any machine: 200 copies of 160 kB at 0.05 GB/s take 0.64 s."""
    lane, timeline = LinkLane(Carrier(), gbps=0.05), Timeline()
    lane.timeline = timeline
    size = _bytes(0, 0.01).numel()
    start_s = time.perf_counter()
    copies = [lane.submit(_bytes(n, 0.01), _bytes(0, 0.01), n % 3 == 0, (0, n)) for n in range(200)]
    _arrived(*copies)
    took_s = time.perf_counter() - start_s
    assert took_s > 200 * size / 0.05e9
    spans = [span for span in timeline.spans if span[0] is Lane.LINK]
    assert [span[1][1] for span in spans[:1]] == [0]
    assert sorted(span[1][1] for span in spans) == list(range(200))
    busy_s = sum(end_s - begin_s for _, _, begin_s, end_s, _ in spans)
    assert busy_s == pytest.approx(lane.counters.busy_s)
    assert lane.counters.idle_s <= 0.05 * busy_s
    lane.close()


def test_closing_drops_what_has_not_begun() -> None:
    carrier = Carrier(held=True)
    lane = LinkLane(carrier)
    flying = lane.submit(_bytes(1, IN_FLIGHT), _bytes(0, IN_FLIGHT), True, (0, 1))
    carrier.wait_for(IN_FLIGHT)
    queued = lane.submit(_bytes(2), _bytes(0), True, (0, 2))
    threading.Timer(0.1, lambda: [piece.there.set() for piece in carrier.pieces]).start()
    lane.close()
    _arrived(flying)
    with pytest.raises(CopyError, match="was dropped"):
        queued.wait()
    with pytest.raises(RuntimeError, match="the device is closed"):
        lane.submit(_bytes(2), _bytes(0), True, (0, 2))


def test_a_broken_device_is_told_to_whoever_waits() -> None:
    work = Work()
    work.over = lambda: 1 / 0  # type: ignore[method-assign,return-value,assignment]
    lane = LinkLane(Carrier())
    work.is_launched = True
    copy = lane.submit(_bytes(1), _bytes(0), True, (0, 1), [work])
    with pytest.raises(CopyError, match="division by zero"):
        copy.wait()
    with pytest.raises(RuntimeError, match="the device is closed"):
        lane.submit(_bytes(1), _bytes(0), True, (0, 1))
    lane.close()


def test_small_pieces_fly_in_greater_numbers() -> None:
    carrier = Carrier(held=True)
    lane = LinkLane(carrier)
    with lane.changed:  # all at once, or the lane may find its queue empty and wait for a piece
        copies = [lane.submit(_bytes(n), _bytes(0), True, (0, n)) for n in range(12)]
    carrier.wait_for(MOST_IN_FLIGHT)
    time.sleep(0.02)
    assert len(carrier.pieces) == MOST_IN_FLIGHT
    carrier.release()
    _arrived(*copies)
    lane.close()


def test_who_sends_where_that_takes_no_time() -> None:
    """Whoever submits, as long as there is room; the lane's thread what is left, what takes time, and at a pace."""
    here = threading.get_ident()
    for pace in (None, 10.0):
        carrier = Carrier(held=True)
        lane = LinkLane(carrier, pace)
        copy = lane.submit(_bytes(1, IN_FLIGHT - 1), _bytes(0, IN_FLIGHT - 1), True, (0, 1))
        at_once = Carrier.is_quick and pace is None
        if at_once:
            assert copy.is_sent
        carrier.wait_for(IN_FLIGHT - 1)
        assert carrier.senders == ({here} if at_once else {lane._thread.ident})
        more = lane.submit(_bytes(2, 2), _bytes(0, 2), True, (0, 2))
        assert not more.is_sent  # there is room for one of its pieces at most
        carrier.release()
        _arrived(copy, more)
        assert carrier.senders == ({here, lane._thread.ident} if at_once else {lane._thread.ident})
        lane.close()
