"""What goes into a step of a layer, drawn for all engines alike, and how an answer's seconds are taken.

The same seed gives kt-kernel the same hidden states and routes as ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

FORWARDS = 5  # that an answer is the median of


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
