"""An engine, ours or another, in a process of its own that answers each line of JSON with another.

`Worker` is the parent's half and `serve` the child's. What the engine prints goes to a file and never among
the answers. A child that dies, or is silent for longer than its limit, is one RequestError with its last
words; and a child ends when its standard input does, so none outlives its parent.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from ..errors import RequestError
from ..planning.spelling import as_flags

START_LIMIT_S = 900.0  # loading may read tens of GiB from a slow disk
LIMIT_S = 900.0  # of one answer
SETTLE_LIMIT_S, QUIET_S = 2.0, 0.02  # a process that took under a twentieth of 20 ms sleeps
GRACE_S = 5.0  # for the child to end by itself

Handlers = Mapping[str, Callable[..., Any]]


class Worker:
    """A child process `python -m module arguments`, ready when its constructor returns.

    `card` is what the child said of itself: versions, the kernels it chose.

    Raises:
        RequestError: the child could not start, or did not answer within `start_limit_s` seconds.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str] = (),
        *,
        python: str = sys.executable,
        start_limit_s: float = START_LIMIT_S,
        limit_s: float = LIMIT_S,
    ) -> None:
        self._name = module.rpartition(".")[2]
        self._limit_s = limit_s
        self._unread = b""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, closed by close()
        command = [python, "-m", module, *arguments]
        # A file for what the child prints: a pipe that is not read fills up, and the child then waits forever.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, bufsize=0
        )
        try:
            self.card: dict[str, Any] = self._answer(start_limit_s)
        except BaseException:
            self.close()
            raise

    def ask(self, question: str, **arguments: Any) -> Any:
        """Send a question with its arguments; return the child's answer, which is JSON.

        Raises:
            RequestError: the child refused, died, was silent for too long or had been closed.
        """
        if self._process.stdin is None or self._process.stdin.closed:
            raise RequestError(f"the {self._name} worker is closed; start another")
        line = json.dumps({"ask": question, **arguments}) + "\n"
        with suppress(BrokenPipeError):  # it is dead: reading its answer tells how
            self._process.stdin.write(line.encode())
        return self._answer(self._limit_s)

    def close(self) -> None:
        """End the child; kill it if it does not end by itself within `GRACE_S` seconds."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self, limit_s: float) -> Any:
        line = self._read_line(limit_s)
        try:
            answer = json.loads(line)
            if "error" not in answer:
                return answer["value"]
        except (ValueError, KeyError, TypeError):
            self._fail(f"answered what is no answer: {line[:80]!r}")
        raise RequestError(f"the {self._name} worker: {answer['error']}")

    def _read_line(self, limit_s: float) -> bytes:
        assert self._process.stdout is not None
        deadline_s = time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, deadline_s - time.monotonic())):
                    self._fail(f"gave no answer for {limit_s:g} s and was stopped")
                piece = os.read(self._process.stdout.fileno(), 65536)
                if not piece:
                    self._fail(f"died {self._cause()}")
                self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _cause(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S)
        code = self._process.returncode
        if code is None:
            return "without ending"
        with suppress(ValueError):  # no signal of that number
            return f"of {signal.Signals(-code).name}"
        return f"with exit status {code}"

    def _fail(self, what: str) -> None:
        """Stop the child and say what happened, with the last line that it printed."""
        self._process.kill()
        self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        spoken = [line.strip() for line in lines if any(c.isalnum() for c in line)]
        self.close()
        raise RequestError(f"the {self._name} worker {what}" + (f"; last: {spoken[-1][:300]}" if spoken else ""))


class EngineWorker(Worker):
    """A worker with a whole model, of Moestro or of another engine: all engines answer these two questions."""

    def prefill_s(self, tokens: int) -> float:
        """Seconds of a prefill: a prompt of random tokens into an empty cache, with the logits of its last token."""
        return float(self.ask("prefill_s", tokens=tokens))

    def decode_s(self, context: int, tokens: int) -> float:
        """Seconds a token: the mean of `tokens` random tokens, decoded one by one after `context` cached tokens."""
        return float(self.ask("decode_s", context=context, tokens=tokens))


def serve(start: Callable[[], tuple[dict[str, Any], Handlers]], *, ours: bool = False) -> None:
    """Run in the child: start, send the card, then answer questions until the standard input ends.

    An exception is an answer too, so the loaded model stays when an engine refuses a request. The child answers only
    when all its threads sleep, so that engines can be measured in turns.

    Args:
        start: loads what is measured; returns the card and a function for each question. Libraries that use OpenMP
            must be imported in it, not before.
        ours: keep the OpenMP wait policy that Moestro sets for its own torch; another engine gets its own default.
    """
    if not ours:
        os.environ.pop("OMP_WAIT_POLICY", None)  # here, since importing this package has set it
    with as_flags(), os.fdopen(os.dup(1), "w") as answers:  # what is refused is shown by a command
        os.dup2(2, 1)  # what a library prints to its standard output, in C too, joins the log

        def send(**answer: Any) -> None:
            print(json.dumps(answer), file=answers, flush=True)

        try:
            card, handlers = start()
            settle()
        except Exception as error:
            send(error=describe(error))
            raise SystemExit(1) from error
        send(value=card)
        for line in sys.stdin:
            request = json.loads(line)
            try:
                value = handlers[request.pop("ask")](**request)
                settle()
                send(value=value)
            except Exception as error:
                send(error=describe(error))


def settle(limit_s: float = SETTLE_LIMIT_S) -> None:
    """Wait until this process takes no CPU time.

    Idle threads spin for a while and then sleep: libgomp's (llama.cpp) for 10 ms, kt-kernel's for 40 ms.

    Raises:
        RequestError: they do not sleep, so they would take CPU time from the engine that is measured next.
    """
    deadline_s = time.monotonic() + limit_s
    while time.monotonic() < deadline_s:
        before_s = time.process_time()
        time.sleep(QUIET_S)
        if time.process_time() - before_s < QUIET_S / 20:
            return
    raise RequestError(f"its idle threads still spin after {limit_s:g} s; unset OMP_WAIT_POLICY")


def describe(error: Exception) -> str:
    """An exception in one line, with its type unless it is one of Moestro's own."""
    text = " ".join(str(error).split()) or "without a word"
    return text if isinstance(error, RequestError) else f"{type(error).__name__}: {text}"
