"""What an option is: a field of a dataclass, with its help and a check of its value. Needs the standard library alone.

The options that there are stand in options.py and its like; the command line, `moestro.load` and `MoestroConfig` read
them by what is here.

    >>> @dataclass(frozen=True, kw_only=True)
    ... class Cups(Checked):
    ...     cups: int = option(1, "How many cups.", check=needs(lambda n: n > 0, "1 or more"))
    >>> Cups(cups=0)
    Traceback (most recent call last):
    moestro.errors.RequestError: cups=0: needs 1 or more
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Callable, Collection, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from functools import cache
from inspect import Parameter, signature
from math import isfinite
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from ..errors import RequestError
from .spelling import spelled

Check = Callable[[Any, str], Any]  # (value, the option's name) -> the value to keep; raises RequestError
_FLAG = re.compile(r"--([a-z][a-z-]*)")
_IN_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "True or False"}
Decorated = TypeVar("Decorated", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class About:
    """What is known of an option besides its field's name, type and default.

    unset: what None stands for, in words. short: a short flag, like "-t". check: refuses or converts a value. named:
    the option's name, where it is not the field's. in_python: whether it is an argument of `moestro.load` alone, of
    which the command line has a way of its own. is_secret: whether its value is never shown.
    """

    help: str
    metavar: str | None = None
    unset: str | None = None
    short: str | None = None
    check: Check | None = None
    named: str | None = None
    in_python: bool = False
    is_secret: bool = False

    @property
    def text(self) -> str:
        """The help, with what None stands for."""
        return self.help if self.unset is None else f"{self.help} [default: {self.unset}]"


def option(default: Any, help: str, **about: Any) -> Any:
    """A field that is an option; for `about` see `About`."""
    return field(default=default, repr=not about.get("is_secret"), metadata={"about": About(help, **about)})


def option_like(kind: type[Checked], name: str, **changes: Any) -> Any:
    """A field that is an option of another dataclass again, with another default or other values of `About`."""
    same = next(one for one in fields(kind) if one.name == name)
    default = changes.pop("default", same.default)
    return field(default=default, metadata={"about": replace(about(same), **changes)})


def about(one: Field[Any]) -> About:
    """What a field's option says of itself."""
    return one.metadata["about"]  # type: ignore[no-any-return]


def name_of(one: Field[Any]) -> str:
    """The name of a field's option."""
    return about(one).named or one.name


def one_of(noun: str, names: Collection[str]) -> Check:
    """A check that a value is one of these names; a table of them may still grow."""

    def check(value: Any, name: str) -> Any:
        if value not in names:
            raise RequestError(
                f"no {noun} {value!r}; there are: {', '.join(names if isinstance(names, tuple) else sorted(names))}"
            )
        return value

    return check


def needs(holds: Callable[[Any], bool], needed: str) -> Check:
    """A check that a condition holds for a value, which is said in words if it does not."""

    def check(value: Any, name: str) -> Any:
        if not holds(value):
            raise RequestError(f"{spelled(name, value, quoted=True)}: needs {needed}")
        return value

    return check


def named(what: str) -> Check:
    """A check that a name is not empty."""
    return needs(lambda name: bool(name.strip()), what)


def bits_in(choices: tuple[int, ...]) -> Check:
    """A check of a number of bits."""

    def check(value: Any, name: str) -> Any:
        if value not in choices:
            raise RequestError(f"{spelled(name, value)}: there are {', '.join(map(str, choices))}")
        return value

    return check


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _fit(value: Any, hint: Any, name: str) -> Any:
    """The value as one of the types of a field's hint; of torch's own dtypes and devices, their names.

    A type that is none of the basic ones, a policy's say, is left to the option's check.

    Raises:
        RequestError: it is of none of them, or no finite number.
    """
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if value is None and NoneType in kinds:
        return None
    if f"{type(value).__module__}.{type(value).__name__}" in ("torch.dtype", "torch.device"):  # torch takes seconds
        value = str(value).removeprefix("torch.")
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if get_origin(hint) is Sequence:
        if isinstance(value, list | tuple) and all(isinstance(one, str) for one in value):
            return tuple(value)
        raise RequestError(f"{spelled(name, value, quoted=True)}: needs a list of texts")
    is_number = isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)
    if int in kinds and is_number and isinstance(value, Integral):
        return int(value)
    if float in kinds and is_number:
        return float(value)
    if (bool in kinds and isinstance(value, bool)) or (str in kinds and isinstance(value, str)):
        return value
    if value is not None and not isinstance(value, Real | str | bytes) and {*kinds} - {*_IN_WORDS, NoneType}:
        return value
    needed = " or ".join(words for kind, words in _IN_WORDS.items() if kind in kinds)
    raise RequestError(f"{spelled(name, value, quoted=True)}: needs {needed}")


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A dataclass of options. Each value is checked when it is made, and kept as its check returns it.

    Raises:
        RequestError: one line that names the option, the value and what is possible.
    """

    def __post_init__(self) -> None:
        kind: Any = type(self)
        hints = _hints(kind)
        for one in fields(self):
            check, value = about(one).check, _fit(getattr(self, one.name), hints[one.name], name_of(one))
            if check is not None and value is not None:
                value = check(value, name_of(one))
            object.__setattr__(self, one.name, value)

    def to_dict(self) -> dict[str, Any]:
        """The arguments that make an equal object, as they are after their checks."""
        return {one.name: getattr(self, one.name) for one in fields(self)}  # asdict would copy a policy


def check_names(given: dict[str, Any], names: list[str]) -> None:
    """Refuse keyword arguments that are no options.

    Raises:
        RequestError: the first wrong name, and the names that there are.
    """
    if wrong := [name for name in given if name not in names]:
        raise RequestError(f"no option {wrong[0]!r}; use one of: {', '.join(names)}")


def shows_options(*kinds: type[Checked]) -> Callable[[Decorated], Decorated]:
    """Show the fields of dataclasses where a function or class takes them as **options.

    They come into its signature, and into its docstring in place of the word {options}, named as arguments.
    """

    shown_fields = [one for kind in kinds for one in fields(kind)]

    def show(function: Any) -> Any:
        own = signature(function)
        shown = [one for one in own.parameters.values() if one.kind is not Parameter.VAR_KEYWORD]
        for one in shown_fields:
            shown.append(Parameter(one.name, Parameter.KEYWORD_ONLY, default=one.default, annotation=one.type))
        lines = [
            textwrap.fill(
                f"{one.name}: {_FLAG.sub(lambda named: named[1].replace('-', '_'), about(one).text)}",
                116,
                initial_indent=" " * 8,
                subsequent_indent=" " * 12,
                break_on_hyphens=False,
            )
            for one in shown_fields
        ]
        function.__signature__ = own.replace(parameters=shown)
        function.__doc__ = (function.__doc__ or "").replace("{options}", "\n".join(lines).lstrip())
        return function

    return show
