"""Amounts of memory as people write them.

    >>> Budget.parse(gpu_memory="12GiB", ram="48GiB")
    Budget(gpu_bytes=12884901888, ram_bytes=51539607552)

Sizes are ints in bytes everywhere inside; GiB = 2**30, GB = 10**9. Knows nothing of the machine: what
it has is passed in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import BudgetError, RequestError
from .spelling import spelled

LEAST_PLAIN_BYTES = 1 << 20  # a smaller number without a unit, as text, is one whose unit was forgotten
_LEAST_INT = 1 << 10  # an int may be bytes that were parsed already
LEAST_CONTEXT = 2  # a token of a prompt and one of an answer
_SLACK = 1 / 8  # of the context, that rows can move before they are copied to the left

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("iB", 1024), ("B", 1000))
}


def parse_bytes(text: str | int, name: str = "size") -> int:
    """Bytes of "12GiB", "500MB", "0.5 GiB" or a plain number of bytes.

    A plain number is 0, or at least `LEAST_PLAIN_BYTES` as text and 1024 as an int.

    Raises:
        RequestError: when the text is no amount of memory, or a number that lacks its unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", "" if isinstance(text, bool) else str(text))
    units = {name.lower(): factor for name, factor in _UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise RequestError(
            f"{spelled(name, text, quoted=True)} is no amount of memory; write it like 12GiB, 500MB or 1073741824"
        )
    n_bytes = int(match[1]) if match[1].isdecimal() else float(match[1])
    least = LEAST_PLAIN_BYTES if isinstance(text, str) else _LEAST_INT
    if not match[2] and 0 < n_bytes < least:
        raise RequestError(f"{spelled(name, text)} has no unit, and would be {text} bytes; did you mean {match[1]}GiB?")
    return int(n_bytes * units[match[2].lower()])


def parse_gbps(text: str | float, name: str = "rate") -> float:
    """GB/s (1e9 bytes a second) of "12GB/s" or a plain number of them.

    Raises:
        RequestError: when the text is no rate.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB/s)?\s*", str(text), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise RequestError(f"{spelled(name, text, quoted=True)} is no rate; write it like 12GB/s")
    return float(match[1])


def columns_for(context: int) -> int:
    """Columns that a batch's cache has for rows of so many tokens."""
    return context + max(64, int(context * _SLACK))


def format_bytes(n_bytes: float) -> str:
    """Bytes for people: "1.5 GiB", "22.9 MiB"."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes:.0f} B"


def exact_bytes(n_bytes: int) -> str:
    """Bytes as an option takes them: "32GiB", or the plain number where no unit says it exactly."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if n_bytes and n_bytes % size == 0:
            return f"{n_bytes // size}{unit}"
    return str(n_bytes)


def check_ram(what: str, need_bytes: float, free_bytes: float, remedy: str) -> None:
    """Refuse what takes more RAM than is free.

    Raises:
        BudgetError: one line with what is needed, what there is and what to do.
    """
    if need_bytes > free_bytes:
        raise BudgetError(
            f"{what} needs {format_bytes(need_bytes)} of RAM, but {format_bytes(free_bytes)} are free; {remedy}"
        )


@dataclass(frozen=True, slots=True)
class Budget:
    """The memory that Moestro may use, in bytes; None means all that the machine has to give."""

    gpu_bytes: int | None = None
    ram_bytes: int | None = None

    @classmethod
    def parse(cls, *, gpu_memory: str | int | None = None, ram: str | int | None = None) -> Budget:
        """Read the two amounts that a user names."""
        return cls(
            gpu_bytes=None if gpu_memory is None else parse_bytes(gpu_memory, "gpu_memory"),
            ram_bytes=None if ram is None else parse_bytes(ram, "ram"),
        )


class Margin(NamedTuple):
    """What a budget keeps back for what is not measured: a share of it and so many bytes."""

    share: float
    fixed_bytes: int

    def of(self, budget_bytes: int) -> int:
        """Bytes that are kept back."""
        return int(self.share * budget_bytes) + self.fixed_bytes


# Of an NVIDIA GPU: fragments between torch's blocks, and the workspace that cuBLAS keeps (8 MiB, 32 MiB on Hopper).
CUDA_MARGIN = Margin(0.02, 64 * 2**20)


def round_up(n_bytes: int) -> str:
    """An amount of at least so many bytes, as a user writes it: "12.1GiB"."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= size:
            return f"{-(-n_bytes * 10 // size) / 10:g}{unit}"
    return f"{n_bytes}B"
