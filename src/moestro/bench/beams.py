"""Beam search beside a batch of as many sequences and beside one alone: for `moestro bench decode --beams`.

N beams compute N tokens a step, as a batch of N does; what a search takes besides is choosing, and reordering the KV
cache. A figure is the median of the turns. Weights are random, so beams take over from each other in almost every step,
more often than those of a trained model do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from ..console import print_table
from .batches import CACHED, STEPS
from .models import ModelWorker


@dataclass(frozen=True, slots=True)
class BeamFigures:
    """So many beams a step.

    tok_s: tokens a second, of all beams. batch_tok_s: of a batch of as many sequences. alone_tok_s: of one sequence,
    and so of as many one after another. moved_bytes: of the cache, in a step, that reordering wrote. whole_bytes: that
    Transformers' own reordering writes.
    """

    beams: int
    tok_s: float
    batch_tok_s: float
    alone_tok_s: float
    moved_bytes: float
    whole_bytes: float


class BeamTurns:
    """Takes turns of each number of beams.

    Args:
        beams: how many a step has, for each figure.
    """

    def __init__(self, beams: Sequence[int]) -> None:
        self._found: dict[int, list[BeamFigures]] = {each: [] for each in beams}

    def take(self, engine: ModelWorker) -> None:
        """One turn."""
        for beams, found in self._found.items():
            alone_s = engine.decode_s(CACHED, STEPS)
            batch_s, _ = engine.batch(beams, CACHED, STEPS)
            step_s, moved, whole = engine.beams(beams, CACHED, STEPS)
            found.append(BeamFigures(beams, beams / step_s, beams / batch_s, 1 / alone_s, moved, whole))

    def figures(self) -> tuple[BeamFigures, ...]:
        """The medians."""
        names = ("tok_s", "batch_tok_s", "alone_tok_s", "moved_bytes", "whole_bytes")
        return tuple(
            BeamFigures(beams, *(median(getattr(one, name) for one in found) for name in names))
            for beams, found in self._found.items()
        )


def print_beams(figures: Sequence[BeamFigures]) -> None:
    """Print a table of them, if there are any."""
    if not figures:
        return
    rows = [
        (
            str(one.beams),
            f"{one.tok_s:.1f}",
            f"{one.batch_tok_s:.1f}",
            f"{one.alone_tok_s:.1f}",
            f"{one.moved_bytes / 2**20:.2f}",
            f"{one.whole_bytes / 2**20:.2f}",
        )
        for one in figures
    ]
    print_table(("beams", "tok/s in all", "a batch", "one alone", "MiB moved a step", "of MiB"), rows)
