"""What a conductor counts of its work, and who may listen to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..planning.contract import Outcome, Phase, Step


@dataclass(slots=True)
class Counters:
    """What was done so far. Hits, joins and misses count (expert, step) pairs of decode.

    cpu_s: the CPU computed experts. waited_s: the host waited for copies and launches; for the device see
    `Device.waited_s`.
    """

    layer_steps: int = 0
    tokens: int = 0  # summed over layer steps
    hits: int = 0
    joined: int = 0
    misses: int = 0
    moved_bytes: int = 0
    cpu_s: float = 0.0
    waited_s: float = 0.0

    def add(
        self, phase: Phase, *, layer_steps: int = 0, tokens: int = 0, hits: int = 0, joined: int = 0, misses: int = 0
    ) -> None:
        """Account for layer steps, however they were computed; hits, joins and misses count in decode alone."""
        self.layer_steps += layer_steps
        self.tokens += tokens
        if phase is Phase.DECODE:
            self.hits += hits
            self.joined += joined
            self.misses += misses


class Recorder(Protocol):
    """Listens to what the routers choose; text/tracing.py has one."""

    lookahead: int  # for how many later layers it wants guesses

    def begin(self, tokens: int, phase: Phase) -> None:
        """A step begins."""

    def record(self, step: Step, top_k: int) -> None:
        """One layer of it is to be done, for a router that gives each token so many experts."""

    def done(self, outcome: Outcome) -> None:
        """What that layer step did."""
