"""A router's choice, sorted by expert: which tokens an expert computes, with which weights, and what a policy sees.

Legend: T tokens, K top-k, E experts, G guesses.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..compute.experts import ExpertWork
from ..planning.contract import SCORE, Phase, Step


class Routed(NamedTuple):
    """A layer step by experts, ascending, those with at least one token.

    tokens: how many of each; mass: the sum of their routing weights. rows: int64 [T * K], sorted by expert; weights:
    float32, theirs, in any shape; spans: which of them are an expert's.
    """

    tokens: dict[int, int]
    mass: dict[int, float]
    spans: dict[int, range]
    rows: Tensor
    weights: Tensor

    def work(self, expert: int, packed: Tensor, neurons: range) -> ExpertWork:
        """What its tokens ask of an expert's neurons."""
        return ExpertWork(packed, neurons, self.rows, self.weights, self.spans[expert], expert)

    def step(self, layer: int, phase: Phase, guesses: Tensor | None) -> Step:
        """What a policy sees of it.

        Args:
            guesses: int32 [ahead, 2, G] on the host, as `routers.guess_next` makes them, or None.
        """
        likely: dict[int, dict[int, float]] = {}
        for ahead, (experts, scores) in enumerate(() if guesses is None else guesses.tolist(), start=1):
            if not scores[-1]:  # of the least likely: there are fewer
                experts, scores = experts[: scores.index(0)], scores[: scores.index(0)]
            if scores:
                likely[layer + ahead] = dict(zip(experts, [score / SCORE for score in scores], strict=True))
        return Step(layer, phase, self.tokens, self.mass, likely)


def group_by_expert(index: Tensor, weights: Tensor, experts: int) -> Routed:
    """Sort a router's choice by expert.

    Skipped are an index outside [0, experts), which is not ours (expert parallelism), whatever its weight, and a
    weight of exactly 0, by which some families say "no expert".

    Args:
        index: int [T, K] on the host. weights: float32 [T, K].
    """
    if index.shape[0] == 1 and (alone := _group_one_token(index, weights, experts)) is not None:
        return alone
    index = index.long()  # a narrower one may have no room for `experts`
    flat = index.where((index >= 0) & (index < experts) & (weights != 0), experts).reshape(-1)  # [T*K]
    order = torch.argsort(flat, stable=True)  # [T*K]
    counts = torch.bincount(flat, minlength=experts + 1)[:experts].tolist()
    masses = torch.bincount(flat, weights.reshape(-1), minlength=experts + 1).tolist()
    found = Routed({}, {}, {}, order // index.shape[1], weights.reshape(-1)[order])
    start = 0
    for expert, count in enumerate(counts):
        if count:
            found.tokens[expert], found.mass[expert] = count, masses[expert]
            found.spans[expert] = range(start, start + count)
            start += count
    return found


def _group_one_token(index: Tensor, weights: Tensor, experts: int) -> Routed | None:
    """Sort one token's choice without tensors, which cost more than the step itself; None if an expert comes twice."""
    (chosen,), (masses,) = index.tolist(), weights.tolist()
    rows, each = _one_token(len(chosen))
    choices = sorted(zip(chosen, range(len(chosen)), strict=True))
    if choices[0][0] < 0 or choices[-1][0] >= experts or 0 in masses:
        choices = [(expert, i) for expert, i in choices if 0 <= expert < experts and masses[i] != 0]
    mass = {expert: masses[i] for expert, i in choices}
    if len(mass) < len(choices):
        return None
    spans = {expert: each[i] for expert, i in choices}
    return Routed(dict.fromkeys(mass, 1), mass, spans, rows, weights.contiguous())


@functools.cache
def _one_token(count: int) -> tuple[Tensor, list[range]]:
    """The rows of so many choices, and the span of each."""
    return torch.zeros(count, dtype=torch.int64), [range(i, i + 1) for i in range(count)]
