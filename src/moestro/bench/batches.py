"""Steps of several sequences beside what the machine could do: for `moestro bench decode --batch`.

The limit of a step is the sum over the experts that it really used, the dense layers and attention of what takes longer
there: reading their bytes, or the operations. A figure is the median of the turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from ..compute.cpu import fma_gflops
from .models import ModelWorker
from .report import print_table

CONTEXT, STEPS = 64, 16  # tokens in each sequence's cache at first, and steps of one token each


@dataclass(frozen=True, slots=True)
class BatchFigures:
    """So many sequences a step: tokens a second in all, and at the limit."""

    batch: int
    tok_s: float
    limit_tok_s: float


class BatchTurns:
    """Takes turns of each batch size.

    Args:
        batches: how many sequences a step has, for each figure.
    """

    def __init__(self, batches: Sequence[int], threads: int) -> None:
        self._threads = threads
        self._found: dict[int, list[BatchFigures]] = {batch: [] for batch in batches}

    def take(self, engine: ModelWorker, read_gbps: float) -> None:
        """One turn. read_gbps: how fast this machine reads memory at this moment."""
        if not self._found:
            return
        gflops = fma_gflops(self._threads)
        for batch, found in self._found.items():
            step_s, parts = engine.batch(batch, CONTEXT, STEPS)
            limit_s = sum(max(n_bytes / read_gbps, operations / gflops) for n_bytes, operations in parts) / 1e9
            found.append(BatchFigures(batch, batch / step_s, batch / limit_s))

    def figures(self) -> tuple[BatchFigures, ...]:
        """The medians."""
        return tuple(
            BatchFigures(batch, median(one.tok_s for one in found), median(one.limit_tok_s for one in found))
            for batch, found in self._found.items()
        )


def print_batches(figures: Sequence[BatchFigures]) -> None:
    """Print a table of them, if there are any."""
    if not figures:
        return
    rows = [
        (str(one.batch), f"{one.tok_s:.1f}", f"{one.limit_tok_s:.1f}", f"{one.tok_s / one.limit_tok_s:.2f}")
        for one in figures
    ]
    print_table(("sequences a step", "tok/s in all", "limit", "of the limit"), rows)
