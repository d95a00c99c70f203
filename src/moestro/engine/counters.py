"""What a conductor counts of its work, and what may listen to it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from ..devices import Device
from ..planning.contract import Outcome, Phase, Step, StepInfo


@dataclass(slots=True)
class Counters:
    """What was done so far. Hits, joins and misses count (expert, step) pairs of decode.

    cpu_s: seconds in which the CPU computed experts. waited_s: in which the host waited for copies and launches; for
    the device see `Device.waited_s`.
    """

    layer_steps: int = 0
    tokens: int = 0  # summed over layer steps
    hits: int = 0
    joined: int = 0
    misses: int = 0
    moved_bytes: int = 0
    cpu_s: float = 0.0
    waited_s: float = 0.0


_SHOWN_EVERY = 40  # steps: one that is shown takes a quarter longer, which is to stay below 1 % in all


class RoutingCounts:
    """How many tokens the routers gave each expert, counted for what looks at a running model.

    Layers that are computed in one call (decode/cpu/stretch.py) show no choices. While these are counted, such layers
    are computed one by one in one of 40 steps, so that their counts are those of a part of the steps. What layers
    choose whose experts are all held on a GPU is never seen here.

    tokens: for each expert of each layer, layer by layer. They only grow, so another thread may read them.

    Args:
        experts: of each MoE layer.
    """

    def __init__(self, experts: Sequence[int]) -> None:
        self.tokens = [0] * sum(experts)
        self._firsts = [0, *accumulate(experts)]
        self._calls: dict[Hashable, int] = {}

    def add(self, step: Step) -> None:
        """Count the choices of a layer step."""
        first, tokens = self._firsts[step.layer], self.tokens
        for expert, count in step.tokens.items():
            tokens[first + expert] += count

    def is_due(self, key: Hashable) -> bool:
        """Whether layers that would be computed in one call are to be shown this time.

        Args:
            key: which layers.
        """
        calls = self._calls.get(key, 0)
        self._calls[key] = calls + 1
        return calls % _SHOWN_EVERY == 0


class Accounts:
    """Where every layer step is accounted for, however it was computed.

    routing: counts what the routers choose, while there is one.

    Layers that are held on the device choose experts that the host never sees. They are counted there, in a tensor of
    each phase and stream, so that no two streams add to one; reading the counters waits for the device.
    """

    def __init__(self, device: Device) -> None:
        self.counters = Counters()
        self.routing: RoutingCounts | None = None
        self._device = device
        self._chosen: dict[tuple[Phase, int], Tensor] = {}
        self._known: dict[tuple[Phase, int], tuple[int, int]] = {}  # how much of these is in the counters

    def add(
        self, phase: Phase, layer_steps: int = 0, tokens: int = 0, hits: int = 0, joined: int = 0, misses: int = 0
    ) -> None:
        """Account for layer steps; hits, joins and misses count in decode alone."""
        counters = self.counters
        counters.layer_steps += layer_steps
        counters.tokens += tokens
        if phase is Phase.DECODE:
            counters.hits += hits
            counters.joined += joined
            counters.misses += misses

    def wants_shown(self, key: Hashable) -> bool:
        """Whether layers that would be computed in one call are to be computed one by one, see `RoutingCounts`."""
        return self.routing is not None and self.routing.is_due(key)

    @property
    def are_on_device(self) -> bool:
        """Whether the device counts too, so that `total` waits for it."""
        return bool(self._chosen)

    def chosen(self, info: StepInfo) -> Tensor:
        """Where held layers of such a step count what they choose: int64 [2], as `new_counts` makes it."""
        key = info.phase, info.stream
        if key not in self._chosen:
            self._chosen[key] = new_counts(self._device.torch_device)
        return self._chosen[key]

    def total(self) -> Counters:
        """The counters, with what the device has counted since the last time."""
        if self._chosen:
            self._device.finish()
        for key, chosen in self._chosen.items():
            choices, experts = chosen.tolist()
            known_choices, known_experts = self._known.get(key, (0, 0))
            self._known[key] = choices, experts
            self.add(key[0], tokens=choices - known_choices, hits=experts - known_experts)
        return self.counters


def new_counts(device: torch.device) -> Tensor:
    """Zeros for held layers to count in: int64 [2], choices (token, expert), and experts that a step chose."""
    with torch.inference_mode(False):  # steps outside of it write to it as well
        return torch.zeros(2, dtype=torch.int64, device=device)


class Listener(Protocol):
    """What hears each layer step of a conductor; text/tracing.py has one."""

    lookahead: int  # for how many later layers it wants guesses

    def begin(self, info: StepInfo) -> None:
        """A step begins."""

    def asked(self, step: Step, top_k: int) -> None:
        """One layer of it is to be done, for a router that gives each token so many experts."""

    def done(self, outcome: Outcome) -> None:
        """What that layer step did."""
