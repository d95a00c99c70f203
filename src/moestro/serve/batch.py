"""The rows that answer together, in one cache that is allocated once.

Rows end at the same column and begin where their lengths say, so a step's mask says no more than where each begins, as
the fused steps of the CPU want it. A row that joins is copied so that it ends there; where one leaves, the last row
takes its place. When the columns run out, all rows move to the left: there is room enough that this is rare.

Legend: R rows at most, B rows now, G key heads, C columns, d width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..planning.budget import columns_for
from .caches import Caches, Forward


class Batch:
    """Rows of a cache of fixed size.

    lengths: tokens of each row.

    Args:
        rows, context: at most.
    """

    def __init__(self, caches: Caches, forward: Forward, rows: int, context: int) -> None:
        self._caches, self._forward = caches, forward
        self._columns = columns_for(context)
        self._rooms = caches.rooms(rows, self._columns)
        self.lengths: list[int] = []
        self._begin = self._end = 0  # columns that rows use
        self._cache: Any = None  # laid over the rooms; None after a change of rows

    def join(self, cache: Any) -> int:
        """Copy a sequence from its own cache; returns its row."""
        length, row = int(cache.get_seq_length()), len(self.lengths)
        if not self.lengths:
            self._end = length
        elif length > self._end:
            self._shift(length - self._end)
        for pair, layer in zip(self._rooms, cache.layers, strict=True):
            if pair is not None:
                span = slice(self._end - length, self._end)
                pair[0][row, :, span], pair[1][row, :, span] = layer.keys[0], layer.values[0]
        self.lengths.append(length)
        self._cache = None
        return row

    def taken(self, row: int, tokens: int, room: int = 0) -> Any:
        """A copy of a row's first tokens as a cache of its own, with room for so many."""
        length = self.lengths[row]
        view = self._caches.fresh()
        self._caches.place(view, self._views(row, 1, self._end - length), length)
        return self._caches.copied(view, tokens, room)

    def leave(self, row: int, *, clears: bool = False) -> None:
        """Free a row; the last one takes its place. clears: what it held may not be finite."""
        last = len(self.lengths) - 1
        for pair in self._rooms:
            for part in pair or ():
                if clears:
                    part[row].zero_()
                if row != last:
                    span = slice(self._end - self.lengths[last], self._end)
                    part[row, :, span] = part[last, :, span]
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        self._cache = None

    def clear(self) -> None:
        """Free all rows, after a step that failed somewhere."""
        self.lengths, self._cache, self._end = [], None, 0
        for pair in self._rooms:
            for part in pair or ():
                part.zero_()

    def step(self, tokens: list[int]) -> Tensor:
        """Read a token of each row; returns the logits behind them, float32 [B, V]."""
        lengths = torch.tensor(self.lengths)
        if self._cache is None or self._end == self._columns:
            self._lay()
        held = self._end - self._begin
        mask = None
        if len(set(self.lengths)) > 1 or self.lengths[0] < held:
            mask = (torch.arange(held + 1) >= held - lengths[:, None]).long()
        logits, _ = self._forward(torch.tensor(tokens)[:, None], self._cache, lengths[:, None], mask)
        self._end += 1
        self.lengths = [length + 1 for length in self.lengths]
        self._check(held + 1)
        return logits

    def _lay(self) -> None:
        """Lay a cache over the rows, from the first column that one of them uses."""
        if self._end == self._columns:
            self._shift(max(self.lengths) - self._end)
        self._begin = self._end - max(self.lengths)
        self._cache = self._caches.fresh()
        self._caches.place(self._cache, self._views(0, len(self.lengths), self._begin), self._end - self._begin)

    def _views(self, row: int, rows: int, begin: int) -> list[tuple[Tensor, Tensor] | None]:
        return [
            pair and (pair[0][row : row + rows, :, begin:], pair[1][row : row + rows, :, begin:])
            for pair in self._rooms
        ]

    def _shift(self, columns: int) -> None:
        """Move all rows to the right, or by a negative number to the left."""
        for pair in self._rooms:
            for part in pair or ():
                for row, length in enumerate(self.lengths):
                    kept = part[row, :, self._end - length : self._end].clone()
                    part[row, :, self._end - length + columns : self._end + columns] = kept
        self._end += columns
        self._cache = None

    def _check(self, tokens: int) -> None:
        """See that the step wrote where the rows are.

        Raises:
            ModelError: the model keeps its keys and values elsewhere.
        """
        for pair, layer in zip(self._rooms, self._cache.layers, strict=True):
            if pair is None:
                continue
            begins = pair[0][0, :, self._begin :].data_ptr()
            if layer.keys.data_ptr() != begins or layer.keys.shape[2] != tokens:
                raise ModelError("the model did not write its keys and values behind those of the batch")
