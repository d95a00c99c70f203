"""Compare policies on a shape whose routing is known as parameters: `moestro bench policies --shape NAME`, no model.

    moestro bench policies --shape gpt-oss-20b --machine rtx3060 --bits 4

Each policy is replayed at both ends of the parameters' ranges (simulate/routing.json), so each figure is a range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..console import print_table
from ..machine.measure import machine_by_name
from ..planning.options import ReplayOptions
from ..planning.shapes import spec_of_shape
from ..simulate.expand import expanded_ends
from ..simulate.fit import shortfall
from ..simulate.reshape import at_bits
from ..simulate.routing import routing_of
from .policies import PolicyRow, compare, print_lacks, told
from .report import Report

Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class RangeRow:
    """One policy's figures as ranges; none where the model does not fit."""

    policy: str
    prefill_tok_s: Range | None
    decode_tok_s: Range | None
    hit_rate: Range | None
    belady_hit_rate: Range | None
    slots: int | None
    does_not_fit: str | None


@dataclass(frozen=True, slots=True)
class AssumedReport(Report):
    """One run. routing: the parameters with their sources. low, high: all figures at both ends of their ranges."""

    where: str
    shape: str
    routing: dict[str, Any]
    routing_in_words: str
    rows: tuple[RangeRow, ...]
    low: tuple[PolicyRow, ...]
    high: tuple[PolicyRow, ...]

    def print(self) -> None:
        """Print a row for each policy, and what the ranges stand on."""
        rows = []
        for row in self.rows:
            figures = ((row.prefill_tok_s, ".1f"), (row.decode_tok_s, ".2f"), (row.hit_rate, ".1%"))
            ranges = ["-" if of is None else f"{of[0]:{how}} to {of[1]:{how}}" for of, how in figures]
            rows.append((row.policy, *ranges, told(row.slots, "d")))
        print(self.where)
        if any(row.does_not_fit is None for row in self.rows):
            print_table(("policy", "prefill tok/s", "decode tok/s", "hits", "slots"), rows)
        print(f"routing: {self.routing_in_words}\nnot recorded from the model; --json has the sources")
        print_lacks(self.low)


def compare_assumed(
    shape: str,
    options: ReplayOptions,
    names: Sequence[str],
    *,
    tokens: int,
    prompt_tokens: int,
    decode_tokens: int,
    plot: Path | None = None,
) -> AssumedReport:
    """Replay policies on a shape at both ends of what is known of its routing.

    Args:
        tokens: to decode in all; the first half of them is the profile. prompt_tokens, decode_tokens: of each text.
        plot: where to draw what each policy's lanes do at the lower end.

    Raises:
        RequestError: nothing is known of how the shape routes.
    """
    routing = routing_of(shape)
    spec = at_bits(spec_of_shape(shape), options.bits)
    ends: list[list[PolicyRow]] = []
    if (lacks := shortfall(spec, machine_by_name(options.machine), options.gpu_bytes)) is not None:
        ends = 2 * [[PolicyRow(name, does_not_fit=lacks.in_words()) for name in names]]
    else:
        pieces = {"tokens": tokens, "prompt_tokens": prompt_tokens, "decode_tokens": decode_tokens}
        for trace in expanded_ends(shape, options.bits, **pieces):
            ends.append(compare(trace, options.machine, options.gpu_bytes, names, None if ends else plot))
    return AssumedReport(
        where=f"{shape} by parameters on {options.machine}",
        shape=shape,
        routing=routing.to_json(),
        routing_in_words=routing.in_words(),
        rows=tuple(_row(low, high) for low, high in zip(*ends, strict=True)),
        low=tuple(ends[0]),
        high=tuple(ends[1]),
    )


def _row(low: PolicyRow, high: PolicyRow) -> RangeRow:
    names = ("prefill_tok_s", "decode_tok_s", "hit_rate", "belady_hit_rate")
    ranges = {name: _range(getattr(low, name), getattr(high, name)) for name in names}
    return RangeRow(low.policy, **ranges, slots=low.slots, does_not_fit=low.does_not_fit)


def _range(*figures: float | None) -> Range | None:
    found = sorted(figure for figure in figures if figure is not None)
    return (found[0], found[-1]) if found else None
