"""How far a prompt has been read, as its layers tell.

>>> shares = []
>>> reading = Reading(tokens=8, layers=2, on_progress=shares.append)
>>> for layer, tokens in ((0, 4), (1, 4), (0, 4), (1, 4)):
...     reading.layer(layer, tokens)
>>> reading.done()
>>> shares
[0.0, 0.25, 0.5, 0.75, 1.0]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

OnProgress = Callable[[float], None]


class Reading:
    """Passes on which share of a prompt has been read, from 0 to 1; 1 comes once, with the first token of the answer.

    Args:
        tokens: of the prompt, over all rows, that are to be read. layers: MoE layers of the model.
    """

    def __init__(self, tokens: int, layers: int, on_progress: OnProgress) -> None:
        self._tokens, self._layers, self._on_progress = tokens, layers, on_progress
        self._read = self._reading = 0  # tokens that all layers have seen, and those that are on their way
        self._is_done = False

    def layer(self, layer: int, tokens: int) -> None:
        """A layer is to compute so many tokens of the prompt."""
        if self._is_done:
            return
        if layer == 0:
            self._read, self._reading = self._read + self._reading, tokens
        self._on_progress(min(1.0, (self._read + self._reading * layer / self._layers) / self._tokens))

    def done(self) -> None:
        """The whole prompt has been read."""
        if not self._is_done:
            self._is_done = True
            self._on_progress(1.0)


@contextmanager
def watched(model: Any, reading: Reading | None) -> Iterator[None]:
    """Inside the block the model's layers tell a reading how far they are."""
    model.moestro.progress = None if reading is None else reading.layer
    try:
        yield
    finally:
        model.moestro.progress = None
