"""`layer-split`: whole MoE layers live on the GPU or on the CPU, for good.

llama.cpp's `--n-cpu-moe N` (PR #15077): the experts of the first N layers stay in RAM and run on the
CPU, those of the later layers are on the GPU. N is not asked for: it is the smallest that fits the
GPU's budget. Left out: llama.cpp's copying of CPU experts to the GPU for large batches (PR #15346).
No parameters.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..contract import Costs, Decision, Expert, ModelSpec, Move, Outcome, Placement, Step, View


class LayerSplit:
    """Hold the last layers' experts on the GPU, as many whole layers as fit."""

    name = "layer-split"

    def place(self, spec: ModelSpec, gpu_bytes: int, heat: Mapping[Expert, float]) -> Placement:
        self._neurons = [layer.neurons for layer in spec.layers]
        first, free_bytes = len(spec.layers), gpu_bytes
        while first > 0:
            free_bytes -= spec.layers[first - 1].experts * spec.slot_bytes
            if free_bytes < 0:
                break
            first -= 1
        self.first_gpu_layer = first
        held = ((i, e) for i in range(first, len(spec.layers)) for e in range(spec.layers[i].experts))
        return Placement(held=frozenset(held))

    def begin(self, tokens: int, view: View, costs: Costs) -> tuple[Move, ...]:
        return ()

    def decide(self, step: Step, view: View, costs: Costs) -> Decision:
        shares = {expert: range(self._neurons[step.layer]) for expert in step.tokens}
        return Decision(gpu=shares) if step.layer >= self.first_gpu_layer else Decision(cpu=shares)

    def observe(self, done: Outcome) -> None:
        pass
