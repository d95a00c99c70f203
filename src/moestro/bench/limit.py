"""The hybrid limit of a live run, computed from the hits that its policy really had."""

from __future__ import annotations

from ..planning.contract import Costs, ModelSpec, Outcome, Phase, Step, StepInfo
from ..planning.policies.base import hybrid_limit_s
from ..simulate.virtual import dense_layer_s


class HybridLimit:
    """Listens to a conductor. `seconds`: the least time that the decode steps so far could take with their hits."""

    lookahead = 0

    def __init__(self, spec: ModelSpec, costs: Costs) -> None:
        self._spec, self._costs = spec, costs
        self.seconds = 0.0

    def begin(self, info: StepInfo) -> None:
        if info.phase is Phase.DECODE:
            self.seconds += len(self._spec.layers) * dense_layer_s(self._spec, self._costs, info.tokens)

    def asked(self, step: Step, top_k: int) -> None:
        self._step = step

    def done(self, outcome: Outcome) -> None:
        if outcome.phase is Phase.DECODE:
            self.seconds += hybrid_limit_s(self._spec.layers[outcome.layer], self._step, outcome, self._costs)
