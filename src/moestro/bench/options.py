"""Options of benchmarks that are lists of other options, or that are always given. Imports no torch.

Names, checks and, where it fits, help come from `planning/options.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..errors import RequestError
from ..planning.option import Checked, about, bits_in, option_like
from ..planning.options import BITS, ModelOptions, Options
from ..planning.policies import POLICIES
from ..planning.shapes import SHAPES

TABLE_BITS = (16, 4, 3, 2)  # of Eliseev and Mazur's Table 1 (arXiv 2312.17238)


CACHE_DTYPES = ("bf16", "fp32", "fp16")
_LIKE_A_FORMAT = re.compile(r"(fp|bf|int|hqq|q|iq|tq|mxfp|nvfp)\d\w*")  # each part of its name


def check_form(name: str) -> None:
    """Refuse what is named like no number format, before torch is imported, which knows which there are.

    Raises:
        RequestError: a line with what formats are named like.
    """
    if not all(_LIKE_A_FORMAT.fullmatch(part) for part in name.partition("@")[0].split("+")):
        raise RequestError(f"no format {name!r}; they are named like bf16, int4, hqq4, q4_k, mxfp4 or int4g128")


def option_list(kind: type[Checked], name: str, help: str, unset: str | None) -> Any:
    """A field that takes an option of another dataclass any number of times; each value has that option's check."""
    check = about(next(one for one in fields(kind) if one.name == name)).check or (lambda value, name: value)

    def check_each(values: Any, name: str) -> Any:
        return tuple(check(value, name) for value in values)

    return option_like(kind, name, default=(), help=help, unset=unset, check=check_each, named=name)


@dataclass(frozen=True, kw_only=True)
class ShapeOptions(Checked):
    """Which shapes a benchmark measures."""

    shape: str = option_like(
        ModelOptions, "shape", default="olmoe-1b-7b", help=f"A model's shape: {', '.join(SHAPES)}.", unset=None
    )
    shapes: Sequence[str] = option_list(ModelOptions, "shape", "Only this shape; may be given several times.", None)


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


def _check_table_bits(values: Any, name: str) -> Any:
    for value in values:
        bits_in(BITS)(int(value) if value.isdecimal() else value, name)
    return values


@dataclass(frozen=True, kw_only=True)
class CellOptions(Checked):
    """Which bits predictions are compared with runs at."""

    bits: Sequence[str] = option_like(
        Options,
        "bits",
        default=(),
        help="Only so many bits of a weight; may be given several times.",
        unset="16, 8, 4",
        check=_check_table_bits,
    )
    threads: int | None = option_like(Options, "threads")


def _table_bits(name: str, what: str) -> Any:
    unset, help = ", ".join(map(str, TABLE_BITS)), f"Only this {what}; may be given several times."
    return option_like(Options, name, default=(), help=help, unset=unset, check=_check_table_bits)


@dataclass(frozen=True, kw_only=True)
class TableOptions(Checked):
    """Which rows and columns a table by bits has, of which model, and which shape's speeds stand beside it."""

    revision: str | None = option_like(ModelOptions, "revision")
    tokenizer: str | None = option_like(ModelOptions, "tokenizer")
    trust_remote_code: bool = option_like(ModelOptions, "trust_remote_code")
    threads: int | None = option_like(Options, "threads")
    dense_bits: Sequence[str] = _table_bits("dense_bits", "row")
    expert_bits: Sequence[str] = _table_bits("expert_bits", "column")
    fit: str | None = option_like(Options, "fit", unset="hqq")
    shape: str | None = option_like(
        ModelOptions, "shape", help=f"Also decode speeds of a shape, with random weights: {', '.join(SHAPES)}."
    )

    @property
    def source(self) -> ModelOptions:
        """How the model is loaded, whatever its bits."""
        return ModelOptions(revision=self.revision, tokenizer=self.tokenizer, trust_remote_code=self.trust_remote_code)
