"""Workers for layers.py: one MoE layer of random weights in our kernels, or its experts in torch's linears.

    python -m moestro.bench.layer_workers moestro 2048 1024 64 8 int4 2

The arguments are engine, D, F, experts, top-k, format and threads. What goes into a step is drawn here for all
engines: the same seed gives kt-kernel the same hidden states and routes. Imports torch only when it serves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .rival import Handlers, Worker, serve

OURS, TORCH = "moestro", "torch"
FORWARDS = 5  # that an answer is the median of


class LayerWorker(Worker):
    """A layer of experts in its own process; `engine` is "moestro" or "torch"."""

    def __init__(
        self, engine: str, hidden: int, neurons: int, *, experts: int, top_k: int, format_name: str, threads: int
    ) -> None:
        numbers = map(str, (hidden, neurons, experts, top_k))
        super().__init__("moestro.bench.layer_workers", [engine, *numbers, format_name, str(threads)])

    def layer_s(self, tokens: int, seed: int) -> float:
        """Seconds of a step of the whole layer, each token with experts of its own. Ours only."""
        return float(self.ask("layer_s", tokens=tokens, seed=seed))

    def expert_s(self, tokens: int) -> float:
        """Seconds of one expert with so many tokens, another expert each time. torch's is without the gate."""
        return float(self.ask("expert_s", tokens=tokens))


@dataclass(frozen=True, slots=True)
class Draw:
    """What goes into one step. routes: [T, K], distinct in a row. hidden: bfloat16 [T, D], as integers."""

    routes: NDArray[np.int64]
    hidden: NDArray[np.uint16]


def draw_steps(tokens: int, hidden: int, experts: int, top_k: int, seed: int) -> list[Draw]:
    """For one answer: each token draws its experts evenly at random, anew in each step."""
    generator = np.random.default_rng(seed)

    def draw() -> Draw:
        routes = np.argsort(generator.random((tokens, experts)), axis=1)[:, :top_k]
        x = generator.standard_normal((tokens, hidden), dtype=np.float32)
        return Draw(np.ascontiguousarray(routes, np.int64), (x.view(np.uint32) >> 16).astype(np.uint16))

    return [draw() for _ in range(1 + FORWARDS)]


def median_s(forwards: Sequence[Callable[[], object]]) -> float:
    """Of their seconds, one right after the other; the first is not counted."""
    forwards[0]()
    seconds = []
    for forward in forwards[1:]:
        start_s = perf_counter()
        forward()
        seconds.append(perf_counter() - start_s)
    return median(seconds)


def main() -> None:
    """Make the layer that the arguments name, then answer."""
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
