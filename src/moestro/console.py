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
    from rich.measure import Measurement
    from rich.table import Table

    table, shown = Table(), console()
    for column in columns:
        table.add_column(column, justify="left" if not table.columns or column in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    wide = shown.options.update(width=_UNBOUNDED)
    shown.width = max(shown.width, Measurement.get(shown, wide, table).minimum)
    shown.print(table)
