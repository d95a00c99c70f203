"""What `moestro bench quantization` found, as tables and as a plot; measures nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..console import print_table
from ..planning.budget import format_bytes
from .bits_speed import BitsSpeed
from .paper_sizes import PaperSize
from .plots import plotting
from .report import Report

Cell = TypeVar("Cell")
_PLOT_COLUMNS, _PLOT_LINES = 64, 14  # of characters


@dataclass(frozen=True, slots=True)
class QuantizationRow:
    """A cell of the table: a model in so many bits. size_bytes: of all its weights as they are packed."""

    dense_bits: int
    expert_bits: int
    size_bytes: int
    perplexity: float


@dataclass(frozen=True, slots=True)
class OutOfOrder:
    """Two neighbouring cells of a row or column where fewer bits have the lower perplexity.

    standard_errors: by how many the mean loss of the cell with more bits is higher, over the windows that both read.
    """

    better: tuple[int, int]  # bits of dense layers and experts
    worse: tuple[int, int]
    standard_errors: float


@dataclass(frozen=True, slots=True)
class QuantizationReport(Report):
    """One run.

    text: the name of what was read. tokens: read, in windows of `window`. speeds: of random weights of `shape`, cut to
    `layers`; empty where no shape was asked for. sizes: of the paper's Mixtral-8x7B.
    """

    model: str
    text: str
    tokens: int
    window: int
    rows: tuple[QuantizationRow, ...]
    out_of_order: tuple[OutOfOrder, ...]
    shape: str | None
    layers: int | None
    speeds: tuple[BitsSpeed, ...]
    sizes: tuple[PaperSize, ...]

    def print(self) -> None:
        """Print sizes and perplexities, a plot of one against the other, speeds, and the paper's sizes."""
        print(f"{self.model} on {self.tokens:,} tokens of {self.text}, windows of {self.window}")
        cells = {(row.dense_bits, row.expert_bits): row for row in self.rows}
        print_table(*_grid(cells, lambda row: f"{format_bytes(row.size_bytes)}, {row.perplexity:.3f}"))
        print("size and perplexity; bits of attention and other dense layers down, of the experts across")
        for line in self._in_order():
            print(line)
        for line in draw_text(self.rows):
            print(line)
        if self.speeds:
            print(f"decode of {self.shape}, random weights, {self.layers} layers")
            rows = [(str(one.dense_bits), str(one.expert_bits), f"{one.decode_tok_s:.1f}") for one in self.speeds]
            print_table(("dense bits", "expert bits", "tok/s"), rows)
        print("Mixtral-8x7B in GiB: the paper's, rebuilt from hqq's packing, ours")
        sizes = {(one.dense_bits, one.expert_bits): one for one in self.sizes}
        print_table(*_grid(sizes, lambda one: f"{one.paper_gib:.2f}  {one.rebuilt_gib:.2f}  {one.ours_gib:.2f}"))

    def plot(self, path: Path) -> None:
        """Draw perplexity against size as an SVG.

        Raises:
            RequestError: matplotlib is not installed.
        """
        pyplot = plotting()
        figure, axes = pyplot.subplots(figsize=(6.5, 4.2))
        for dense in dict.fromkeys(row.dense_bits for row in self.rows):
            row = [one for one in self.rows if one.dense_bits == dense]
            sizes, values = [one.size_bytes / 2**20 for one in row], [one.perplexity for one in row]
            axes.plot(sizes, values, "o-", label=f"{dense}-bit dense layers")
            for one, x, y in zip(row, sizes, values, strict=True):
                axes.annotate(str(one.expert_bits), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axes.set(xscale="log", xlabel="MiB of weights", ylabel="perplexity")
        axes.set_title(f"{self.model}, {self.text}; numbers at the points: bits of the experts", fontsize=9)
        axes.grid(alpha=0.3, which="both")
        axes.legend()
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})

    def _in_order(self) -> Iterator[str]:
        if not self.out_of_order:
            yield "as in the paper, fewer bits never have a lower perplexity, in no row and in no column"
        for pair in self.out_of_order:
            better, worse = (f"{dense}/{expert}" for dense, expert in (pair.better, pair.worse))
            yield (
                f"not as in the paper: {better} bits have a lower perplexity than {worse}, "
                f"by {pair.standard_errors:.1f} standard errors"
            )


def _grid(cells: Mapping[tuple[int, int], Cell], in_words: Callable[[Cell], str]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for `print_table`: bits of dense layers down, of the experts across."""
    dense, experts = ([*dict.fromkeys(key[i] for key in cells)] for i in (0, 1))
    rows = [[f"{down}", *(in_words(cells[down, across]) for across in experts)] for down in dense]
    return ["", *(f"{across}-bit experts" for across in experts)], rows


def draw_text(rows: Sequence[QuantizationRow]) -> Iterator[str]:
    """The rows as lines of characters: perplexity upward, size to the right on a logarithmic scale.

    A cell is the bits of its dense layers, "#" for 16; where several would stand in one place, it is "*".
    """
    sizes, values = [math.log(row.size_bytes) for row in rows], [row.perplexity for row in rows]
    canvas = [[" "] * _PLOT_COLUMNS for _ in range(_PLOT_LINES)]
    for row, size, value in zip(rows, sizes, values, strict=True):
        up, right = _place(value, values, _PLOT_LINES), _place(size, sizes, _PLOT_COLUMNS)
        mark = "#" if row.dense_bits == 16 else f"{row.dense_bits}"
        canvas[up][right] = mark if canvas[up][right] == " " else "*"
    for number, line in reversed([*enumerate(canvas)]):
        label = {_PLOT_LINES - 1: f"{max(values):.2f}", 0: f"{min(values):.2f}"}.get(number, "")
        yield f"{label:>9} |{''.join(line).rstrip()}"
    least, most = (format_bytes(round(math.exp(end))) for end in (min(sizes), max(sizes)))
    yield f"{'':>9} +{'-' * _PLOT_COLUMNS}"
    yield f"{'':>10} {least}{most:>{_PLOT_COLUMNS - len(least)}}"
    yield "perplexity by size; the digits are the bits of the dense layers, # is 16, * several cells"


def _place(value: float, all_values: Sequence[float], places: int) -> int:
    """The place of a value, from 0 to places - 1, where the least is at 0 and the greatest at the end."""
    least, most = min(all_values), max(all_values)
    return round((value - least) / (most - least) * (places - 1)) if most > least else 0
