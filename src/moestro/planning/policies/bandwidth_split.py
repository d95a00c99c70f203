"""`bandwidth-split`: one LRU over all layers; of a step's misses a share is copied and kept, the rest run on the CPU.

FreeToken (arXiv 2608.16157): of m misses q* = m B_link / B_host, rounded, are filled over the link while the CPU
computes the others, so that both finish together; B_host is what the RAM gives to both. In a prompt all experts that
have tokens cross the link, which fills the cache. Left out: copying the next layer during this one's prompt, CUDA
graphs, and its live resizing of the cache against the KV cache.

No parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from ..contract import (
    GPU0,
    Bound,
    Costs,
    Decision,
    Expert,
    ModelSpec,
    Move,
    Outcome,
    Phase,
    Placement,
    Step,
    StepInfo,
    View,
)
from .base import BasePolicy, here, sides_s


class BandwidthSplit(BasePolicy):
    """Fill the cache with as many misses as the link carries while the CPU computes the others."""

    name = "bandwidth-split"

    def place(self, spec: ModelSpec, gpu_bytes: int, heat: Mapping[Expert, float]) -> Placement:
        super().place(spec, gpu_bytes, heat)
        self._order: dict[Expert, None] = {}  # oldest first
        return Placement(slots=self.slots)

    def begin(self, info: StepInfo, view: View, costs: Costs) -> tuple[Move, ...]:
        for expert in self.lost(self._order, view):
            del self._order[expert]
        return ()

    def decide(self, step: Step, view: View, costs: Costs) -> Decision:
        layer = step.layer
        hits = here(step, view)
        for expert in hits:
            self._order.pop((layer, expert), None)
            self._order[layer, expert] = None
        misses = sorted((e for e in step.tokens if e not in hits), key=lambda e: -step.tokens[e])
        moves = self._fill(step, misses[: self._count(step, len(misses), costs)], view)
        filled = [move.expert[1] for move in moves]
        return Decision(
            gpu=self.whole(step, hits + filled),
            cpu=self.whole(step, [e for e in misses if e not in filled]),
            moves=tuple(moves),
        )

    def _count(self, step: Step, misses: int, costs: Costs) -> int:
        """q*, whole."""
        if not self.slots or step.phase is Phase.PREFILL:
            return misses if self.slots else 0
        link_gbps, cpu_gbps = costs.link_gbps or 0.0, costs.cpu_beside_link_gbps or costs.cpu_gbps or 0.0
        return round(misses * link_gbps / (link_gbps + cpu_gbps)) if link_gbps else 0

    def _fill(self, step: Step, misses: list[int], view: View) -> list[Move]:
        """Moves into empty slots, then into those of the least recently used, this step's own last."""
        layer, order = step.layer, self._order
        empty, evictable = view.free_slots(GPU0, layer), view.evictable(GPU0, layer)
        free = (e for e in order if not (e[0] == layer and e[1] in step.tokens) and e in evictable)
        unused = iter(list(islice(free, max(0, len(misses) - empty))))
        moves: list[Move] = []
        for expert in misses:
            evict = None
            if empty:
                empty -= 1
            else:
                own = (e for e in order if e[0] == layer and e[1] in step.tokens)
                evict = next(unused, None) or next(own, None) or next(iter(order))  # the last is still on its way
                del order[evict]
            moves.append(Move((layer, expert), evict=evict))
            order.pop((layer, expert), None)
            order[layer, expert] = None
        return moves

    def bound(self, step: Step, done: Outcome, costs: Costs, dense_s: float) -> Bound:
        """Of whole experts, at its own q*."""
        layer = self.spec.layers[step.layer]
        misses = sorted(done.misses, key=lambda e: -step.tokens[e])
        filled = self._count(step, len(misses), costs)
        gpu_s = sum(costs.gpu_s(layer, step.tokens[e]) for e in done.hits)
        return Bound(dense_s + max(gpu_s, sides_s(layer, [step.tokens[e] for e in misses], filled, costs)))
