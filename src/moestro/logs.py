"""What Moestro logs: lines of the logger "moestro" on standard error, without tracebacks.

Warnings are logged by default. `moestro -v` adds INFO: what is loaded, with which options, and what did not go as
planned. `-vv` adds DEBUG: each file of weights, the facts that a plan was made from, the plan, and what was fused. The
environment variable MOESTRO_LOG names a level for the command line and for programs that import moestro. A program
that has set up logging itself, so that the root logger has a handler, gets the records there instead. Prompts and
generated text are never logged.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import traceback

from .errors import RequestError, first_line

VARIABLE = "MOESTRO_LOG"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class _Line(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {record.getMessage()}"


def set_up_logging(verbose: int | None = None) -> None:
    """Log from a level on: INFO or DEBUG at 1 or 2 of `verbose`, else that of MOESTRO_LOG, else WARNING.

    Args:
        verbose: how often the command line has -v; None in a program that imports moestro, where nothing is set up
            unless MOESTRO_LOG is set.

    Raises:
        RequestError: MOESTRO_LOG is no level.
    """
    named = os.environ.get(VARIABLE, "")
    level = named.upper() or "WARNING"
    if level not in _LEVELS:
        raise RequestError(f"{VARIABLE}={named}: needs one of {', '.join(_LEVELS)}")
    if verbose:
        level = "INFO" if verbose == 1 else "DEBUG"
    logger = logging.getLogger("moestro")
    if verbose is None and not named:
        return
    logger.setLevel(level)
    if not logger.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Line())
        logger.addHandler(handler)


def keep_traceback(error: BaseException) -> str:
    """One line on an unexpected error, whose traceback is written to a new file; to standard error if it cannot be."""
    lines = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="moestro-", suffix=".txt", delete=False, errors="replace") as file:
            file.write(lines)
            where = file.name
    except OSError:
        print(lines, file=sys.stderr)
        where = "the lines above"
    return f"{type(error).__name__}: {first_line(error)}; this was not expected, its traceback is in {where}"
