"""What policies share: the defaults of a policy that moves nothing, and arithmetic on a step.

A policy of one's own derives from `BasePolicy` and writes `place` and `decide`; docs/policies.md shows one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from ..contract import (
    GPU0,
    Bound,
    Costs,
    Decision,
    Expert,
    LayerSpec,
    ModelSpec,
    Move,
    Outcome,
    Placement,
    Step,
    StepInfo,
    View,
)


class BasePolicy:
    """Holds nothing, moves nothing, computes all experts on the CPU.

    After `place` a policy has `spec`, the model's, and `slots`, how many experts it may have on the GPU in all.
    """

    name = "base"
    lookahead = 0

    spec: ModelSpec
    slots: int
    _failures = 0  # that its books know of

    def place(self, spec: ModelSpec, gpu_bytes: int, heat: Mapping[Expert, float]) -> Placement:
        self.spec, self.slots = spec, count_slots(spec, gpu_bytes)
        return Placement()

    def begin(self, info: StepInfo, view: View, costs: Costs) -> tuple[Move, ...]:
        return ()

    def decide(self, step: Step, view: View, costs: Costs) -> Decision:
        return Decision(cpu=self.whole(step, step.tokens))

    def observe(self, done: Outcome) -> None:
        pass

    def bound(self, step: Step, done: Outcome, costs: Costs, dense_s: float) -> Bound:
        """The hybrid limit, unless a method has its own."""
        return Bound(dense_s + hybrid_limit_s(self.spec.layers[step.layer], step, done, costs))

    def lost(self, experts: Iterable[Expert], view: View) -> list[Expert]:
        """Of experts that a policy has down as on the GPU or on their way, those that a failure has taken; asked once
        before each step."""
        if view.failures == self._failures:
            return []
        self._failures = view.failures
        return [expert for expert in experts if view.ready_s(expert, GPU0) == float("inf")]

    def whole(self, step: Step, experts: Iterable[int]) -> dict[int, range]:
        """All neurons of some experts of a step."""
        return dict.fromkeys(experts, range(self.spec.layers[step.layer].neurons))


def count_slots(spec: ModelSpec, gpu_bytes: int) -> int:
    """How many experts fit in so many bytes; no more than the model has."""
    experts = sum(layer.experts for layer in spec.layers)
    return min(gpu_bytes // spec.slot_bytes, experts) if spec.slot_bytes else 0


def hottest(spec: ModelSpec, heat: Mapping[Expert, float], count: int) -> list[Expert]:
    """The experts that are used most; without a profile the first of each layer, layers in turn."""
    experts = [(layer, e) for layer, of in enumerate(spec.layers) for e in range(of.experts)]
    return sorted(experts, key=lambda key: (-heat.get(key, 0.0), key[1], key[0]))[:count]


def here(step: Step, view: View) -> list[int]:
    """Active experts that are on the GPU or on their way there."""
    layer = step.layer
    return [expert for expert in step.tokens if view.ready_s((layer, expert), GPU0) < float("inf")]


def through_ring(step: Step, experts: Iterable[int], slots: int) -> tuple[Move, ...]:
    """Moves of experts through so many empty slots: each next one into the slot of the one that was computed first."""
    moves: list[Move] = []
    for i, expert in enumerate(experts):
        evict = moves[i - slots].expert if i >= slots else None
        moves.append(Move((step.layer, expert), evict=evict, keep=False))
    return tuple(moves)


def hybrid_limit_s(layer: LayerSpec, step: Step, done: Outcome, costs: Costs) -> float:
    """The least time of a step's experts, however they are spread: hits on the GPU, misses on CPU and link at once.

    Where bytes bind, the misses pass at the rate of both together; in general those with the most tokens cross the link
    and one is divided (the optimum of dividing each at will). What was joined counts nothing: it may have crossed.
    """
    gpu_s = sum(costs.gpu_s(layer, step.tokens[e]) for e in done.hits)
    tokens = tuple(sorted((step.tokens[e] for e in done.misses), reverse=True))
    return max(gpu_s, _divided_s(layer, tokens, costs)) if tokens else gpu_s


@lru_cache(maxsize=4096)
def _divided_s(layer: LayerSpec, tokens: tuple[int, ...], costs: Costs) -> float:
    copy_s = costs.link_s(layer.expert_bytes)
    alone_s = [costs.cpu_s(layer, n) for n in tokens]
    if copy_s == float("inf"):
        return sum(alone_s)
    beside_s = [costs.cpu_s(layer, n, beside_link=True) for n in tokens]
    best_s = sum(alone_s)
    for copied in range(len(tokens) + 1):
        link_s, rest_s = copied * copy_s, sum(beside_s[copied:])
        if rest_s <= link_s:  # both ended together before this one had crossed whole
            return min(best_s, link_s)
        best_s = min(best_s, _cpu_s(layer, tokens[copied:], link_s, costs))
        share = (rest_s - link_s) / (copy_s + beside_s[copied])  # of the next, so that both end together
        if share <= 1:
            best_s = min(best_s, link_s + share * copy_s)
    return best_s


def whole_experts_limit_s(layer: LayerSpec, step: Step, done: Outcome, costs: Costs) -> float:
    """The hybrid limit where an expert is computed in one place: the best number of misses is copied."""
    gpu_s = sum(costs.gpu_s(layer, step.tokens[e]) for e in done.hits)
    tokens = tuple(sorted((step.tokens[e] for e in done.misses), reverse=True))
    return max(gpu_s, sides_s(layer, tokens, best_copies(layer, tokens, costs), costs))


def best_copies(layer: LayerSpec, tokens: tuple[int, ...], costs: Costs, link_s: float = 0.0) -> int:
    """How many of these misses (tokens of each, the most first) to copy so that both sides are done soonest."""
    if link_s:
        return min(range(len(tokens) + 1), key=lambda copied: sides_s(layer, tokens, copied, costs, link_s))
    return _best_copies(layer, tokens, costs)


@lru_cache(maxsize=4096)
def _best_copies(layer: LayerSpec, tokens: tuple[int, ...], costs: Costs) -> int:
    return min(range(len(tokens) + 1), key=lambda copied: sides_s(layer, tokens, copied, costs))


def sides_s(layer: LayerSpec, tokens: Sequence[int], copied: int, costs: Costs, link_s: float = 0.0) -> float:
    """When both sides are done if the first `copied` of these misses cross the link and the CPU computes the others.

    Args:
        link_s: until the link is free.
    """
    link_s += copied * costs.link_s(layer.expert_bytes) if copied else 0.0
    cpu_s = _cpu_s(layer, tokens[copied:], link_s, costs)
    return max(cpu_s, link_s + costs.gpu_s(layer, tokens[copied - 1]) if copied else 0.0)


def _cpu_s(layer: LayerSpec, tokens: Sequence[int], link_s: float, costs: Costs) -> float:
    """When the CPU is done with these experts, the most tokens first, if the link copies until `link_s`."""
    at_s = 0.0
    for n in tokens:
        alone_s = costs.cpu_s(layer, n)
        if at_s >= link_s:
            at_s += alone_s
            continue
        beside_s = costs.cpu_s(layer, n, beside_link=True)
        at_s = at_s + beside_s if at_s + beside_s <= link_s else link_s + (1 - (link_s - at_s) / beside_s) * alone_s
    return at_s
