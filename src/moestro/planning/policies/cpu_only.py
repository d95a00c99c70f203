"""`cpu-only`: every expert is computed where its weights are, in RAM.

The baseline that needs no link: what llama.cpp's `--cpu-moe` does. The dense part of the model is on
the GPU where there is one; only activations cross. No parameters.
"""

from __future__ import annotations

from ..contract import Bound, Costs, Outcome, Step
from .base import BasePolicy


class CpuOnly(BasePolicy):
    """Run all experts on the CPU; move nothing."""

    name = "cpu-only"

    def bound(self, step: Step, done: Outcome, costs: Costs, dense_s: float) -> Bound:
        layer = self.spec.layers[step.layer]
        return Bound(dense_s + sum(costs.cpu_s(layer, tokens) for tokens in step.tokens.values()))
