"""How a message names an option: as an argument of `moestro.load`, or on the command line as it is typed there.

    >>> spelled("expert_bits", 5), spelled("pack_dense", False), spelled("gpu_memory")
    ('expert_bits=5', 'pack_dense=False', 'gpu_memory')
    >>> with as_flags():
    ...     spelled("expert_bits", 5), spelled("pack_dense", False), spelled("gpu_memory")
    ('--expert-bits 5', '--no-pack-dense', '--gpu-memory')

A message is put together where something is refused, which may be in any thread, so the way is the process's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

_are_flags = False


class _Left(Enum):
    OUT = 0


def flag(name: str) -> str:
    """The option's name on the command line."""
    return f"--{name.replace('_', '-')}"


@contextmanager
def as_flags() -> Iterator[None]:
    """Inside the block, messages name options as the command line does."""
    global _are_flags
    before, _are_flags = _are_flags, True
    try:
        yield
    finally:
        _are_flags = before


def spelled(name: str, value: Any = _Left.OUT, *, quoted: bool = False) -> str:
    """An option as the user would write it.

    Args:
        name: of the field. value: that it was given, or that it should be; left out where the option itself is meant.
        quoted: write a text in quotes on the command line too, since it may be empty or look like part of the message.
    """
    if not _are_flags:
        return name if value is _Left.OUT else f"{name}={value!r}"
    if value is _Left.OUT or value is True:
        return flag(name)
    if value is False:
        return flag(f"no_{name}")
    return f"{flag(name)} {value!r}" if quoted else f"{flag(name)} {value}"
