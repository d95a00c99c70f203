"""The rotary embedding of single tokens out of a table of the next positions, which the model's own code fills.

It is the same for all layers of a step, and in plain torch some ten operations, which in decode find the caches full of
weights. Left alone are embeddings whose frequencies depend on how long the text is.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...compute.eager import outside_of_graphs
from ..hooks import Fused, put_in_place

_POSITIONS = 128  # of a table
_FIXED = ("default", "linear", "llama3", "yarn")  # kinds whose frequencies are the same at every position
_TRIALS = (0, 1, 777)  # positions


@torch.no_grad()
def fuse_rotary(module: nn.Module) -> bool:
    """Give a rotary embedding a table for single tokens, if it is one that we know; says whether it is."""
    kind, frequencies = getattr(module, "rope_type", None), getattr(module, "inv_freq", None)
    if not (isinstance(kind, str) and kind in _FIXED and isinstance(frequencies, Tensor)):
        return False
    fused = _RotaryTable(module)
    x = torch.zeros(1, 1, 8, dtype=torch.bfloat16)
    try:
        for position in _TRIALS:
            ids = torch.tensor([[position]])
            pairs = zip(fused.run(x, ids), module(x, ids), strict=True)
            if not all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs):
                return False
    except Exception:  # it wants or returns something else
        return False
    put_in_place(module, fused, module)
    return True


class _Table(NamedTuple):
    """Cosines and sines [1, positions, d] from `first` on, and what they were made with."""

    first: int
    dtype: torch.dtype
    frequencies: Tensor  # a copy, since the module's own may be edited in place
    cosine: Tensor
    sine: Tensor


class _RotaryTable(Fused):
    """The forward of a recognized rotary embedding."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self._buffers = module._buffers
        self._of_thread = threading.local()  # each thread that generates is at a position of its own

    @outside_of_graphs
    def __call__(self, x: Tensor, position_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not self._fits(x, position_ids):
            return self._original(x, position_ids, *args, **kwargs)
        return self.run(x, position_ids)

    def run(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [1, 1, d] of one position, in the dtype of x."""
        position = int(position_ids)
        table: _Table | None = getattr(self._of_thread, "table", None)
        if table is None or not self._holds(table, position, x.dtype):
            positions = torch.arange(position, position + _POSITIONS)[None]
            cosine, sine = self._original(x, positions)
            frequencies = self._buffers["inv_freq"].clone()
            table = self._of_thread.table = _Table(position, x.dtype, frequencies, cosine, sine)
        at = position - table.first
        # Copies, since the caller may do with them what it likes.
        return table.cosine[:, at : at + 1].clone(), table.sine[:, at : at + 1].clone()

    def _fits(self, x: Any, position_ids: Any) -> bool:
        """Whether it is one position of one sequence on the CPU, and the module is what it was."""
        if not (isinstance(x, Tensor) and isinstance(position_ids, Tensor) and position_ids.shape == (1, 1)):
            return False
        if position_ids.dtype not in (torch.int64, torch.int32):  # positions may lie between two tokens
            return False
        on_cpu = x.device.type == position_ids.device.type == "cpu"
        return on_cpu and self.watch is not None and self.watch.holds()

    def _holds(self, table: _Table, position: int, dtype: torch.dtype) -> bool:
        """Whether a table has this position, made with the frequencies that the module has now."""
        near = table.first <= position < table.first + _POSITIONS
        return near and table.dtype == dtype and torch.equal(table.frequencies, self._buffers["inv_freq"])
