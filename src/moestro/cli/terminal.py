"""What the command line reads from and writes to a terminal or a pipe. Imports no torch."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from threading import Event
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from ..planning.budget import format_bytes
from ..progress import Bar
from .envelope import print_json
from .wrapping import Wrapped

if TYPE_CHECKING:
    from ..text.generation import TextResult


_SHOWN_AFTER_S = 1.0


def use_any_bytes() -> None:
    """Pass input that is no valid text on to the tokenizer, which refuses it; print "?" for what cannot be written."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "replace")):
        if isinstance(stream, TextIOWrapper):  # not where a test or a notebook has put another
            stream.reconfigure(errors=errors)


def read_prompt(prompt: str | None) -> str:
    """The prompt of a command, read from standard input where it is "-" or missing.

    Raises:
        RequestError: it is missing, and standard input is a terminal.
    """
    if prompt is None and sys.stdin.isatty():
        raise RequestError('no prompt; write it behind the model, like "Once upon a time", or - to read it from a pipe')
    return sys.stdin.read() if prompt in (None, "-") else str(prompt)


class ReadingBar:
    """Shows on standard error, where that is a terminal, how far a long prompt has been read.

    It comes after a second, says how long it will take, and goes when the prompt has been read.
    """

    def __init__(self) -> None:
        self._is_read = False
        self._bar = Bar("reading the prompt", 1.0, after_s=_SHOWN_AFTER_S)

    def on_progress(self, share: float) -> None:
        """So much of the prompt has been read, from 0 to 1."""
        self._is_read = share >= 1
        if self._is_read:
            self.close()
        else:
            self._bar.reach(share)

    def is_reading(self) -> bool:
        """Whether there is more of the prompt to read."""
        return not self._is_read

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def __enter__(self) -> ReadingBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def stop_on_interrupt(is_reading: Callable[[], bool] = lambda: False) -> Iterator[Event]:
    """Inside the block, the first Ctrl-C sets an event, by which an answer ends; the second one raises.

    The first one raises too while the prompt is still read, since that has nothing to end with.
    """
    stopped = Event()

    def interrupt(*_: object) -> None:
        if stopped.is_set() or is_reading():
            raise KeyboardInterrupt
        stopped.set()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


class AnswerPrinter:
    """Prints an answer as it comes; what the model thinks aloud goes to standard error, dimmed on a terminal."""

    def __init__(self) -> None:
        self._is_thinking = False
        self._answer, self._thoughts = Wrapped(), Wrapped(is_error=True)

    def on_prompt(self, text: str) -> None:
        """Print the text that the answer continues."""
        self._answer.write(text)

    def on_reasoning(self, text: str) -> None:
        """Print a piece of the reasoning."""
        self._is_thinking = True
        dim, normal = ("\x1b[2m", "\x1b[22m") if sys.stderr.isatty() else ("", "")
        sys.stderr.write(dim)
        self._thoughts.write(text)
        sys.stderr.write(normal)
        sys.stderr.flush()

    def on_text(self, text: str) -> None:
        """Print a piece of the answer, after empty lines if reasoning came before it."""
        if self._is_thinking:
            self._is_thinking = False
            say("\n")
        self._answer.write(text)


def print_figures(result: TextResult) -> None:
    """Print the closing figures on standard error, so that standard output is the text alone."""
    kept = f" ({result.reused_tokens} more were there from before)" if result.reused_tokens else ""
    lines = {
        "prompt": f"{result.prompt_tokens - result.reused_tokens} tokens{kept} read at {result.prefill_tok_s:.1f} "
        f"tokens a second; the answer began after {result.ttft_s:.3f} s",
        "answer": f"{result.new_tokens} tokens"
        + ("" if result.decode_tok_s is None else f" written at {result.decode_tok_s:.1f} tokens a second")
        + ("; the context is full" if result.context_full else ""),
    }
    if result.hit_rate is not None:
        copied = format_bytes(result.bytes_moved)
        lines["experts"] = f"{result.hit_rate:.1%} of those that were needed were on the GPU; {copied} copied there"
    if result.capture is not None:
        lines["graphs"] = result.capture.describe()
    if result.assisted is not None:
        lines["guesses"] = result.assisted.describe()
    if result.faults.prefill or result.faults.decode:
        lines["disk"] = result.faults.describe()
    names = {"ram": "RAM", "gpu": "GPU memory"}
    used = (f"{format_bytes(n)} of {names.get(tier, tier)}" for tier, n in result.peak_bytes.items() if n)
    lines["memory"] = f"{', '.join(used)} at most"
    say("\n" + "\n".join(f"{name:8} {text}" for name, text in lines.items()))
    print_warnings(result)


def print_warnings(result: TextResult) -> None:
    """Print on standard error what slowed an answer down and can be helped."""
    if (warning := result.faults.warning()) is not None:
        say(f"warning: {warning}")


def show(report: Any, as_json: bool, model: str | None = None, revision: str | None = None) -> None:
    """Print a report, of a model or of none: as a line of JSON, or as it prints itself."""
    if as_json:
        print_json(report.to_json(), model, revision)
    else:
        report.print()


def say(text: str) -> None:
    """Print a line on standard error."""
    print(text, file=sys.stderr)
