"""`lru-speculative`: `lru`, and the next layer's likely experts are copied ahead into staging buffers.

Eliseev and Mazur, arXiv 2312.17238, section 3.2 and 3.3: once this layer's own loads are issued, the next layer's gate
is applied to this layer's hidden states, and its best guesses are loaded into one of b buffers that all layers share.
A guess that comes true takes its place in its layer's LRU order, and the slot of the one that leaves becomes a buffer;
one that does not is forgotten, so wrong guesses never push a cached expert out. Guesses are loaded in decode only.

Parameters: k as in `lru`; prefetch, experts guessed a layer (2, as many as Mixtral uses); staging, b buffers (4).
"""

from __future__ import annotations

from ..contract import GPU0, Bound, Costs, Decision, Move, Outcome, Phase, Step, View
from .base import here
from .lru import Lru


class LruSpeculative(Lru):
    """LRU a layer with next-gate loads."""

    name = "lru-speculative"
    lookahead = 1

    def __init__(self, k: int | None = None, prefetch: int = 2, staging: int = 4) -> None:
        super().__init__(k)
        self.prefetch, self.staging = prefetch, staging

    def decide(self, step: Step, view: View, costs: Costs) -> Decision:
        if not self.k[step.layer]:
            return super().decide(step, view, costs)
        layer = step.layer
        order = self._order[layer]
        staged = [e for e in here(step, view) if e not in order]
        moves, leaving = self._replace(step, view, staged)
        if step.phase is Phase.DECODE:
            filled = sum(view.ready_s(move.expert, GPU0) == float("inf") and move.evict is None for move in moves)
            moves += self._guesses(step, view, view.free_slots(GPU0, layer) + len(leaving) - filled)
        return Decision(gpu=self.whole(step, step.tokens), moves=tuple(moves), drop=tuple(leaving))

    def _guesses(self, step: Step, view: View, empty: int) -> list[Move]:
        following = step.layer + 1
        likely = list(step.guesses.get(following, ()))[: self.prefetch]
        missing = [(following, e) for e in likely if view.ready_s((following, e), GPU0) == float("inf")]
        if not empty or not missing:
            return []
        unfilled = sum(
            k - len(order) for k, order in zip(self.k, self._order, strict=True)
        )  # places of layers, no staging buffers
        return [Move(expert, keep=False, urgent=False) for expert in missing[: max(0, empty - unfilled)]]

    def bound(self, step: Step, done: Outcome, costs: Costs, dense_s: float) -> Bound:
        """What was not guessed in time is waited for: misses, and what had not crossed of guesses that came true."""
        if not self.k[step.layer]:
            return super().bound(step, done, costs, dense_s)
        layer = self.spec.layers[step.layer]
        gpu_s = sum(costs.gpu_s(layer, tokens) for tokens in step.tokens.values())
        link_s = costs.link_s(len(done.misses) * layer.expert_bytes + done.joined_bytes)
        last_s = min((costs.gpu_s(layer, step.tokens[e]) for e in (*done.misses, *done.joined)), default=0.0)
        return Bound(dense_s + max(gpu_s, link_s + last_s), costs.link_s(done.moved_bytes))
