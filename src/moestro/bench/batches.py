"""Steps of several sequences beside what the machine could do: for `moestro bench decode --batch`.

The limit of a step is the sum over the experts that it really used, the dense layers and attention of what takes longer
there: reading their bytes, or the operations. A figure is the median of the turns. What does not fit keeps its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from ..compute.cpu import fma_gflops
from ..console import print_table
from ..machine.probe import available_ram_bytes
from .models import ModelWorker

CACHED, STEPS = 64, 16  # tokens in each sequence's cache at first, and steps of one token each
_COPIES = 2.5  # of a cache, at most, while it is filled and then grows


@dataclass(frozen=True, slots=True)
class BatchFigures:
    """So many sequences a step, with so many tokens in the cache of each: tokens a second in all, and at the limit.

    Both speeds are None where the caches do not fit in RAM.
    """

    batch: int
    cached: int
    tok_s: float | None
    limit_tok_s: float | None


class BatchTurns:
    """Takes turns of each batch size at each length of the caches.

    Args:
        batches: how many sequences a step has. cached: tokens in the cache of each.
    """

    def __init__(self, batches: Sequence[int], threads: int, *, cached: Sequence[int] = (CACHED,)) -> None:
        self._threads = threads
        self._found: dict[tuple[int, int], list[tuple[float, float]]] = {
            (batch, tokens): [] for tokens in cached for batch in batches
        }

    def take(self, engine: ModelWorker, read_gbps: float) -> None:
        """One turn. read_gbps: how fast this machine reads memory at this moment."""
        if not self._found:
            return
        gflops = fma_gflops(self._threads)
        for (batch, cached), found in self._found.items():
            if batch * (cached + STEPS) * engine.card["cached_token_bytes"] * _COPIES > available_ram_bytes():
                continue
            step_s, parts = engine.batch(batch, cached, STEPS)
            limit_s = sum(max(n_bytes / read_gbps, operations / gflops) for n_bytes, operations in parts) / 1e9
            found.append((batch / step_s, batch / limit_s))

    def figures(self) -> tuple[BatchFigures, ...]:
        """The medians."""
        return tuple(
            BatchFigures(batch, cached, *((None, None) if not found else map(median, zip(*found, strict=True))))
            for (batch, cached), found in self._found.items()
        )


def print_batches(figures: Sequence[BatchFigures]) -> None:
    """Print a table of them, if there are any."""
    if not figures:
        return
    rows = []
    for one in figures:
        sizes = str(one.cached), str(one.batch)
        if one.tok_s is None or one.limit_tok_s is None:
            rows.append((*sizes, "does not fit", "", ""))
        else:
            share = one.tok_s / one.limit_tok_s
            rows.append((*sizes, f"{one.tok_s:.1f}", f"{one.limit_tok_s:.1f}", f"{share:.2f}"))
    print_table(("cached", "sequences a step", "tok/s in all", "limit", "of the limit"), rows)
