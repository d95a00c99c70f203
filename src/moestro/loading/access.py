"""How the hub is asked while a model is loaded: with which token, into which cache, or not at all.

    >>> with accessing(Access(cache_dir="/data/hub", local_only=True)):
    ...     access().cache.as_posix()
    '/data/hub'

Inside a block of `accessing`, this thread's requests are made so. What other threads fetch has its access in `Wanted`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Access:
    """A token (True for the one that is kept, False for none, None for it where there is one), a cache's folder (None
    for the hub's own), and whether nothing is asked of the hub."""

    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | None = None
    local_only: bool = False

    @property
    def cache(self) -> Path:
        """The folder of the cache."""
        if self.cache_dir is not None:
            return Path(self.cache_dir).expanduser()
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE)


_DEFAULT = Access()
_ACCESS: ContextVar[Access] = ContextVar("access", default=_DEFAULT)


def access() -> Access:
    """That of the block that this thread is in."""
    return _ACCESS.get()


@contextmanager
def accessing(way: Access) -> Iterator[None]:
    """Ask the hub so inside the block."""
    token = _ACCESS.set(way)
    try:
        yield
    finally:
        _ACCESS.reset(token)
