"""A streamed answer in a terminal: lines end between words, whatever pieces it comes in; in a pipe it is as it came."""

from __future__ import annotations

import io
import re
import shutil
import sys
from os import terminal_size

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.cli.terminal import AnswerPrinter
from moestro.cli.wrapping import Wrapped, _cells

COLUMNS = 24


class Screen(io.StringIO):
    """A terminal: what was written, and what then stands on its lines."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        shown: list[list[str]] = [[]]
        for part in re.findall(r"\x1b\[\d*[A-Za-z]|[\s\S]", self.getvalue()):
            if part == "\n":
                shown.append([])
            elif back := re.fullmatch(r"\x1b\[(\d+)D", part):
                del shown[-1][-int(back[1]) :]  # the rest is cleared by what follows
            elif not part.startswith("\x1b"):
                shown[-1].append(part)
        return ["".join(line) for line in shown]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: terminal_size((COLUMNS, 24)))
    monkeypatch.setenv("TERM", "xterm")
    return Screen()


def written(screen: Screen, *pieces: str) -> list[str]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "stdout", screen)
        printer = Wrapped()
        for piece in pieces:
            printer.write(piece)
    return screen.lines()


def _width(line: str) -> int:
    return sum(map(_cells, line))


def test_words_stay_whole(screen: Screen) -> None:
    text = "Once upon a time there was a queen, who said: no.\nThe  end"
    assert written(screen, *text) == ["Once upon a time there", "was a queen, who said:", "no.", "The  end"]


def test_code_long_words_and_scripts_without_spaces(screen: Screen) -> None:
    long = "x" * 60
    code = f"```\nfor a in range(10): print('a long line')\n```\n{long} so\n" + "字" * 30
    lines = written(screen, code)
    assert lines[1] == "for a in range(10): print('a long line')"
    assert lines[3:6] == ["x" * 23, "x" * 23, "x" * 14 + " so"]
    assert lines[6:] == ["字" * 11, "字" * 11, "字" * 8]


@given(
    st.lists(st.text(alphabet="ab,é字\u0301", min_size=1, max_size=COLUMNS - 3), min_size=1, max_size=30),
    st.lists(st.sampled_from(" \n"), min_size=30, max_size=30),
    st.integers(1, 9),
)
def test_any_words_in_any_pieces(words: list[str], between: list[str], size: int) -> None:
    text = "".join(word + space for word, space in zip(words, between, strict=False))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shutil, "get_terminal_size", lambda: terminal_size((COLUMNS, 24)))
        patched.setenv("TERM", "xterm")
        lines = written(Screen(), *(text[at : at + size] for at in range(0, len(text), size)))
    assert max(map(_width, lines)) < COLUMNS
    assert "".join("".join(lines).split()) == "".join(text.split())
    whole = [word for word in words if "字" not in word]
    assert all(any(word in line.split() or word in line for line in lines) for word in whole)


@pytest.mark.parametrize("term", ["dumb", None])
def test_elsewhere_nothing_is_changed(term: str | None, screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a line that is longer than twenty-four columns\tand\x07 more " * 3
    if term is None:
        monkeypatch.setattr(Screen, "isatty", lambda self: False)
    else:
        monkeypatch.setenv("TERM", term)
    written(screen, *text)
    assert screen.getvalue() == text


def test_prompt_and_answer_are_one_text(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", errors)
    printer = AnswerPrinter()
    printer.on_reasoning("thinking about very many things")
    printer.on_prompt("Once upon a time there ")
    printer.on_text("was a queen")
    assert screen.lines() == ["Once upon a time there", "was a queen"]
    assert errors.lines()[:2] == ["thinking about very ", "many things"]
    assert "\x1b[2m" in errors.getvalue()
