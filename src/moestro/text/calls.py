"""What a form of tool calls is: where a call begins, how it is read, and how a model is made to write one.

The forms of the families are in json_calls.py and marked_calls.py; which one a tokenizer has, in call_formats.py.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Tools = Mapping[str, Mapping[str, Any]]  # name -> JSON schema of its arguments


class MalformedError(ValueError):
    """What stands after the mark is no call, whatever follows."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool. arguments: JSON."""

    name: str
    arguments: str


class Grammar(Protocol):
    """Writes pieces of a grammar; each method returns an expression in llguidance's Lark."""

    def text(self, text: str) -> str:
        """Exactly this text, its special tokens as tokens."""

    def json(self, schema: Mapping[str, Any]) -> str:
        """JSON by a schema."""

    def until(self, close: str) -> str:
        """Any text that ends with the mark, and the mark."""


@dataclass(frozen=True)
class Format(ABC):
    """A form of calls.

    open: the mark with which a call begins; "" where calls have none and begin the answer.
    pattern: what the beginning looks like, where it is no fixed text.
    section: the marks around all calls of an answer, where there are such. tokens: all fixed marks, as texts.
    """

    open: str
    pattern: str = ""
    section: tuple[str, str] | None = None
    tokens: tuple[str, ...] = ()

    @property
    def is_bare(self) -> bool:
        """Whether calls begin without a mark."""
        return not self.open and not self.pattern

    @abstractmethod
    def read(self, opened: Any, body: str, tools: Tools, is_end: bool) -> tuple[list[Call], int] | None:
        """The calls at the beginning of a text, and how many characters they take; None where more must come.

        Args:
            opened: the match of the mark. body: the text after it. is_end: whether no more comes.

        Raises:
            MalformedError: they are none, whatever follows.
        """

    @abstractmethod
    def grammar(self, write: Grammar, tools: Tools) -> str | None:
        """An expression for one call of one of the tools; None where there is none."""


def call_of(name: Any, arguments: Any) -> Call:
    """A call, of arguments as an object or as JSON of one.

    Raises:
        MalformedError: they are neither.
    """
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise MalformedError from error
    arguments = {} if arguments is None else arguments
    if not isinstance(name, str) or not name.strip() or not isinstance(arguments, dict):
        raise MalformedError
    try:
        return Call(name.strip(), as_json(arguments))
    except (ValueError, RecursionError) as error:  # a number that JSON has not, such as 1e999
        raise MalformedError from error


def as_json(value: Any) -> str:
    """JSON with letters as they are, as far as UTF-8 has them.

    Raises:
        ValueError: a number that is infinite, or none.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a pair of surrogates, which JSON can escape
        return json.dumps(value, allow_nan=False)
    return text


def rest_of_close(body: str, at: int, close: str, is_end: bool) -> int | None:
    """Where the mark after a call ends; None where more must come. At the end of an answer, it may be missing.

    Raises:
        MalformedError: something else follows.
    """
    begin = at
    while begin < len(body) and body[begin].isspace():
        begin += 1
    rest = body[begin:]
    if not close:
        return at
    if rest.startswith(close):
        return begin + len(close)
    if close.startswith(rest):
        return len(body) if is_end else None
    raise MalformedError


def with_references(schema: Any, whole: Mapping[str, Any]) -> Any:
    """A part of a schema, with what it may refer to in the whole."""
    kept = {key: whole[key] for key in ("$defs", "definitions") if key in whole}
    return {**kept, **schema} if isinstance(schema, dict) else schema


def schemas(tools: Any) -> dict[str, Mapping[str, Any]]:
    """The schemas of tools as OpenAI's chat has them, by name."""
    found = {}
    for tool in tools or ():
        function = tool.get("function", tool)
        found[function["name"]] = function.get("parameters") or {"type": "object", "properties": {}}
    return found
