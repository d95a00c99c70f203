"""The virtual machine's link: copies in pieces, by priority, on its clock.

A piece that runs is never interrupted; between two pieces an urgent copy overtakes. What happens before a moment is
committed all at once, copy by copy, so that an expert of 21 pieces costs no more to simulate than one of a single one.
"""

from __future__ import annotations

from bisect import insort
from math import ceil
from typing import Protocol

from ..planning.contract import Expert, Lane
from ..planning.costs import Costs
from ..planning.slots import Transfer
from ..planning.timeline import Timeline


class HasLink(Protocol):
    """What a copy needs to see of its machine."""

    now_s: float
    costs: Costs
    link: VirtualLink


class VirtualCopy:
    """A copy on the virtual link."""

    __slots__ = (
        "_machine",
        "before",
        "done_s",
        "expert",
        "left_s",
        "n_bytes",
        "not_before_s",
        "order",
        "over",
        "real",
        "started",
        "urgent",
    )

    def __init__(
        self,
        machine: HasLink,
        expert: Expert,
        n_bytes: int,
        urgent: bool,
        not_before_s: float,
        order: int,
        before: VirtualCopy | None,
        real: Transfer | None,
    ) -> None:
        self._machine, self.expert, self.n_bytes, self.urgent = machine, expert, n_bytes, urgent
        self.before, self.real = before, real
        self.left_s, self.not_before_s, self.order = machine.costs.link_s(n_bytes), not_before_s, order
        self.started, self.over, self.done_s = False, False, float("inf")  # over: done, or dropped

    def done(self) -> bool:
        now_s, link = self._machine.now_s, self._machine.link
        if link.free_s < now_s:
            link.advance(now_s)
        return self.done_s <= now_s and (self.real is None or self._really_done())

    def _really_done(self) -> bool:
        """Whether the bytes are there, for which a live run waits; False if they could not come."""
        try:
            self.wait()
        except Exception:  # the step that needs them will raise it
            return False
        return True

    def wait(self) -> None:
        if self.real is not None:
            self.real.wait()

    def cancel(self) -> bool:
        self._machine.link.advance(self._machine.now_s)
        if not self._machine.link.drop(self):
            return self.done_s <= self._machine.now_s and not self._really_done()
        if self.real is not None and not self.real.cancel():
            self.real.wait()  # it would write into the slot's next expert
        return True

    def hasten(self) -> None:
        self._machine.link.advance(self._machine.now_s)
        self._machine.link.hasten(self)

    def left_bytes(self) -> int:
        self._machine.link.advance(self._machine.now_s)
        return round(self.left_s / self._machine.costs.link_s(1))


class VirtualLink:
    """Copies one after another, by priority, in pieces. `advance` commits what happens before a moment."""

    def __init__(self, piece_s: float, timeline: Timeline | None) -> None:
        self._piece_s, self.timeline = piece_s, timeline
        self._rounding_s = 1e-6 * piece_s  # moments that are nearer than this are one
        self._urgent: list[VirtualCopy] = []  # both in the order in which they came
        self._others: list[VirtualCopy] = []
        self._left_s = [0.0, 0.0]  # of the urgent ones, of the others
        self.free_s = 0.0  # when the last committed piece ends
        self.busy: list[tuple[float, float]] = []  # committed since the layer began
        self.busy_s = 0.0
        self.n_bytes = 0.0  # carried

    @property
    def is_idle(self) -> bool:
        """Whether nothing is queued."""
        return not self._urgent and not self._others

    def submit(self, copy: VirtualCopy, now_s: float) -> None:
        self.free_s = max(self.free_s, now_s)
        (self._urgent if copy.urgent else self._others).append(copy)
        self._left_s[not copy.urgent] += copy.left_s
        if copy.urgent and copy.before is not None:
            self.hasten(copy.before)

    def hasten(self, copy: VirtualCopy) -> None:
        """Put a queued copy among the urgent ones."""
        if copy.urgent or copy not in self._others:
            return
        self._remove(copy)
        copy.urgent = True
        insort(self._urgent, copy, key=lambda one: one.order)
        self._left_s[0] += copy.left_s

    def drop(self, copy: VirtualCopy) -> bool:
        """Take a copy back that has not begun."""
        if copy.started or copy.over:
            return False
        self._remove(copy)
        copy.over = True
        return True

    def _remove(self, copy: VirtualCopy) -> None:
        (self._urgent if copy.urgent else self._others).remove(copy)
        self._left_s[not copy.urgent] -= copy.left_s
        if self.is_idle:
            self._left_s = [0.0, 0.0]  # of rounding

    def advance(self, until_s: float, wanted: VirtualCopy | None = None) -> None:
        """Commit all pieces that begin before `until_s`; no further than to the end of `wanted`, if given."""
        until_s -= self._rounding_s
        if self.free_s >= until_s:
            return  # as mostly
        while self.free_s < until_s and (self._urgent or self._others) and not (wanted is not None and wanted.over):
            start_s = self.free_s
            copy, limit_s = self._next(start_s)
            if copy is None:  # all wait for a slot or for the disk
                if limit_s >= until_s:
                    self.free_s = until_s
                    return
                self.free_s = limit_s
                continue
            run_s, limit_s = copy.left_s, min(limit_s, until_s)
            if start_s + run_s > limit_s:
                pieces = max(1, ceil((limit_s - start_s) / self._piece_s - 1e-6))
                run_s = min(run_s, pieces * self._piece_s)
            self._commit(copy, start_s, run_s)

    def _next(self, now_s: float) -> tuple[VirtualCopy | None, float]:
        """The copy whose turn it is, and the moment at which another may take its place."""
        limit_s = float("inf")
        for queue in (self._urgent, self._others):
            for copy in queue:
                if copy.before is not None and not copy.before.over:
                    continue  # its turn comes when that one is through, which is no moment of its own
                if copy.not_before_s <= now_s + self._rounding_s:
                    return copy, limit_s
                limit_s = min(limit_s, copy.not_before_s)
        return None, limit_s

    def _commit(self, copy: VirtualCopy, start_s: float, run_s: float) -> None:
        end_s = start_s + run_s
        copy.started = True
        self.free_s = end_s
        self.busy_s += run_s
        if self.busy and self.busy[-1][1] == start_s:
            self.busy[-1] = (self.busy[-1][0], end_s)
        else:
            self.busy.append((start_s, end_s))
        if self.timeline is not None:
            self.timeline.add(Lane.LINK, copy.expert, start_s, end_s, "copy" if copy.urgent else "guess")
        if run_s >= copy.left_s - self._rounding_s:
            self._remove(copy)
            copy.done_s, copy.over, copy.left_s = end_s, True, 0.0
            self.n_bytes += copy.n_bytes
        else:
            copy.left_s -= run_s
            self._left_s[not copy.urgent] -= run_s

    def eta_s(self, copy: VirtualCopy) -> float:
        """When a copy that came last will be done if nothing else comes."""
        before_s = self._left_s[0] if copy.urgent else self._left_s[0] + self._left_s[1]
        return max(self.free_s + before_s, copy.not_before_s + copy.left_s)

    def drained_s(self) -> float:
        """When everything queued will be done."""
        return self.free_s + self._left_s[0] + self._left_s[1]
