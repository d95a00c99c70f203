"""A router's choice, sorted by expert: whose tokens an expert computes, with which weights, and what a policy sees.

Legend: T tokens, K top-k, E experts, G guesses.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .compute.experts import ExpertWork
from .planning.contract import Phase, Step
from .planning.trace import SCORE


class Routed(NamedTuple):
    """The tokens of one expert in a step: `span` of the step's rows, int64, and routing weights, float32; their sum."""

    expert: int
    step_rows: Tensor
    step_weights: Tensor
    span: range
    mass: float

    def work(self, packed: Tensor, neurons: range) -> ExpertWork:
        """What these tokens ask of an expert's neurons."""
        return ExpertWork(packed, neurons, self.step_rows, self.step_weights, self.span, self.expert)


def group_by_expert(index: Tensor, weights: Tensor, experts: int) -> dict[int, Routed]:
    """Sort a router's choice by expert.

    Skipped are an index of `experts` or more, which is not ours (expert parallelism), and a weight of
    exactly 0, by which some families say "no expert".

    Args:
        index: int [T, K] on the host. weights: float32 [T, K].

    Returns:
        expert -> its tokens, in ascending order of expert, only experts with at least one token.
    """
    if index.shape[0] == 1 and (alone := _group_one_token(index, weights, experts)) is not None:
        return alone
    flat = index.clamp(max=experts).where(weights != 0, experts).reshape(-1)  # [T*K]
    order = torch.argsort(flat, stable=True)  # [T*K]
    counts = torch.bincount(flat, minlength=experts + 1)[:experts].tolist()
    masses = torch.bincount(flat, weights.reshape(-1), minlength=experts + 1).tolist()
    rows, sorted_weights = order // index.shape[1], weights.reshape(-1)[order]
    groups: dict[int, Routed] = {}
    start = 0
    for expert, count in enumerate(counts):
        if count:
            groups[expert] = Routed(expert, rows, sorted_weights, range(start, start + count), masses[expert])
            start += count
    return groups


def step_of(layer: int, phase: Phase, groups: Mapping[int, Routed], guesses: Tensor | None) -> Step:
    """What a policy sees of it.

    Args:
        guesses: int32 [ahead, 2, G] on the host, as `routers.guess_next` makes them, or None.
    """
    likely: dict[int, dict[int, float]] = {}
    for ahead, (experts, scores) in enumerate(() if guesses is None else guesses.tolist(), start=1):
        if not scores[-1]:  # the least likely: there are fewer
            experts, scores = experts[: scores.index(0)], scores[: scores.index(0)]
        if scores:
            likely[layer + ahead] = dict(zip(experts, [score / SCORE for score in scores], strict=True))
    tokens = {expert: len(routed.span) for expert, routed in groups.items()}
    return Step(layer, phase, tokens, {expert: routed.mass for expert, routed in groups.items()}, likely)


def _group_one_token(index: Tensor, weights: Tensor, experts: int) -> dict[int, Routed] | None:
    """The same without sorting tensors, which costs more than the step itself; None if it chose an expert twice."""
    (chosen,), (masses,) = index.tolist(), weights.tolist()
    (rows, spans), weights = _one_token(len(chosen)), weights.contiguous()
    groups: dict[int, Routed] = {}
    for expert, i in sorted(zip(chosen, range(len(chosen)), strict=True)):
        if expert < experts and (mass := masses[i]) != 0:
            if expert in groups:
                return None
            groups[expert] = Routed(expert, rows, weights, spans[i], mass)
    return groups


@functools.cache
def _one_token(count: int) -> tuple[Tensor, list[range]]:
    """The row and the span of each of so many choices."""
    return torch.zeros(count, dtype=torch.int64), [range(i, i + 1) for i in range(count)]
