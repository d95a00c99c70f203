"""Text that comes in pieces, printed at once: in a terminal its lines end between words, elsewhere it is as it came.

A terminal would end a line within a word. Here a word that turns out not to fit is taken back and begins the next line.
Lines between fences of three backticks are left as they are, since they are code, and so is a word longer than a line.
"""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from typing import TextIO

_TAB = 8
_FENCE = "```"


class Wrapped:
    """Prints on a stream of this process.

    Args:
        is_error: on standard error instead of standard output.
    """

    def __init__(self, *, is_error: bool = False) -> None:
        self._is_error = is_error
        self._column, self._word, self._word_cells = 0, "", 0  # where the cursor is, and what was printed of a word
        self._line = ""  # as far as it may be a fence
        self._is_code = False

    def write(self, text: str) -> None:
        """Print a piece at once."""
        stream = sys.stderr if self._is_error else sys.stdout
        stream.write("".join(map(self._placed, text)) if _wraps(stream) else text)
        stream.flush()

    def _placed(self, char: str) -> str:
        """A character, with what must be written so that it does not stand beyond the last column."""
        if char == "\n":
            self._end_line()
            return char
        if len(self._line) < len(_FENCE):
            self._line = (self._line + char).lstrip()
        cells = _TAB - self._column % _TAB if char == "\t" else _cells(char)
        width = shutil.get_terminal_size().columns - 1  # in the last column some terminals wait with the next line
        if char.isspace():
            self._word, self._word_cells = "", 0
            self._column = min(self._column + cells, width)  # spaces at the end of a line are not seen
            return char if self._column < width or self._is_code else ""
        before = ""
        if self._column + cells > width and not self._is_code:
            if 0 < self._word_cells < self._column and cells == 1:
                before = f"\x1b[{self._word_cells}D\x1b[K\n{self._word}"
                self._column = self._word_cells
            else:  # one that is a line by itself, or of a script that has no spaces
                before, self._column, self._word, self._word_cells = "\n", 0, "", 0
        self._column += cells
        wide = cells == 2
        self._word, self._word_cells = ("", 0) if wide else (self._word + char, self._word_cells + cells)
        return before + char

    def _end_line(self) -> None:
        if self._line.startswith(_FENCE):
            self._is_code = not self._is_code
        self._column, self._word, self._word_cells, self._line = 0, "", 0, ""


def _wraps(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _cells(char: str) -> int:
    """The columns that a character takes."""
    if unicodedata.combining(char) or unicodedata.category(char) in ("Cc", "Cf", "Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
