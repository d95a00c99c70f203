"""Which rows of a KV cache a beam search has to copy after a step, in which order and from which token on.

After each step of a beam search every row goes on from one of the rows, its parent. A row that is its own parent stays.
Another one needs its parent's tokens, but not those that the two have alike anyway: beams share their prompt, and
mostly much of what follows. Knows no cache, only numbers and one tensor at a time.

    >>> Reordering([0, 0, 1]).copies(None, 9)
    [Copy(source=1, row=2, since=0), Copy(source=0, row=1, since=0)]

Legend: B rows, G key heads, S tokens in the cache, d width of a head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

ASIDE = -1  # stands for memory beside the rows, where one of a cycle waits

Shared = tuple[tuple[int, ...], ...]  # [B][B]: of two rows, how many tokens from the first on they have alike


class Copy(NamedTuple):
    """A row's tokens from `since` on become those of the source. Either may be `ASIDE`."""

    source: int
    row: int
    since: int


class Reordering:
    """Rows that go on from other rows.

    Args:
        parents: of each row, the row that it goes on from.
    """

    def __init__(self, parents: Sequence[int]) -> None:
        self.parents = tuple(parents)
        self.changed = [row for row, parent in enumerate(parents) if parent != row]

    def copies(self, shared: Shared | None, length: int) -> list[Copy]:
        """Copies after which each of `length` tokens is its parent's, none of which reads what an earlier one wrote.

        Args:
            shared: what rows have alike; None where that is not known.
        """
        since = {row: 0 if shared is None else shared[row][self.parents[row]] for row in self.changed}
        wanted = {row: self.parents[row] for row in self.changed if since[row] < length}
        readers = Counter(wanted.values())
        free = [row for row in wanted if not readers[row]]
        copies: list[Copy] = []
        while wanted:
            if not free:  # only cycles are left: one row of one waits aside, so that its own place is free
                row, parent = next(iter(wanted.items()))
                copies.append(Copy(parent, ASIDE, since[row]))
                wanted[row] = ASIDE
                free = [parent]
                continue
            row = free.pop()
            source = wanted.pop(row)
            copies.append(Copy(source, row, since[row]))
            readers[source] -= 1
            if not readers[source] and source in wanted:
                free.append(source)
        return copies

    def shared_after(self, shared: Shared | None, length: int) -> Shared:
        """What rows of `length` tokens have alike when each is its parent's."""
        return tuple(
            tuple(length if a == b else 0 if shared is None else shared[a][b] for b in self.parents)
            for a in self.parents
        )


def all_shared(rows: int, length: int) -> Shared:
    """What rows have alike that are copies of one."""
    return ((length,) * rows,) * rows


def carry_out(part: Tensor, copies: Sequence[Copy], length: int, skipped: int = 0) -> int:
    """Make copies in place; returns the bytes that were written.

    Args:
        part: keys or values, [B, G, S, d].
        copies: of tokens of the sequence.
        length: tokens of `part` that are in use, of S.
        skipped: tokens of the sequence before the first of `part`, of which a sliding window has let go.
    """
    written, aside = 0, part[:0]
    for source, row, since in copies:
        begin = max(0, since - skipped)
        tokens = aside if source == ASIDE else part[source, :, begin:length]
        written += tokens.numel() * tokens.element_size()
        if row == ASIDE:
            aside = tokens.clone()
        else:
            part[row, :, begin:length] = tokens
    return written
