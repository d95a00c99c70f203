"""What the commands read from a terminal or a pipe, and what they say beside their output. Imports no torch."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event

from .errors import RequestError


def read_prompt(prompt: str | None) -> str:
    """A prompt as it was given, or all of standard input where it is - or left out.

    Raises:
        RequestError: there is none, and a person sits at standard input.
    """
    if prompt is None and sys.stdin.isatty():
        raise RequestError('no prompt; write it behind the model, like "Once upon a time", or - to read it from a pipe')
    return sys.stdin.read() if prompt in (None, "-") else str(prompt)


def read_line() -> str | None:
    """One message from the user; None at the end of input. Ctrl-C clears the line."""
    while True:
        try:
            return input("> ")
        except KeyboardInterrupt:
            say("\nCtrl-D leaves")
        except EOFError:
            print()
            return None


@contextmanager
def stop_on_interrupt() -> Iterator[Event]:
    """Within it, the first Ctrl-C sets an event; the second raises, should a long prompt still be read."""
    stopped = Event()

    def interrupt(*_: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def say(text: str) -> None:
    """Print beside the output, on standard error."""
    print(text, file=sys.stderr)
