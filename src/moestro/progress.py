"""Bars of progress, all in one style: on standard error where that is a terminal, gone when the work is done.

    >>> with Bar("packing experts", total=8, unit="layers") as bar:
    ...     bar.advance(1)

None is shown without a terminal, inside `quiet`, where the bars of huggingface_hub or Transformers were disabled, or
while another one is there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from threading import Lock
from time import monotonic
from typing import Any, TypeVar

T = TypeVar("T")
BYTES, SHARE = "bytes", "share"  # units that are shown in ways of their own
_is_quiet = False
_shown: Bar | None = None
_listener: Callable[[str, float | None], None] | None = None


@contextmanager
def quiet(wanted: bool = True) -> Iterator[None]:
    """Inside the block, where that is wanted, show no bar and say nothing else that only tells how far something is."""
    global _is_quiet
    before, _is_quiet = _is_quiet, _is_quiet or wanted
    try:
        yield
    finally:
        _is_quiet = before


def is_quiet() -> bool:
    """Whether the user, or a program, wants to hear nothing of how far something is, terminal or not."""
    hub: Any = sys.modules.get("huggingface_hub.utils")
    return _is_quiet or (hub is not None and bool(hub.are_progress_bars_disabled()))


@contextmanager
def heard(listener: Callable[[str, float | None], None]) -> Iterator[None]:
    """Inside the block, tell a function what each bar is of and which share of it is done, None if that is not known.

    It is called for every step of a bar, shown or not, in whatever thread that is, and must not wait.
    """
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


@contextmanager
def without_bars_of_transformers() -> Iterator[None]:
    """Inside the block Transformers shows no bars of its own, and what is loaded in it none of ours."""
    from huggingface_hub import utils as hub
    from transformers.utils import logging as theirs

    shown, shown_by_hub = theirs.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    theirs.disable_progress_bar()  # which disables those of the hub too
    try:
        yield
    finally:
        if shown:
            theirs.enable_progress_bar()
        if shown_by_hub:
            hub.enable_progress_bars()
        elif shown:
            hub.disable_progress_bars()


class Bar:
    """Shows how far something is, and how long it will take.

    Args:
        what: is done, in words. total: of it; None where that is not known.
        unit: what is counted, `BYTES`, or `SHARE` for parts of the whole.
        after_s: seconds after which the bar comes, for what mostly takes less.
    """

    def __init__(self, what: str, total: float | None, unit: str = SHARE, *, after_s: float = 0.0) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done, self._begin_s, self._after_s = 0.0, monotonic(), after_s
        self._display: Any = None
        self._lock = Lock()  # files are fetched by several threads

    def advance(self, amount: float) -> None:
        """So much more is done; negative where some of it is to be done again."""
        with self._lock:
            self._reach(self._done + amount)

    def reach(self, done: float) -> None:
        """So much is done in all."""
        with self._lock:
            self._reach(done)

    def close(self) -> None:
        """Take the bar away."""
        global _shown
        if self._display is not None:
            self._display.stop()
            self._display = _shown = None

    def _reach(self, done: float) -> None:
        self._done = done
        self._tell()
        self._show()
        if self._display is not None:
            self._display.update(self._task, completed=done)

    def _show(self) -> None:
        global _shown
        if self._display is None and monotonic() - self._begin_s >= self._after_s and _can_be_seen():
            self._display, _shown = _made(self._unit), self
            self._task = self._display.add_task(self._what, total=self._total, unit=self._unit)
            self._display.start()

    def _tell(self) -> None:
        if _listener is not None:
            _listener(self._what, self._done / self._total if self._total else None)

    def __enter__(self) -> Bar:
        with self._lock:
            self._tell()
            self._show()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def counted(items: Iterable[T], what: str, unit: str) -> Iterator[T]:
    """The items one by one, with a bar that counts those that are done."""
    with Bar(what, len(items) if isinstance(items, Sized) else None, unit) as bar:
        for item in items:
            yield item
            bar.advance(1)


def _can_be_seen() -> bool:
    theirs: Any = sys.modules.get("transformers.utils.logging")
    are_wanted = theirs is None or theirs.is_progress_bar_enabled()
    return _shown is None and sys.stderr.isatty() and are_wanted and not is_quiet()


def _made(unit: str) -> Any:
    """A display of rich, not started yet."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from .console import console

    counts: tuple[Any, ...] = (TextColumn("{task.completed:.0f} of {task.total} {task.fields[unit]}"),)
    if unit == BYTES:
        counts = (DownloadColumn(binary_units=True), TransferSpeedColumn())
    elif unit == SHARE:
        counts = (TaskProgressColumn(),)
    columns = (TextColumn("{task.description}"), BarColumn(), *counts, TimeRemainingColumn())
    return Progress(*columns, console=console(stderr=True), transient=True)
