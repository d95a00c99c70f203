"""`layer-split`: whole MoE layers live on the GPU or on the CPU, for good.

llama.cpp's `--n-cpu-moe N` (PR #15077): the experts of the first N layers stay in RAM and run on the
CPU, those of the later layers are on the GPU. N is not asked for: it is the smallest that fits the
GPU's budget. Left out: llama.cpp's copying of CPU experts to the GPU for large batches (PR #15346).
No parameters.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..contract import Bound, Costs, Decision, Expert, ModelSpec, Outcome, Placement, Step, View
from .base import BasePolicy


class LayerSplit(BasePolicy):
    """Hold the last layers' experts on the GPU, as many whole layers as fit."""

    name = "layer-split"

    def place(self, spec: ModelSpec, gpu_bytes: int, heat: Mapping[Expert, float]) -> Placement:
        super().place(spec, gpu_bytes, heat)
        first, free = len(spec.layers), self.slots
        while first > 0 and spec.layers[first - 1].experts <= free:
            first -= 1
            free -= spec.layers[first].experts
        self.first_gpu_layer = first
        held = ((i, e) for i in range(first, len(spec.layers)) for e in range(spec.layers[i].experts))
        return Placement(held=frozenset(held))

    def decide(self, step: Step, view: View, costs: Costs) -> Decision:
        shares = self.whole(step, step.tokens)
        return Decision(gpu=shares) if step.layer >= self.first_gpu_layer else Decision(cpu=shares)

    def bound(self, step: Step, done: Outcome, costs: Costs, dense_s: float) -> Bound:
        layer = self.spec.layers[step.layer]
        cost = costs.gpu_s if step.layer >= self.first_gpu_layer else costs.cpu_s
        return Bound(dense_s + sum(cost(layer, tokens) for tokens in step.tokens.values()))
