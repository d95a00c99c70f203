"""Random input of a layer's steps, equal for all engines with one seed, and the timing of an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

FORWARDS = 5  # an answer is the median of so many


@dataclass(frozen=True, slots=True)
class Draw:
    """The input of one step. routes: [T, K], distinct in each row. hidden: the bits of bfloat16 [T, D]."""

    routes: NDArray[np.int64]
    hidden: NDArray[np.uint16]


def draw_steps(tokens: int, hidden: int, experts: int, top_k: int, seed: int) -> list[Draw]:
    """The steps of one answer; each token draws its experts evenly at random in each step."""
    generator = np.random.default_rng(seed)

    def draw() -> Draw:
        routes = np.argsort(generator.random((tokens, experts)), axis=1)[:, :top_k]
        x = generator.standard_normal((tokens, hidden), dtype=np.float32)
        return Draw(np.ascontiguousarray(routes, np.int64), (x.view(np.uint32) >> 16).astype(np.uint16))

    return [draw() for _ in range(1 + FORWARDS)]


def median_s(forwards: Sequence[Callable[[], object]]) -> float:
    """The median seconds of functions called one right after the other; the first one warms up."""
    forwards[0]()
    seconds = []
    for forward in forwards[1:]:
        start_s = perf_counter()
        forward()
        seconds.append(perf_counter() - start_s)
    return median(seconds)
