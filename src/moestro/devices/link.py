"""The link lane carries copies from RAM to the device, piece by piece, by priority.

A thread of its own sends pieces and sees them arrive. Where sending takes no time, the thread that asks for a copy
sends at once what fits, since waking a thread takes longer than a small expert takes to cross. Between two pieces an
urgent copy overtakes; a copy that has not begun can be dropped. At most two pieces, or eight small ones, are on their
way at once, so that the link does not wait for the host and what is urgent waits for no more. Knows neither devices
nor experts: a `Carrier` moves a piece, by a stream or by hand.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

from torch import Tensor

from ..errors import CopyError
from ..memory.slots import SlotUser
from ..planning.contract import Lane
from ..planning.costs import PIECE_BYTES
from ..planning.slots import Expert
from ..planning.timeline import Timeline

IN_FLIGHT_BYTES = 2 * PIECE_BYTES
MOST_IN_FLIGHT = 8  # pieces, where experts are small


class Piece(Protocol):
    """A part of a copy that was sent."""

    def arrived(self) -> bool:
        """Whether it is there."""

    def arrive(self) -> None:
        """Wait, on the host, until it is there."""

    def fence(self) -> None:
        """Let the device's next work wait for it, and for all that was sent before."""


class Carrier(Protocol):
    """What moves bytes. Its pieces arrive in the order in which they are sent."""

    def queues(self, source: Tensor) -> bool:
        """Whether to send this returns at once, so that the thread that asks for a copy may begin it."""

    def send(self, source: Tensor, target: Tensor, behind: Sequence[SlotUser]) -> Piece:
        """Begin to copy a piece, behind work that is launched."""


class _State(IntEnum):
    QUEUED = 0
    BEGUN = 1
    SENT = 2  # all of it, though not there yet
    ARRIVED = 3
    FAILED = 4
    DROPPED = 5


class LaneCopy:
    """A copy on the lane; what the slot table knows as a `SlotCopy`."""

    def __init__(
        self,
        lane: LinkLane,
        source: Tensor,
        target: Tensor,
        urgent: bool,
        label: Expert,
        after: Sequence[SlotUser],
        order: int,
    ) -> None:
        self._lane, self.source, self.target, self.urgent, self.label = lane, source, target, urgent, label
        self.after, self.order = after, order
        self.state = _State.QUEUED
        self.error: Exception | None = None
        self.last: Piece | None = None
        self.sent_bytes = self.arrived_bytes = 0
        self.ready_s = None if after else time.perf_counter()  # since when it could go

    @property
    def is_sent(self) -> bool:
        """Whether all of it is on its way or there, so that `wait` returns at once."""
        return self.state in (_State.SENT, _State.ARRIVED)

    def done(self) -> bool:
        if self.state is _State.SENT and self.last is not None:
            return self.last.arrived()  # which the lane may not have seen yet
        return self.state is _State.ARRIVED

    def wait(self) -> None:
        """Let the device's next work wait for the bytes; the host waits until the last piece is on its way.

        Raises:
            CopyError: it failed, or was dropped.
        """
        with self._lane.changed:
            while self.state < _State.SENT:
                self._lane.changed.wait()
        if self.state is _State.DROPPED:
            raise CopyError(f"the copy of expert {self.label} was dropped")
        if self.state is _State.FAILED:
            raise CopyError(f"the copy of expert {self.label} failed: {self.error}") from self.error
        if self.state is _State.SENT and self.last is not None:
            self.last.fence()

    def cancel(self) -> bool:
        with self._lane.changed:
            if self.state is _State.QUEUED:
                self._lane.end(self, _State.DROPPED)
            return self.state in (_State.DROPPED, _State.FAILED)

    def hasten(self) -> None:
        with self._lane.changed:
            self.make_urgent()

    def make_urgent(self) -> None:
        """It goes before what nothing waits for, and so do the copies before it; the condition is held."""
        self.urgent = True
        for one in self.after:
            if isinstance(one, LaneCopy):
                one.urgent = True

    def next_piece(self) -> tuple[Tensor, Tensor]:
        """Of source and target."""
        if self.source.numel() <= PIECE_BYTES:
            return self.source, self.target
        span = slice(self.sent_bytes, self.sent_bytes + PIECE_BYTES)
        return self.source[span], self.target[span]

    def left_bytes(self) -> int:
        return int(self.source.numel()) - self.arrived_bytes

    def may_go(self) -> bool:
        """Whether what it waits for is out of its way, or launched so that the device can order the two."""
        return all(one.launched() for one in self.after)

    def launched(self) -> bool:
        """Whether all of it is on its way: what is sent from now on arrives after it."""
        return self.state >= _State.SENT

    over = launched

    def when_launched(self, call: Callable[[], None]) -> None:
        """Does nothing: the lane that sends it looks at its queue again by itself."""

    @property
    def behind(self) -> list[SlotUser]:
        """Launched work that still reads the target."""
        return [one for one in self.after if not one.over()]


