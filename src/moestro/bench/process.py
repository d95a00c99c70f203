"""Run a command with a time limit and keep its output."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

GRACE_S = 8.0  # between interrupting a late process and killing it


@dataclass(frozen=True, slots=True)
class Finished:
    """How a process ended. wall_s: seconds it ran. limit_s: its time limit, if it was stopped there, else None."""

    code: int
    out: str
    err: str
    wall_s: float
    limit_s: float | None = None

    def last_words(self) -> str:
        """Why it failed: the time limit, or its last line with words in it, without this machine's paths."""
        lines = [line.strip(" │╭╮╰╯─!=") for line in (self.err.strip() or self.out).splitlines()]
        spoken = [scrub(line)[:300] for line in lines if re.search(r"\w", line)]
        if self.limit_s is not None:
            return f"stopped at its limit of {self.limit_s:.0f} s" + (f"; last: {spoken[-1]}" if spoken else "")
        return spoken[-1] if spoken else f"exit status {self.code} without a word"


def finish(argv: Sequence[str], limit_s: float) -> Finished:
    """Run a command until it ends. At its time limit interrupt it, and kill it if it has not ended after `GRACE_S`."""
    start_s = time.monotonic()
    late = False
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        # Files, not pipes: a grandchild that holds a pipe open would make this wait for its end.
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err, text=True, start_new_session=True
        )
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            late = True
            _end_group(process, signal.SIGINT)  # so that pytest still writes its counts
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        finally:
            _end_group(process, None)
            process.wait()
        out.seek(0)
        err.seek(0)
        wall_s = round(time.monotonic() - start_s, 1)
        return Finished(process.returncode, out.read(), err.read(), wall_s, limit_s if late else None)


def _end_group(process: subprocess.Popen[str], number: signal.Signals | None) -> None:
    """Send a signal, None for the one that kills, to a process and the children that it left behind."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number or signal.SIGKILL)
    elif number is None:  # Windows has no groups that a signal reaches
        process.kill()


def scrub(text: str) -> str:
    """Text without the paths of this machine, so that a report can be shared."""
    for path, name in ((sys.executable, "python"), (str(Path.cwd()), "."), (sys.prefix, "venv")):
        text = text.replace(path, name)
    return text.replace(str(Path.home()), "~")
