"""Clients of a server that ask in a closed loop, and the figures of what they saw.

Each client sends its next request when the answer to its last one is whole. Prompts are random tokens, each drawn anew,
so that no two begin alike for more than a token or two.

    >>> len(random_prompts(clients=2, requests=3, tokens=8, vocabulary=100, seed=0)[1][2])
    8
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from threading import Thread
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError

if TYPE_CHECKING:
    from ..serve.engine import Engine
    from ..serve.requests import Request

Prompts = list[list[list[int]]]  # of each client, of each of its requests, the tokens


@dataclass(frozen=True, slots=True)
class Answered:
    """A request as its client saw it. times_s: when each piece of the answer came, on the clock of submitted_s."""

    client: int
    submitted_s: float
    times_s: tuple[float, ...]
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int
    tokens: tuple[int, ...] = ()  # of the answer, where they are known


@dataclass(frozen=True, slots=True)
class LoadFigures:
    """What so many clients saw. at_a_time: answers that run together.

    total_tok_s: tokens of prompts and answers, from the first request to the last token. answer_tok_s: of answers
    alone. decoding_tok_s: of answers while all that run together decode, and no prompt is read; None where that was
    never so. first_s: from a request to the first token of its answer; between_s: between two tokens of an answer; each
    at p50 and p99. ratio, decoding_ratio: over one client.
    """

    clients: int
    at_a_time: int
    total_tok_s: float
    answer_tok_s: float
    decoding_tok_s: float | None
    first_s: tuple[float, float]
    between_s: tuple[float, float]
    cached_tokens: int
    ratio: float | None = None
    decoding_ratio: float | None = None


def random_prompts(*, clients: int, requests: int, tokens: int, vocabulary: int, seed: int) -> Prompts:
    """Prompts of random tokens below `vocabulary`, for each client and each of its requests."""
    draw = random.Random(seed)
    return [[draw.choices(range(vocabulary), k=tokens) for _ in range(requests)] for _ in range(clients)]


def ask_engine(engine: Engine, prompts: Prompts, make: Callable[[list[int]], Request]) -> list[Answered]:
    """Have an engine answer all prompts of all clients, each client in a thread of its own.

    Args:
        make: the request with a prompt.

    Raises:
        RequestError: an answer failed.
    """
    found: list[Answered] = []
    failed: list[Exception] = []

    def run(client: int) -> None:
        try:
            for prompt in prompts[client]:
                found.append(answered(engine, client, make(prompt)))
        except Exception as error:
            failed.append(error)

    threads = [Thread(target=run, args=(client,)) for client in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return found


def answered(engine: Engine, client: int, request: Request) -> Answered:
    """One answer of an engine; times are taken by its thread, at the moment of each piece.

    Raises:
        RequestError: it failed.
    """
    from ..serve.requests import Finished

    times_s: list[float] = []
    tokens: list[int] = []
    submitted_s = perf_counter()
    for event in engine.submit(request, lambda: times_s.append(perf_counter())):
        if isinstance(event, Finished):
            if event.error is not None:
                raise RequestError(f"an answer failed: {event.error}")
            counts = event.prompt_tokens, event.cached_tokens, event.completion_tokens
            return Answered(client, submitted_s, tuple(times_s[: event.completion_tokens]), *counts, tuple(tokens))
        tokens += event.token_ids
    raise AssertionError("an answer without an end")


def figures_of(found: Sequence[Answered], clients: int, at_a_time: int) -> LoadFigures:
    """The figures of answers that were given in one run."""
    wall_s = max(one.times_s[-1] for one in found) - min(one.submitted_s for one in found)
    answers = sum(one.answer_tokens for one in found)
    prompts = sum(one.prompt_tokens for one in found)
    first_s = [one.times_s[0] - one.submitted_s for one in found]
    between_s = np.concatenate([np.diff(one.times_s) for one in found])
    return LoadFigures(
        clients,
        at_a_time,
        (prompts + answers) / wall_s,
        answers / wall_s,
        decoding_rate(found, min(clients, at_a_time)),
        _percentiles(first_s),
        _percentiles(between_s),
        sum(one.cached_tokens for one in found),
    )


def decoding_rate(found: Sequence[Answered], rows: int) -> float | None:
    """Tokens a second in the spans in which so many answers decode: each has its first token and lacks its last."""
    changes = sorted((time_s, step) for one in found for time_s, step in ((one.times_s[0], 1), (one.times_s[-1], -1)))
    spans: list[tuple[float, float]] = []
    running = 0
    for (time_s, step), (next_s, _) in pairwise(changes):
        running += step
        if running >= rows and next_s > time_s:
            spans.append((time_s, next_s))
    span_s = sum(end - begin for begin, end in spans)
    if not span_s:
        return None
    times_s = np.array(sorted(time_s for one in found for time_s in one.times_s))
    share = sum(one.answer_tokens for one in found) / len(times_s)  # tokens of a piece
    within = sum(
        int(np.searchsorted(times_s, end, "right") - np.searchsorted(times_s, begin, "right")) for begin, end in spans
    )
    return within * share / span_s


def medians_of(found: Sequence[Sequence[LoadFigures]]) -> list[LoadFigures]:
    """Medians of each load's rounds, and of the ratios to one client in the same round, where that is a load."""
    of_one = next((rounds for rounds in found if rounds[0].clients == 1), None)
    return [_medians(rounds, None if rounds is of_one else of_one) for rounds in found]


def _medians(rounds: Sequence[LoadFigures], of_one: Sequence[LoadFigures] | None) -> LoadFigures:
    pairs: dict[str, Any] = {
        name: tuple(median(getattr(one, name)[at] for one in rounds) for at in (0, 1))
        for name in ("first_s", "between_s")
    }
    return replace(
        rounds[0],
        total_tok_s=median(one.total_tok_s for one in rounds),
        answer_tok_s=median(one.answer_tok_s for one in rounds),
        decoding_tok_s=_median([one.decoding_tok_s for one in rounds]),
        cached_tokens=sum(one.cached_tokens for one in rounds),
        ratio=_median([a.total_tok_s / b.total_tok_s for a, b in zip(rounds, of_one or (), strict=False)]),
        decoding_ratio=_median(
            [
                None if a.decoding_tok_s is None or b.decoding_tok_s is None else a.decoding_tok_s / b.decoding_tok_s
                for a, b in zip(rounds, of_one or (), strict=False)
            ]
        ),
        **pairs,
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known and len(known) == len(values) else None


def _percentiles(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float]:
    if not len(values):
        return 0.0, 0.0
    p50, p99 = np.percentile(values, (50, 99))
    return float(p50), float(p99)
