"""`bandwidth-split`: one LRU over all layers; of a step's misses a share is copied and kept, the rest run on the CPU.

FreeToken (arXiv 2608.16157): of m misses q* = m B_link / B_host, rounded, are filled over the link while the CPU
computes the others, so that both finish together; B_host is what the RAM gives to both. In a prompt the same rule uses
each side's time, tokens included. Left out: whole layers double-buffered in a prompt, CUDA graphs, and its live
resizing of the cache against the KV cache.

No parameters.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..contract import GPU0, Bound, Costs, Decision, Expert, ModelSpec, Move, Outcome, Phase, Placement, Step, View
from .base import BasePolicy, here, sides_s


class BandwidthSplit(BasePolicy):
    """Fill the cache with as many misses as the link carries while the CPU computes the others."""

    name = "bandwidth-split"

    def place(self, spec: ModelSpec, gpu_bytes: int, heat: Mapping[Expert, float]) -> Placement:
        super().place(spec, gpu_bytes, heat)
        self._order: dict[Expert, None] = {}  # oldest first
        return Placement(slots=self.slots)

    def decide(self, step: Step, view: View, costs: Costs) -> Decision:
        layer = step.layer
        hits = here(step, view)
        for expert in hits:
            self._order.pop((layer, expert), None)
            self._order[layer, expert] = None
        misses = sorted((e for e in step.tokens if e not in hits), key=lambda e: -step.tokens[e])
        moves = self._fill(step, misses, view, self._count(step, misses, costs))
        filled = [move.expert[1] for move in moves]
        return Decision(
            gpu=self.whole(step, hits + filled),
            cpu=self.whole(step, [e for e in misses if e not in filled]),
            moves=tuple(moves),
        )

    def _count(self, step: Step, misses: list[int], costs: Costs) -> int:
        """q*, whole."""
        layer, tokens = self.spec.layers[step.layer], [step.tokens[e] for e in misses]
        if step.phase is Phase.PREFILL:
            return min(range(len(misses) + 1), key=lambda q: sides_s(layer, tokens, q, costs))
        link_gbps, cpu_gbps = costs.link_gbps or 0.0, costs.cpu_beside_link_gbps or costs.cpu_gbps or 0.0
        return round(len(misses) * link_gbps / (link_gbps + cpu_gbps)) if link_gbps else 0

    def _fill(self, step: Step, misses: list[int], view: View, count: int) -> list[Move]:
        """Moves into empty slots, then into those of the least recently used."""
        layer, order = step.layer, self._order
        empty, evictable = view.free_slots(GPU0, layer), view.evictable(GPU0, layer)
        victims = iter([e for e in order if not (e[0] == layer and e[1] in step.tokens)]) if empty < count else iter(())
        moves: list[Move] = []
        for expert in misses[:count]:
            evict = None
            if empty:
                empty -= 1
            else:
                evict = next((e for e in victims if e in evictable), None)
                if evict is None:
                    break
                del order[evict]
            moves.append(Move((layer, expert), evict=evict))
            order[layer, expert] = None
        return moves

    def bound(self, step: Step, done: Outcome, costs: Costs, dense_s: float) -> Bound:
        """Of whole experts, at its own q*."""
        layer = self.spec.layers[step.layer]
        misses = sorted(done.misses, key=lambda e: -step.tokens[e])
        filled = min(self._count(step, misses, costs), self.slots)
        gpu_s = sum(costs.gpu_s(layer, step.tokens[e]) for e in done.hits)
        return Bound(dense_s + max(gpu_s, sides_s(layer, [step.tokens[e] for e in misses], filled, costs)))
