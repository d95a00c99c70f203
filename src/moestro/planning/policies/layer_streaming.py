"""`layer-streaming`: all experts of each layer cross the link in every step, double-buffered; the GPU computes all.

DeepSpeed's ZeRO-Inference (Aminabadi et al., arXiv 2207.00032, section 6; MII): while the GPU computes a layer, the
next one's weights are copied, whether tokens chose them or not. Here the dense part stays on the GPU, since it fits,
and only experts stream. Where two layers do not fit, the next layer's experts take the slots of this one's as they
are computed; where one layer does not fit, what is missing of it is copied within its own step. Left out: partitioning
over several GPUs and the reading of weights from NVMe. No parameters.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..contract import GPU0, Bound, Costs, Decision, Expert, ModelSpec, Move, Outcome, Placement, Step, StepInfo, View
from .base import BasePolicy


class LayerStreaming(BasePolicy):
    """Copy every layer whole, one ahead of the one that computes."""

    name = "layer-streaming"

    def place(self, spec: ModelSpec, gpu_bytes: int, heat: Mapping[Expert, float]) -> Placement:
        super().place(spec, gpu_bytes, heat)
        self.slots = min(self.slots, 2 * max(layer.experts for layer in spec.layers))
        self._loaded: dict[Expert, None] = {}  # in the order in which they came
        return Placement(slots=self.slots)

    def begin(self, info: StepInfo, view: View, costs: Costs) -> tuple[Move, ...]:
        for expert in self.lost(self._loaded, view):
            del self._loaded[expert]
        return () if self._loaded else tuple(self._moves(self._layer(0), view.free_slots(GPU0, 0), [], False))

    def decide(self, step: Step, view: View, costs: Costs) -> Decision:
        if not self.slots:
            return Decision(cpu=self.whole(step, step.tokens))
        layer, loaded = step.layer, self._loaded
        following = (layer + 1) % len(self.spec.layers)
        active = [(layer, e) for e in step.tokens]
        missing = [e for e in active if e not in loaded or view.ready_s(e, GPU0) == float("inf")]
        victims = [e for e in loaded if e[0] not in (layer, following)]  # if in flight, the next copy waits for it
        victims += [e for e in loaded if e[0] == layer and e[1] not in step.tokens]
        victims += [e for e in active if e in loaded]  # once they were computed
        empty = view.free_slots(GPU0, layer)
        # After an interrupt all slots may be the next layer's.
        others = [e for e in loaded if e[0] == following != layer] if missing else []
        needed = len(missing) - empty - len(victims)
        victims = victims + others[: max(0, needed)]
        moves = self._moves(missing, empty, victims, True)
        ahead = [e for e in self._layer(following) if e not in loaded]
        taken = len(moves)
        if len(self.spec.layers) > 1:
            moves += self._moves(ahead, max(0, empty - taken), victims, False)
        return Decision(gpu=self.whole(step, step.tokens), moves=tuple(moves))

    def _moves(self, experts: list[Expert], empty: int, victims: list[Expert], urgent: bool) -> list[Move]:
        """Moves of experts into empty slots, then into those of the victims, which are used up."""
        moves: list[Move] = []
        for expert in experts:
            if empty:
                empty -= 1
                victim = None
            elif victims:
                victim = victims.pop(0)
                self._loaded.pop(victim, None)
            else:
                break
            moves.append(Move(expert, evict=victim, urgent=urgent))
            self._loaded[expert] = None
            if urgent:
                victims.append(expert)  # of this step: it leaves again when it was computed
        return moves

    def _layer(self, layer: int) -> list[Expert]:
        return [(layer, e) for e in range(self.spec.layers[layer].experts)]

    def bound(self, step: Step, done: Outcome, costs: Costs, dense_s: float) -> Bound:
        layer = self.spec.layers[step.layer]
        if not self.slots:
            return super().bound(step, done, costs, dense_s)
        gpu_s = sum(costs.gpu_s(layer, tokens) for tokens in step.tokens.values())
        return Bound(dense_s + gpu_s, costs.link_s(layer.experts * layer.expert_bytes))
