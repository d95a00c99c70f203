"""The clock that a conductor works by: the wall's, or one that models a machine (`simulate/virtual.py`)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from .contract import Expert, Lane
from .costs import Costs
from .slots import Transfer
from .timeline import Timeline


class Share(NamedTuple):
    """Some neurons of one expert, to be computed for so many tokens."""

    expert: Expert
    tokens: int
    neurons: int


class Traced(Protocol):
    """Lanes that can note what they do."""

    def trace(self, timeline: Timeline | None) -> None:
        """Note on a timeline what the lanes do from now on; None to stop, which fills it in."""


class Clock(Protocol):
    """Time, and what is queued on the lanes; told what is done so that a virtual one can charge for it.

    is_virtual: it models the lanes, so that it must be told what they compute; the wall need not be.
    """

    is_virtual: bool

    def lanes_of(self, device: Traced) -> Traced:
        """The lanes that a timeline shows: the device's own, or those that the clock models."""

    @property
    def now_s(self) -> float:
        """The time; its zero means nothing."""

    def lane_free_s(self, lane: Lane) -> float:
        """When `lane` will have done what is queued on it."""

    def arrival_s(self, copy: Transfer, urgent: bool) -> float:
        """When a copy that was queued just now is expected to be done."""

    def left_s(self, copy: Transfer) -> float:
        """The least that a copy in flight still takes, in seconds; 0 where that is not known."""

    def in_ram_s(self, expert: Expert) -> float:
        """When an expert that has a home in RAM can be read there: it may be on the disk."""

    def begin_layer(self, layer: int, tokens: int) -> None:
        """A layer step of that many tokens has come to its experts: its dense part is over."""

    def copy(
        self, expert: Expert, n_bytes: int, urgent: bool, after_s: float, before: Transfer | None, real: Transfer
    ) -> Transfer:
        """A copy was queued, to begin at `after_s` or later and behind `before`; returns what stands for it here."""

    def run_gpu(self, shares: Sequence[Share], after: Transfer | None) -> float:
        """Experts were queued on the GPU, behind a copy that they need; returns when they will be done."""

    def run_cpu(self, shares: Sequence[Share]) -> None:
        """The CPU computed these beside the GPU, whose work was told before."""

    def end_layer(self) -> None:
        """All parts of the layer step are there."""


class HasQueue(Protocol):
    """A real link, as its clock needs to see it."""

    def queued_bytes(self, *, urgent: bool = False) -> int:
        """What has not crossed yet of the copies that were queued; with `urgent`, of urgent ones alone."""


class WallClock:
    """Real time. What the link will do is reckoned from its queue and its rate; without one all counts as done.

    Args:
        link: None where nothing is ever copied.
    """

    is_virtual = False

    def __init__(self, costs: Costs, link: HasQueue | None = None) -> None:
        self._costs, self._link = costs, link

    def lanes_of(self, device: Traced) -> Traced:
        return device

    @property
    def now_s(self) -> float:
        return time.perf_counter()

    def lane_free_s(self, lane: Lane) -> float:
        return self.now_s + (self._queue_s() if lane is Lane.LINK else 0.0)

    def arrival_s(self, copy: Transfer, urgent: bool) -> float:
        return self.now_s + self._queue_s(urgent=urgent)

    def _queue_s(self, *, urgent: bool = False) -> float:
        if self._link is None or not self._costs.link_gbps:
            return 0.0
        return self._costs.link_s(self._link.queued_bytes(urgent=urgent))

    def left_s(self, copy: Transfer) -> float:
        return self._costs.link_s(copy.left_bytes()) if self._costs.link_gbps else 0.0

    def in_ram_s(self, expert: Expert) -> float:
        return 0.0

    def begin_layer(self, layer: int, tokens: int) -> None:
        pass

    def copy(
        self, expert: Expert, n_bytes: int, urgent: bool, after_s: float, before: Transfer | None, real: Transfer
    ) -> Transfer:
        return real

    def run_gpu(self, shares: Sequence[Share], after: Transfer | None) -> float:
        return 0.0

    def run_cpu(self, shares: Sequence[Share]) -> None:
        pass

    def end_layer(self) -> None:
        pass
