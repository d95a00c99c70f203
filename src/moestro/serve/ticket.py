"""What a caller holds of its request: the events of the answer, and a way to cancel it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue

from .requests import Event, Finished


class Ticket:
    """The events of one request, from the engine's thread to whichever thread takes them.

    Args:
        wake: called by the engine's thread when an event is there: for asyncio,
            `lambda: loop.call_soon_threadsafe(event.set)`. It must not wait. If it raises, the request is cancelled.
        cancel: tells the engine.
    """

    def __init__(self, wake: Callable[[], None] | None, cancel: Callable[[Ticket], None]) -> None:
        self._wake, self._cancel = wake, cancel
        self._events: SimpleQueue[Event] = SimpleQueue()
        self.is_cancelled = False

    def take(self) -> list[Event]:
        """All events that are there now; does not wait."""
        return [self._events.get_nowait() for _ in range(self._events.qsize())]

    def next(self, timeout_s: float | None = None) -> Event | None:
        """The next event; None where none comes in time."""
        try:
            return self._events.get(timeout=timeout_s)
        except Empty:
            return None

    def __iter__(self) -> Iterator[Event]:
        """All events up to the last one, as they come."""
        while True:
            event = self._events.get()
            yield event
            if isinstance(event, Finished):
                return

    def cancel(self) -> None:
        """End the answer: its place is free after the step that runs. A request that is over stays as it is."""
        self.is_cancelled = True
        self._cancel(self)

    def put(self, event: Event) -> None:
        """For the engine: pass an event on."""
        self._events.put(event)
        if self._wake is None:
            return
        try:
            self._wake()
        except Exception:  # its loop is closed: nothing takes the answer any more
            self._wake, self.is_cancelled = None, True
