"""Belady's bound: which experts a cache that knows the future would have, loading only what is asked for.

L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966; here
with the freedom not to keep what was loaded, since the CPU can compute an expert that no slot has.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Hashable, Sequence
from typing import TypeVar

Item = TypeVar("Item", bound=Hashable)


def belady_hits(steps: Sequence[Collection[Item]], slots: int) -> list[set[Item]]:
    """For each step, which of the items asked for were there before it.

    Args:
        steps: the items that each step asks for.
        slots: how many can be there between two steps; before the first, those that are wanted soonest.
    """
    upcoming = _next_uses(steps)
    first: dict[Item, int] = {}  # item -> the step that asks for it first
    for i, items in enumerate(steps):
        for item in items:
            first.setdefault(item, i)
    cached = dict(list(first.items())[:slots])  # item -> the step that uses it next
    tie = len(cached)
    # A heap of (-next use, tie, item), some of them out of date.
    farthest = [(-use, i, item) for i, (item, use) in enumerate(cached.items())]
    heapq.heapify(farthest)
    hits: list[set[Item]] = []
    for items, following in zip(steps, upcoming, strict=True):
        hits.append({item for item in items if item in cached})
        for item in following:
            cached.pop(item, None)
        for item, use in following.items():
            if not slots or use == _NEVER:
                continue
            if len(cached) >= slots:
                while farthest and cached.get(farthest[0][2]) != -farthest[0][0]:
                    heapq.heappop(farthest)
                if not farthest or -farthest[0][0] <= use:
                    continue  # all that are there are wanted sooner
                del cached[heapq.heappop(farthest)[2]]
            cached[item] = use
            tie += 1
            heapq.heappush(farthest, (-use, tie, item))
    return hits


_NEVER = 2**62


def _next_uses(steps: Sequence[Collection[Item]]) -> list[dict[Item, int]]:
    """For each step, each of its items -> the next step that asks for it."""
    seen: dict[Item, int] = {}
    found: list[dict[Item, int]] = []
    for i in range(len(steps) - 1, -1, -1):
        found.append({item: seen.get(item, _NEVER) for item in steps[i]})
        seen.update(dict.fromkeys(steps[i], i))
    found.reverse()
    return found
