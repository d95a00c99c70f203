"""`moestro chat` as it is typed: editing, pasted texts, commands; the terminal is prompt_toolkit's own pipe."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from threading import Timer
from types import SimpleNamespace
from typing import Any

import pytest
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from moestro.cli import chat
from moestro.cli.chat import HELP, Conversation, Editor, read_piped
from moestro.errors import RequestError
from moestro.text.faults import PageFaults

ENTER, CTRL_C, CTRL_D, UP, LEFT, ALT_ENTER = "\r", "\x03", "\x04", "\x1b[A", "\x1b[D", "\x1b\r"


def pasted(text: str) -> str:
    """What a terminal sends for a pasted text."""
    return f"\x1b[200~{text}\x1b[201~"


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    with create_pipe_input() as keys:
        yield keys


TYPED = {
    "a line": ("Hello" + ENTER, ["Hello"]),
    "two lines": ("one" + ENTER + "two" + ENTER, ["one", "two"]),
    "edited": ("Helo" + LEFT + "l" + ENTER, ["Hello"]),
    "a pasted text": (pasted("def f():\n    return 1\n\nWhy?") + ENTER, ["def f():\n    return 1\n\nWhy?"]),
    "a pasted text of a Windows file": (pasted("a\r\nb") + ENTER, ["a\nb"]),
    "two pasted texts and words": (pasted("a\nb") + " and " + pasted("c\nd") + ENTER, ["a\nb and c\nd"]),
    "a pasted Enter sends nothing": (pasted("a\n") + pasted("b\n") + ENTER, ["a\nb\n"]),
    "a new line": ("one" + ALT_ENTER + "two" + ENTER, ["one\ntwo"]),
    "cleared by Ctrl-C": ("wrong" + CTRL_C + "right" + ENTER, ["right"]),
    "other scripts": ("naïve 東京 🙂" + ENTER, ["naïve 東京 🙂"]),
}


@pytest.mark.parametrize("how", TYPED)
def test_what_is_typed_and_pasted(how: str, keys: PipeInput) -> None:
    sent, expected = TYPED[how]
    editor = Editor(input=keys, output=DummyOutput())
    keys.send_text(sent + CTRL_D)
    assert [editor() for _ in expected] == expected
    assert editor() is None


def test_an_earlier_message_comes_back(keys: PipeInput) -> None:
    editor = Editor(input=keys, output=DummyOutput())
    keys.send_text("one" + ENTER + pasted("a\nb") + ENTER)
    assert [editor(), editor()] == ["one", "a\nb"]
    Timer(0.3, lambda: keys.send_text(UP + UP + UP + ENTER)).start()  # the editor reads its history while it waits
    assert editor() == "one"


class Session:
    """A conversation without a model: the answer is the message in capitals."""

    def __init__(self) -> None:
        self.system: str | None = None
        self.messages: list[dict[str, str]] = []
        self.asked: list[str] = []
        self.faults, self.context_full = PageFaults(0, 0, 9, 1.0), False

    def reset(self) -> None:
        self.messages = []

    def tell_first(self, text: str) -> None:
        if text == "refused":
            raise RequestError("the chat template refuses it")
        self.system = text

    def ask(self, text: str, *, on_text: Any, **_: Any) -> Any:
        if text == "too long":
            raise RequestError("the prompt has 600 tokens, but the model's context is 512; shorten it")
        self.asked.append(text)
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": text.upper()}]
        on_text(text.upper())
        return SimpleNamespace(faults=self.faults, context_full=self.context_full)


def talk(session: Any, *said: str, is_typed: bool = True, figures: bool = False) -> None:
    lines = iter((*said, None))
    Conversation(session, lambda: next(lines), is_typed=is_typed, figures=figures).go_on()


def test_messages_are_answered_and_nothing_else_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    session = Session()
    talk(
        session, "hi", "", "   ", "a\nb\n", "/usr/bin is what?", " /new things", "//", "/* two\nlines */", "/exit", "x"
    )
    assert session.asked == ["hi", "a\nb", "/usr/bin is what?", "/new things", "//", "/* two\nlines */"]
    printed = capsys.readouterr()
    assert printed.out == "".join(f"{text.upper()}\n" for text in session.asked)
    assert not printed.err


def test_figures_are_printed_where_they_are_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "print_figures", lambda result: chat.say("decode 7.0 tok/s"))
    talk(Session(), "hi", figures=True)
    assert capsys.readouterr().err == "decode 7.0 tok/s\n"


def test_what_matters_is_said_without_figures_too(capsys: pytest.CaptureFixture[str]) -> None:
    session = Session()
    session.faults, session.context_full = PageFaults(0, 90_000, 10, 20.0), True
    talk(session, "hi")
    slow, full = capsys.readouterr().err.splitlines()
    assert slow.startswith("warning: the answer waited for the disk: 10000 pages for each token, at least 45% of")
    assert full == "the context is full; /new starts over"


COMMANDS = {
    "/help": HELP.splitlines()[0],
    "/new": "the conversation is forgotten",
    "/system": "the model is told nothing first",
    "/system You tell fairy tales. ": "the model is told first: You tell fairy tales.",
    "/system refused": "the chat template refuses it",
    "/save": "/save needs a file, like",
    "/save /nowhere/talk.txt": "/nowhere/talk.txt cannot be written (No such file or directory)",
    f"/save {__file__}": "is there already; name another file",
    "/nwe": "no command /nwe; there are /help, /new, /system, /save, /exit. To send it as a message, put a space",
    "/": "no command /;",
    "/new day": "/new takes nothing behind it, and 'day' was not sent",
    "/HELP": "no command /HELP;",
    "too long": "the model's context is 512; shorten it; /new starts over",
}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_answers_and_the_talk_goes_on(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    session = Session()
    talk(session, line, "hi")
    assert COMMANDS[line] in capsys.readouterr().err
    assert session.asked == ["hi"]


def test_every_command_is_in_the_help() -> None:
    known = {*Conversation(Session(), lambda: None, is_typed=True)._commands, "exit"}  # type: ignore[arg-type]
    assert {line.split()[0] for line in HELP.splitlines() if line.startswith("/")} == {f"/{name}" for name in known}


def test_a_conversation_is_saved(tmp_path: Path) -> None:
    session = Session()
    talk(session, "naïve\nhi", f"/save {tmp_path / 'a talk.txt'}", f"/save {tmp_path / 'talk.json'}")
    assert (tmp_path / "a talk.txt").read_text("utf-8") == "user: naïve\nhi\n\nassistant: NAÏVE\nHI\n"
    assert json.loads((tmp_path / "talk.json").read_text("utf-8")) == session.messages


@pytest.mark.parametrize("line", ["/nwe", "/save", "too long"])
def test_what_is_refused_ends_a_talk_that_is_piped(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    session: Any = Session()
    monkeypatch.setattr("sys.stdin", io.StringIO(f"hi\n{line}\nnever"))
    with pytest.raises(RequestError) as found:
        Conversation(session, read_piped, is_typed=False).go_on()
    assert session.asked == ["hi"]
    assert "/new starts over" not in str(found.value)


def test_a_pipe_has_a_message_on_each_line(monkeypatch: pytest.MonkeyPatch) -> None:
    session: Any = Session()
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\n/system Be brief.\ntwo\r\nthree"))
    Conversation(session, read_piped, is_typed=False).go_on()
    assert session.asked == ["one", "two\r", "three"]
    assert session.system == "Be brief."
