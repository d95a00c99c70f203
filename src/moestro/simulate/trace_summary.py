"""What a trace says of a model's routing: popularity, reuse, recall of guesses, hits of an LRU.

    >>> summarize(trace)["decode_tokens"]
    3

All of it is of decode steps, but popularity, which is of all tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from ..planning.contract import Phase
from .trace import Trace

REUSE_TOKENS = (1, 2, 4, 8, 16, 32)


def summarize(trace: Trace) -> dict[str, Any]:
    """The figures that `moestro trace --json` prints."""
    return {
        "model": trace.model,
        "layers": len(trace.spec.layers),
        "experts": max(layer.experts for layer in trace.spec.layers),
        "top_k": trace.top_k,
        "prefill_tokens": trace.tokens(Phase.PREFILL),
        "decode_tokens": trace.tokens(Phase.DECODE),
        "text_sha256": trace.text_sha256,
        "popularity": popularity(trace),
        "reuse": reuse(trace),
        "recall": {
            ahead: {count: recall(trace, ahead, count) for count in _counts(trace)}
            for ahead in range(1, trace.lookahead + 1)
            if ahead < len(trace.spec.layers)
        },
        "gate_agreement": list(trace.agreement),
    }


def popularity(trace: Trace) -> dict[str, float]:
    """Of a layer's experts, mean over layers: the hottest and coldest beside the mean, the hottest quarter's share."""
    heat = trace.heat()
    hottest, coldest, quarter = [], [], []
    for layer, spec in enumerate(trace.spec.layers):
        counts = sorted((heat.get((layer, e), 0.0) for e in range(spec.experts)), reverse=True)
        total = sum(counts) or 1.0
        mean = total / spec.experts
        hottest.append(counts[0] / mean)
        coldest.append(counts[-1] / mean)
        quarter.append(sum(counts[: max(1, spec.experts // 4)]) / total)
    return {"hottest": _mean(hottest), "coldest": _mean(coldest), "hottest_quarter": _mean(quarter)}


def reuse(trace: Trace) -> dict[int, float]:
    """Tokens -> share of uses whose expert was used so many tokens ago at most, or fewer."""
    last: dict[tuple[int, int], int] = {}
    ages: list[int] = []
    for token, one in enumerate(one for one in trace.passes if one.phase is Phase.DECODE):
        for step in one.steps:
            for expert in step.tokens:
                key = (step.layer, expert)
                if key in last:
                    ages.append(token - last[key])
                last[key] = token
    return {n: sum(age <= n for age in ages) / len(ages) if ages else 0.0 for n in REUSE_TOKENS}


def recall(trace: Trace, ahead: int, count: int) -> float | None:
    """How many of a layer's experts were among the first `count` guesses of `ahead` layers before; None without any."""
    found = used = 0
    for one in trace.passes:
        if one.phase is not Phase.DECODE:
            continue
        steps = {step.layer: step for step in one.steps}
        for step in one.steps:
            guesses, later = step.guesses.get(step.layer + ahead), steps.get(step.layer + ahead)
            if guesses and later is not None:
                first = list(guesses)[:count]
                found += sum(expert in first for expert in later.tokens)
                used += len(later.tokens)
    return found / used if used else None


def lru_hit_rate(trace: Trace, k: int) -> float:
    """Hits of an LRU of k slots a layer, which `lru` has (Eliseev and Mazur, figure 2)."""
    caches: dict[int, OrderedDict[int, None]] = {}
    hits = used = 0
    for step in trace.steps(Phase.DECODE):
        cache = caches.setdefault(step.layer, OrderedDict())
        used += len(step.tokens)
        hits += sum(expert in cache for expert in step.tokens)
        for expert in step.tokens:
            cache[expert] = None
            cache.move_to_end(expert)
        while len(cache) > k:
            cache.popitem(last=False)
    return hits / used if used else 0.0


def _counts(trace: Trace) -> list[int]:
    k = max(1, trace.top_k)
    return sorted({1, k, k + 1, 2 * k, 2 * k + 1} & set(range(1, max(8, 2 * k) + 1)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
