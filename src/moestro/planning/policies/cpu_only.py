"""`cpu-only`: every expert is computed where its weights are, in RAM.

The baseline that needs no link: what llama.cpp's `--cpu-moe` does. The dense part of the model is on
the GPU where there is one; only activations cross. No parameters.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..contract import Costs, Decision, Expert, ModelSpec, Move, Outcome, Placement, Step, View


class CpuOnly:
    """Run all experts on the CPU; move nothing."""

    name = "cpu-only"

    def place(self, spec: ModelSpec, gpu_bytes: int, heat: Mapping[Expert, float]) -> Placement:
        self._neurons = [layer.neurons for layer in spec.layers]
        return Placement()

    def begin(self, tokens: int, view: View, costs: Costs) -> tuple[Move, ...]:
        return ()

    def decide(self, step: Step, view: View, costs: Costs) -> Decision:
        return Decision(cpu={expert: range(self._neurons[step.layer]) for expert in step.tokens})

    def observe(self, done: Outcome) -> None:
        pass