class _Flying(NamedTuple):
    copy: LaneCopy
    piece: Piece
    n_bytes: int
    sent_s: float


@dataclass(slots=True)
class LaneCounters:
    """idle_s: the link did nothing though a copy could go."""

    busy_s: float = 0.0
    idle_s: float = 0.0
    n_bytes: int = 0
    failed: int = 0  # copies


class LinkLane:
    """The thread and its queue.

    Args:
        gbps: paces the link, so that a slower one can be had; None for no pace.
    """

    def __init__(self, carrier: Carrier, gbps: float | None = None) -> None:
        self.carrier, self.gbps = carrier, gbps
        self.timeline: Timeline | None = None
        self.counters = LaneCounters()
        self.changed = threading.Condition()
        self._queue: list[LaneCopy] = []
        self._flying: deque[_Flying] = deque()
        self._flying_bytes = 0
        self._order = itertools.count()
        self._closed = False
        self._is_sending = False  # the thread, without holding the condition, since it takes a while
        self._free_s = 0.0  # when the paced link has carried what was sent
        self._ended_s = 0.0  # when the last piece arrived
        # A daemon, so that a program may end while copies are queued that will not be read.
        self._thread = threading.Thread(target=self._work, name="moestro-link", daemon=True)
        self._thread.start()

    def submit(
        self, source: Tensor, target: Tensor, urgent: bool, label: Expert, after: Sequence[SlotUser] = ()
    ) -> LaneCopy:
        """Queue a copy of host bytes into device bytes, both uint8 and of one length.

        Args:
            label: whose bytes they are, for messages and the timeline.
            after: work that reads the target and copies that write it: this one begins behind them all.
        """
        with self.changed:
            if self._closed:
                raise RuntimeError("the device is closed; load the model again")
            copy = LaneCopy(self, source, target, urgent, label, after, next(self._order))
            if urgent:
                copy.make_urgent()
            self._queue.append(copy)
            if not self._is_sending and self._queues(copy):
                self._send_what_fits()
            self.changed.notify_all()
        for one in after:
            one.when_launched(self._wake)
        return copy

    def queued_bytes(self, *, urgent: bool = False) -> int:
        """What has not crossed yet of the copies that were queued; with `urgent`, of urgent ones alone."""
        # Not under the condition, for which a step would wait: lists of what is there are made in one go.
        copies = {*list(self._queue), *[flying.copy for flying in list(self._flying)]}
        return sum(copy.left_bytes() for copy in copies if copy.urgent or not urgent)

    def end(self, copy: LaneCopy, state: _State, error: Exception | None = None) -> None:
        """A copy leaves the queue, or has arrived; the condition is held."""
        if copy in self._queue:
            self._queue.remove(copy)
        if copy.state < _State.FAILED:
            copy.state, copy.error = state, error
            self.counters.failed += state is _State.FAILED
        copy.after = ()  # which may hold tensors
        self.changed.notify_all()

    def close(self) -> None:
        """Drop what has not begun, let the rest arrive, stop the thread."""
        with self.changed:
            self._closed = True
            for copy in list(self._queue):
                begun = copy.state is _State.BEGUN
                self.end(copy, _State.FAILED if begun else _State.DROPPED, RuntimeError("the device was closed"))
            self.changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(10.0)

    def _wake(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def _send_what_fits(self) -> None:
        with suppress(Exception):  # a broken device: the thread meets it as well, and tells all
            while (copy := self.next()) is not None and self._queues(copy):
                self._send(copy)

    def _queues(self, copy: LaneCopy) -> bool:
        """Whether its next piece can be sent at once, by any thread that holds the condition."""
        return self.gbps is None and self.carrier.queues(copy.next_piece()[0])

    def next(self) -> LaneCopy | None:
        """The copy whose turn it is: urgent ones first, then as they came. One that work on the device holds up goes
        only if nothing else can, since all that is sent after it would wait as well."""
        if not self._queue or len(self._flying) == MOST_IN_FLIGHT or self._flying_bytes >= IN_FLIGHT_BYTES:
            return None
        held_up: LaneCopy | None = None
        for copy in sorted(self._queue, key=lambda one: (not one.urgent, one.order)):
            if not copy.may_go():
                continue
            if copy.state is _State.BEGUN or not copy.behind:
                copy.ready_s = copy.ready_s or time.perf_counter()
                return copy
            held_up = held_up or copy
        return None if self._flying else held_up

    def settle(self) -> None:
        """Drop what has not begun and wait until the rest is there."""
        with self.changed:
            for copy in [copy for copy in self._queue if copy.state is _State.QUEUED]:
                self.end(copy, _State.DROPPED)
            while (self._queue or self._flying) and self._thread.is_alive():
                self.changed.wait(1.0)

    def _work(self) -> None:
        try:
            while self._go_on():
                pass
        except Exception as error:  # the device is broken: the thread that waits raises it
            with self.changed:
                self._closed = True
                for copy in [*self._queue, *(flying.copy for flying in self._flying)]:
                    self.end(copy, _State.FAILED, error)
                self._flying.clear()
                self._flying_bytes = 0

    def _go_on(self) -> bool:
        """Send a piece, or see one arrive; False when the lane is closed and empty."""
        with self.changed:
            while (copy := self.next()) is None and not self._flying and not self._closed:
                self.changed.wait()
            if copy is None and not self._flying:
                return False
            if copy is not None and self._queues(copy):
                self._send(copy)
                return True
            self._is_sending = copy is not None
            if copy is not None:
                copy.state = _State.BEGUN  # before another thread can drop it
        if copy is None:
            self._land()
            return True
        try:
            self._send(copy)
        finally:
            self._is_sending = False
        return True

    def _send(self, copy: LaneCopy) -> None:
        """Its next piece. Only one thread sends at a time."""
        source, target = copy.next_piece()
        copy.state = _State.BEGUN
        now_s = time.perf_counter()
        if self.gbps is not None:
            self._free_s = max(self._free_s, now_s) + source.numel() / (self.gbps * 1e9)
            time.sleep(max(0.0, self._free_s - now_s))
        try:
            piece = self.carrier.send(source, target, copy.behind if not copy.sent_bytes else [])
        except Exception as error:
            with self.changed:
                self.end(copy, _State.FAILED, error)
            return
        with self.changed:
            self._flying.append(_Flying(copy, piece, source.numel(), now_s))
            self._flying_bytes += source.numel()
            copy.sent_bytes += source.numel()
            copy.last = piece
            if copy.sent_bytes == copy.source.numel():
                self.end(copy, _State.SENT)

    def _land(self) -> None:
        copy, piece, n_bytes, sent_s = self._flying[0]
        error: Exception | None = None
        try:
            piece.arrive()
        except Exception as raised:
            error = raised
        end_s = time.perf_counter()
        start_s = max(sent_s, self._ended_s)
        self._note(copy, start_s, end_s, n_bytes)
        with self.changed:
            self._flying.popleft()
            self._flying_bytes -= n_bytes
            copy.arrived_bytes += n_bytes
            if error is not None:
                self.end(copy, _State.FAILED, error)
            elif copy.arrived_bytes == copy.source.numel():
                self.end(copy, _State.ARRIVED)
            self.changed.notify_all()

    def _note(self, copy: LaneCopy, start_s: float, end_s: float, n_bytes: int) -> None:
        counters = self.counters
        counters.busy_s += end_s - start_s
        counters.n_bytes += n_bytes
        if copy.ready_s is not None:
            counters.idle_s += max(0.0, start_s - max(copy.ready_s, self._ended_s))
        self._ended_s = end_s
        if self.timeline is not None:
            self.timeline.add(Lane.LINK, copy.label, start_s, end_s, "copy" if copy.urgent else "guess")
