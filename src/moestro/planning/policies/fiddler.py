"""`fiddler`: popular experts live on the GPU for good; each absent one is copied or run on the CPU, by a latency model.

Kamahori et al., arXiv 2402.07033, sections 3.2 to 3.4. Placement by a profile of how often each expert is used. For
each step the copies cost the same and the CPU's time grows with an expert's tokens, so if m experts are copied they are
those with the most tokens: the m that minimises the slower of the two sides is found by trying each, not all 2^E
choices. (Their public code minimises the sum and runs GPU and CPU one after the other.) The CPU's time is the slower of
reading and multiplying, where the paper has a line through zero. Left out: their beam search.

Parameters: staging, slots that copies pass through (2).
"""

from __future__ import annotations

from collections.abc import Mapping

from ..contract import GPU0, Bound, Costs, Decision, Expert, ModelSpec, Outcome, Placement, Step, View
from .base import BasePolicy, best_copies, here, hottest, through_ring, whole_experts_limit_s


class Fiddler(BasePolicy):
    """Hold the popular experts; copy or compute the others."""

    name = "fiddler"

    def __init__(self, staging: int = 2) -> None:
        self.staging = staging

    def place(self, spec: ModelSpec, gpu_bytes: int, heat: Mapping[Expert, float]) -> Placement:
        super().place(spec, gpu_bytes, heat)
        experts = sum(layer.experts for layer in spec.layers)
        staging = 0 if self.slots == experts else min(self.staging, self.slots)
        return Placement(held=frozenset(hottest(spec, heat, self.slots - staging)), slots=staging)

    def decide(self, step: Step, view: View, costs: Costs) -> Decision:
        hits = here(step, view)
        misses = sorted((e for e in step.tokens if e not in hits), key=lambda e: -step.tokens[e])
        room = view.free_slots(GPU0, step.layer)
        tokens = tuple(step.tokens[e] for e in misses)
        copied = best_copies(self.spec.layers[step.layer], tokens, costs) if room else 0
        return Decision(
            gpu=self.whole(step, hits + misses[:copied]),
            cpu=self.whole(step, misses[copied:]),
            moves=through_ring(step, misses[:copied], room),
        )

    def bound(self, step: Step, done: Outcome, costs: Costs, dense_s: float) -> Bound:
        return Bound(dense_s + whole_experts_limit_s(self.spec.layers[step.layer], step, done, costs))
