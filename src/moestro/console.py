"""What is printed for people: text and tables that fit a terminal and are whole in a pipe or a file.

In a terminal, lines wrap between words at its width. Elsewhere nothing wraps: a line is a line, whatever its length. A
table is never narrower than its longest words, so none is cut; boxes are of ASCII where the stream's encoding has no
others.

    >>> print_table(("shape", "experts"), [("tiny", "8")])
    ┏━━━━━━━┳━━━━━━━━━┓
    ┃ shape ┃ experts ┃
    ┡━━━━━━━╇━━━━━━━━━┩
    │ tiny  │       8 │
    └───────┴─────────┘
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

_UNBOUNDED = 1_000_000  # columns of what is no terminal


def console(*, stderr: bool = False) -> Any:
    """A console of rich on standard output or error, which marks nothing by colours and reads no markup."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=False)
    if not made.is_terminal:
        made.width = _UNBOUNDED
    return made


def print_lines(*lines: str) -> None:
    """Print lines on standard output."""
    shown = console()
    for line in lines:
        shown.print(line)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[str] = ()) -> None:
    """Print rows of text under column names, on standard output.

    Args:
        left: names of columns, besides the first one, that are on the left; figures are on the right.
    """
    from rich.cells import cell_len
    from rich.table import Table

    table, shown, given = Table(), console(), [tuple(row) for row in rows]
    cells = list(zip(columns, *given, strict=True))
    least = [max(cell_len(word) for text in column for word in (text.split() or [""])) for column in cells]
    whole = [max(map(cell_len, column)) for column in cells]
    widths = _shared(least, whole, shown.width - 3 * len(columns) - 1)
    for column, width in zip(columns, widths, strict=True):
        table.add_column(column, justify="left" if not table.columns or column in left else "right", width=width)
    for row in given:
        table.add_row(*row)
    shown.width = max(shown.width, sum(widths) + 3 * len(columns) + 1)
    shown.print(table)


def _shared(least: list[int], whole: list[int], room: int) -> list[int]:
    """Widths of columns that wrap between words: none below its longest word, the narrowest first made wider."""
    widths = list(least)
    for _ in range(room - sum(least)):
        narrow = [i for i, width in enumerate(widths) if width < whole[i]]
        if not narrow:
            break
        widths[min(narrow, key=lambda i: widths[i])] += 1
    return widths
