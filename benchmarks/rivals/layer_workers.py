"""Workers for layers.py: one MoE layer of random weights in our kernels, or its experts in torch's linears.

    python -m benchmarks.rivals.layer_workers moestro 2048 1024 64 8 int4 2

The arguments are engine, D, F, experts, top-k, format and threads. Imports torch only when it serves.
"""

from __future__ import annotations

import sys
from typing import Any

from moestro.bench.worker import Handlers, Worker, serve

OURS, TORCH = "moestro", "torch"


class LayerWorker(Worker):
    """A layer of experts in its own process; `engine` is "moestro" or "torch"."""

    def __init__(
        self, engine: str, hidden: int, neurons: int, *, experts: int, top_k: int, format_name: str, threads: int
    ) -> None:
        numbers = map(str, (hidden, neurons, experts, top_k))
        super().__init__("benchmarks.rivals.layer_workers", [engine, *numbers, format_name, str(threads)])

    def layer_s(self, tokens: int, seed: int) -> float:
        """Seconds of a step of the whole layer, in which each token draws its experts. For "moestro" only."""
        return float(self.ask("layer_s", tokens=tokens, seed=seed))

    def expert_s(self, tokens: int) -> float:
        """Seconds of one expert with so many tokens; experts take turns. In torch without the gate."""
        return float(self.ask("expert_s", tokens=tokens))


def main() -> None:
    """Make the layer that the command line names, then answer questions."""
    engine, *sizes, format_name, threads = sys.argv[1:]
    hidden, neurons, experts, top_k = map(int, sizes)

    def start() -> tuple[dict[str, Any], Handlers]:
        from .layer_engines import OurLayer, TorchExperts

        if engine == OURS:
            ours = OurLayer(hidden, neurons, experts, top_k, format_name, int(threads))
            return ours.card(), {"layer_s": ours.layer_s, "expert_s": ours.expert_s}
        theirs = TorchExperts(hidden, neurons, experts, format_name, int(threads))
        return theirs.card(), {"expert_s": theirs.expert_s}

    serve(start, ours=engine == OURS)


if __name__ == "__main__":
    main()
