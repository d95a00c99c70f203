"""Remembers, while a model is loaded, what would be asked for again: a repository's list of files, an opened GGUF file.

Inside a block of `remembering`, `once` makes each thing a single time. Outside of one nothing is remembered, so a later
load sees what has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")
_FOUND: ContextVar[dict[Hashable, Any] | None] = ContextVar("found", default=None)


@contextmanager
def remembering() -> Iterator[None]:
    """Inside the block, `once` makes each thing a single time in this thread; a block within another is part of it."""
    if _FOUND.get() is not None:
        yield
        return
    token = _FOUND.set({})
    try:
        yield
    finally:
        _FOUND.reset(token)


def known(key: Hashable) -> Any:
    """What `once` made for an equal key in this block of `remembering`; None where there is none."""
    return (_FOUND.get() or {}).get(key)


def once(key: Hashable, make: Callable[[], T]) -> T:
    """What `make` returns; inside a block of `remembering`, what it returned for an equal key before."""
    found = _FOUND.get()
    if found is None:
        return make()
    if key not in found:
        found[key] = make()
    kept: T = found[key]
    return kept
