"""Options of benchmarks that are lists of other options, or that are always given. Imports no torch.

Names, checks and, where it fits, help come from `planning/options.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..planning.options import Checked, ModelOptions, Options, about, option_like
from ..planning.policies import POLICIES
from ..planning.shapes import REAL_SHAPES, SHAPES


def option_list(kind: type[Checked], name: str, help: str, unset: str) -> Any:
    """A field that takes an option of another dataclass any number of times; each value has that option's check."""
    check = about(next(one for one in fields(kind) if one.name == name)).check or (lambda value, flag: value)

    def check_each(values: Any, flag: str) -> Any:
        return tuple(check(value, flag) for value in values)

    return option_like(kind, name, default=(), help=help, unset=unset, check=check_each, named=name)


@dataclass(frozen=True, kw_only=True)
class ShapeOptions(Checked):
    """Which shapes a benchmark measures."""

    shape: str = option_like(
        ModelOptions, "shape", default="olmoe-1b-7b", help=f"A model's shape: {', '.join(SHAPES)}.", unset=None
    )
    shapes: Sequence[str] = option_list(
        ModelOptions, "shape", "Only this shape; may be given several times.", ", ".join(REAL_SHAPES)
    )


@dataclass(frozen=True, kw_only=True)
class ComparedOptions(Checked):
    """What a benchmark compares."""

    policies: Sequence[str] = option_list(
        Options,
        "policy",
        f"Only this policy; may be given several times: {', '.join(POLICIES)}.",
        "all that are compared",
    )
    links: Sequence[str] = option_list(
        Options, "link", "Also with the link paced so, like 12GB/s; may be given several times.", "no"
    )
