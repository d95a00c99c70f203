"""`lru`: k slots a layer, the least recently used expert leaves; every miss is copied, and the GPU computes all.

Eliseev and Mazur, arXiv 2312.17238, section 3.1, without speculative loading: experts of a layer share k slots, a
miss waits for its copy. Weights never change, so nothing is copied back (their public code does). Prompts go through
the same slots: an expert leaves as soon as it was computed. With fewer slots than layers nothing is kept: each expert
is copied for its step alone. Left out: their mixed quantization (see --bits).

Parameters: k, slots a layer; None for as many as fit, the first layers one more where they do not divide evenly.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..contract import GPU0, Bound, Costs, Decision, Expert, ModelSpec, Move, Outcome, Placement, Step, StepInfo, View
from .base import BasePolicy, through_ring


class Lru(BasePolicy):
    """Copy every miss into a slot of its layer."""

    name = "lru"
    staging = 0  # slots that are no layer's

    def __init__(self, k: int | None = None) -> None:
        self._asked_k = k

    def place(self, spec: ModelSpec, gpu_bytes: int, heat: Mapping[Expert, float]) -> Placement:
        super().place(spec, gpu_bytes, heat)
        each, more = divmod(max(0, self.slots - self.staging), len(spec.layers))
        self.k = [
            min(layer.experts, each + (i < more) if self._asked_k is None else min(each, self._asked_k))
            for i, layer in enumerate(spec.layers)
        ]
        if each == 0:  # fewer slots than layers: nothing is kept
            self.k = [0] * len(spec.layers)
        else:
            self.slots = min(self.slots, sum(self.k) + self.staging)
        self._order: list[dict[int, None]] = [{} for _ in spec.layers]  # experts of each layer, oldest first
        return Placement(slots=self.slots)

    def begin(self, info: StepInfo, view: View, costs: Costs) -> tuple[Move, ...]:
        cached = ((layer, e) for layer, order in enumerate(self._order) for e in order)
        for layer, expert in self.lost(cached, view):
            del self._order[layer][expert]
        return ()

    def decide(self, step: Step, view: View, costs: Costs) -> Decision:
        if not self.slots:
            return Decision(cpu=self.whole(step, step.tokens))
        gpu = self.whole(step, step.tokens)
        if not self.k[step.layer]:
            missing = [e for e in step.tokens if view.ready_s((step.layer, e), GPU0) == float("inf")]
            room = view.free_slots(GPU0, step.layer)
            if not room:  # what was borrowed before is still coming
                there = [e for e in step.tokens if e not in missing]
                return Decision(gpu=self.whole(step, there), cpu=self.whole(step, missing))
            return Decision(gpu=gpu, moves=through_ring(step, missing, room))
        moves, _ = self._replace(step, view, [])
        return Decision(gpu=gpu, moves=tuple(moves))

    def _replace(self, step: Step, view: View, staged: list[int]) -> tuple[list[Move], list[Expert]]:
        """Moves that bring a step's misses, and experts that leave for staged ones, which take a place of the layer."""
        layer = step.layer
        order, k = self._order[layer], self.k[layer]
        active = step.tokens
        hits = [e for e in order if e in active]
        victims = [e for e in order if e not in active]
        for expert in hits:
            del order[expert]
            order[expert] = None
        moves: list[Move] = []
        leaving: list[Expert] = []
        for expert in staged:
            if len(order) >= k:
                if not victims:  # all its layer's experts are in use: it stays borrowed
                    moves.append(Move((layer, expert), keep=False))
                    continue
                leaving.append((layer, victims.pop(0)))
                del order[leaving[-1][1]]
            moves.append(Move((layer, expert)))
            order[expert] = None
        for expert in active:
            if expert in hits or expert in staged:
                continue
            evict = None
            if len(order) >= k:
                evict = victims.pop(0) if victims else next(iter(order))  # of this step, once it was computed
                del order[evict]
            moves.append(Move((layer, expert), evict=None if evict is None else (layer, evict)))
            order[expert] = None
        return moves, leaving

    def bound(self, step: Step, done: Outcome, costs: Costs, dense_s: float) -> Bound:
        layer = self.spec.layers[step.layer]
        if not self.slots:
            return super().bound(step, done, costs, dense_s)
        gpu_s = sum(costs.gpu_s(layer, step.tokens[e]) for e in (*done.hits, *done.joined))
        if not done.misses:
            return Bound(dense_s + gpu_s)
        last_s = min(costs.gpu_s(layer, step.tokens[e]) for e in done.misses)
        return Bound(dense_s + max(gpu_s, len(done.misses) * costs.link_s(layer.expert_bytes)) + last_s)
