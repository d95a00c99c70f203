"""Keys and values of sequences that are over, so that the next turn of a conversation reads its new tokens alone.

Within a budget of memory; what was not used for longest leaves first. What is given out is a copy.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .caches import Caches, bytes_of


@dataclass(frozen=True, slots=True)
class _Kept:
    tokens: Tensor  # int64 [tokens]
    cache: Any
    n_bytes: int


class Prefixes:
    """What was kept, by its tokens.

    n_bytes: that it takes. Args: budget_bytes: that it may take.
    """

    def __init__(self, caches: Caches, budget_bytes: int) -> None:
        self._caches, self._budget_bytes = caches, budget_bytes if caches.is_reused else 0
        self._kept: OrderedDict[int, _Kept] = OrderedDict()  # the latest last
        self._next, self.n_bytes = 0, 0

    def __len__(self) -> int:
        return len(self._kept)

    def fits(self, tokens: int) -> bool:
        """Whether keeping so many tokens is worth a copy."""
        least_bytes = 0 if self._caches.is_whole else tokens * self._caches.token_bytes
        return tokens > 0 and self._budget_bytes > 0 and least_bytes <= self._budget_bytes

    def keep(self, tokens: Tensor, cache: Any) -> None:
        """Keep a cache that the caller gives away, and that holds exactly these tokens, int64 [tokens]."""
        n_bytes = bytes_of(cache)
        if n_bytes > self._budget_bytes or not len(tokens):
            return
        for key, one in list(self._kept.items()):  # what it makes superfluous
            shared = shared_tokens(one.tokens, tokens)
            if shared == len(one.tokens) and (not self._caches.is_whole or shared == len(tokens)):
                self._drop(key)
        self._kept[self._next] = _Kept(tokens.clone(), cache, n_bytes)
        self._next += 1
        self.n_bytes += n_bytes
        while self.n_bytes > self._budget_bytes:
            self._drop(next(iter(self._kept)))

    def find(self, prompt: Tensor) -> tuple[int, int]:
        """Which kept sequence begins like a prompt, int64 [tokens], and for how many tokens; -1 and 0 for none.

        At least one token of the prompt is left to read.
        """
        best, most = -1, 0
        for key, one in self._kept.items():
            shared = min(shared_tokens(one.tokens, prompt), len(prompt) - 1)
            if shared > most and (not self._caches.is_whole or shared == len(one.tokens)):
                best, most = key, shared
        return best, most

    def copy_of(self, key: int, tokens: int, room: int) -> Any:
        """A copy of the first tokens of what `find` found, with room for so many."""
        self._kept.move_to_end(key)
        return self._caches.copied(self._kept[key].cache, tokens, room)

    def _drop(self, key: int) -> None:
        self.n_bytes -= self._kept.pop(key).n_bytes


def shared_tokens(a: Tensor, b: Tensor) -> int:
    """How many tokens two sequences share at their beginning."""
    length = min(len(a), len(b))
    differs = (a[:length] != b[:length]).nonzero()
    return int(differs[0]) if len(differs) else length
