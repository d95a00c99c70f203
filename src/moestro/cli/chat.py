"""The conversation of `moestro chat`: reads messages and commands, prints answers. Imports no torch.

In a terminal a message is edited in place, the arrow keys bring back earlier ones, and a pasted text of several lines
is one message. From a pipe each line is a message.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from .terminal import AnswerPrinter, ReadingBar, print_figures, print_warnings, say, stop_on_interrupt

if TYPE_CHECKING:
    from ..text.chat import ChatSession

HELP = """\
/help           list these commands
/new            forget the conversation and start over; what /system said stays
/system TEXT    what the model is told first, from the next answer on; without TEXT, print it
/save FILE      write the conversation: as JSON where FILE ends in .json, else as text
/exit           leave, as Ctrl-D does
Ctrl-C stops an answer, Alt-Enter begins a new line, the arrow keys bring back earlier messages. A message that begins
with a command's name is sent with a space before it."""
_COMMAND = re.compile(r"/(\w*)(?:[ \t]+(.*))?")  # of one line; /usr/bin or // begins a message
_PROMPT = "> "


class Editor:
    """Reads messages from a terminal by prompt_toolkit; earlier ones are kept until the program ends, in memory.

    Args:
        given: arguments of prompt_toolkit's session in the place of those for this terminal.
    """

    def __init__(self, **given: Any) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.output.defaults import create_output
        from prompt_toolkit.output.vt100 import Vt100_Output

        keys = KeyBindings()

        @keys.add("enter")
        def _(event: Any) -> None:
            event.current_buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def _(event: Any) -> None:
            event.current_buffer.insert_text("\n")

        if "output" not in given:
            given["output"] = create_output(always_prefer_tty=True)
            if isinstance(given["output"], Vt100_Output):
                given["output"].enable_cpr = False  # it would ask the terminal where the cursor is, and warn
        self._session: Any = PromptSession(multiline=True, key_bindings=keys, enable_suspend=True, **given)

    def __call__(self) -> str | None:
        """The next message; None at Ctrl-D. Ctrl-C clears what was typed."""
        while True:
            try:
                text: str = self._session.prompt(_PROMPT, prompt_continuation=" " * len(_PROMPT))
            except KeyboardInterrupt:
                say("Ctrl-D leaves")
            except EOFError:
                return None
            else:
                return text


def read_piped() -> str | None:
    """The next line of standard input; None at its end."""
    line = sys.stdin.readline()
    return line.removesuffix("\n") if line else None


def _message(text: str) -> str:
    """What the model is sent of what was typed or pasted."""
    return (text.lstrip() if text.lstrip().startswith("/") else text).rstrip("\n")


class Conversation:
    """A chat with a loaded model.

    Args:
        reads: gives the next message; None at the end.
        is_typed: whether a user is there to correct what is refused; otherwise that ends the conversation.
        figures: print how fast each answer went.
    """

    def __init__(
        self, session: ChatSession, reads: Callable[[], str | None], *, is_typed: bool, figures: bool = False
    ) -> None:
        self._session, self._reads, self._is_typed, self._figures = session, reads, is_typed, figures
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda rest: say(HELP),
            "new": self._new,
            "system": self._system,
            "save": self._save,
        }

    def go_on(self) -> None:
        """Answer until the end.

        Raises:
            RequestError: something is refused, and no user is there.
        """
        while (text := self._reads()) is not None:
            command = _COMMAND.fullmatch(text.rstrip())
            if command is not None and command[1] == "exit":
                return
            try:
                if command is not None:
                    self._obey(command[1], (command[2] or "").strip())
                elif text.strip():
                    self._answer(_message(text))
            except RequestError as error:
                if not self._is_typed:
                    raise
                say(str(error))
            except KeyboardInterrupt:
                say("\nstopped; that message is forgotten")

    def _obey(self, name: str, rest: str) -> None:
        if name not in self._commands:
            there_are = ", ".join(f"/{one}" for one in (*self._commands, "exit"))
            raise RequestError(
                f"no command /{name}; there are {there_are}. To send it as a message, put a space before it"
            )
        self._commands[name](rest)

    def _new(self, rest: str) -> None:
        if rest:
            raise RequestError(f"/new takes nothing behind it, and {rest!r} was not sent")
        self._session.reset()
        say("the conversation is forgotten")

    def _system(self, text: str) -> None:
        if text:
            self._session.tell_first(text)
        told = self._session.system
        say("the model is told nothing first" if told is None else f"the model is told first: {told}")

    def _save(self, name: str) -> None:
        if not name:
            raise RequestError("/save needs a file, like /save talk.txt or /save talk.json")
        messages, path = self._session.messages, Path(name).expanduser()
        if path.suffix == ".json":
            text = json.dumps(messages, ensure_ascii=False, indent=1)
        else:
            text = "\n".join(f"{one['role']}: {one['content']}\n" for one in messages)
        try:
            with path.open("x", encoding="utf-8", errors="replace") as file:
                file.write(text)
        except FileExistsError:
            raise RequestError(f"{name} is there already; name another file") from None
        except OSError as error:
            raise RequestError(f"{name} cannot be written ({error.strerror}); name another file") from None
        say(f"{len(messages)} messages are in {name}")

    def _answer(self, text: str) -> None:
        printer = AnswerPrinter()
        try:
            with ReadingBar() as bar, stop_on_interrupt(bar.is_reading) as stopped:
                result = self._session.ask(
                    text,
                    on_text=printer.on_text,
                    on_reasoning=printer.on_reasoning,
                    should_stop=stopped.is_set,
                    on_progress=bar.on_progress,
                )
        except RequestError as error:
            raise RequestError(f"{error}; /new starts over" if self._is_typed else str(error)) from error
        print()
        if self._figures:
            print_figures(result)
        else:
            print_warnings(result)
            if result.context_full:
                say("the context is full; /new starts over")
