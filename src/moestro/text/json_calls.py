"""Calls whose arguments are JSON: in Hermes' marks, Mistral's, DeepSeek's, Kimi's, Harmony's, or in none at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from .calls import Call, Format, Grammar, MalformedError, Tools, call_of, rest_of_close

_NUMBER = regex.compile(r"[-+.\deE]*")  # the rest of one that is cut
_LITERALS = ("true", "false", "null")


def read_json(text: str, begin: int) -> tuple[Any, int] | None:
    """An object or list of JSON that begins at a place, and where it ends; None where it is not whole yet.

    Raises:
        MalformedError: whatever follows, it is none.
    """
    while begin < len(text) and text[begin].isspace():
        begin += 1
    if begin == len(text):
        return None
    if text[begin] not in "{[":
        raise MalformedError
    try:
        value, end = _DECODER.raw_decode(text, begin)
    except json.JSONDecodeError as error:
        rest = text[error.pos :].strip()
        is_cut = bool(_NUMBER.fullmatch(rest)) or any(one.startswith(rest) for one in _LITERALS)
        is_escape = "escape" in error.msg and len(text) - error.pos <= 6
        if is_cut or is_escape or error.msg.startswith("Unterminated string"):
            return None
        raise MalformedError from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or too many brackets
        raise MalformedError from error
    return value, end


def _no_constant(name: str) -> Any:
    raise ValueError(name)


_DECODER = json.JSONDecoder(strict=False, parse_constant=_no_constant)


@dataclass(frozen=True)
class WholeJson(Format):
    """The name stands in the JSON, beside the arguments: one call, or a list of them.

    close: the mark after it; "" where the JSON itself is the end.
    is_list: whether the model writes a list. keys: of the name and of the arguments, as the model writes them.
    """

    close: str = ""
    is_list: bool = False
    keys: tuple[str, str] = ("name", "arguments")
    joint: str = ""  # what stands between the marks and the JSON

    def read(self, opened: Any, body: str, tools: Tools, is_end: bool) -> tuple[list[Call], int] | None:
        """As `Format` says."""
        found = read_json(body, 0)
        if found is None:
            return None
        value, end = found
        calls = [_named_in(one) for one in (value if isinstance(value, list) else [value])]
        if not calls or (self.is_bare and any(call.name not in tools for call in calls)):
            raise MalformedError
        after = rest_of_close(body, end, self.close, is_end)
        return None if after is None else (calls, after)

    def grammar(self, write: Grammar, tools: Mapping[str, Mapping[str, Any]]) -> str:
        """As `Format` says."""
        name, arguments = self.keys
        found = []
        for tool, schema in tools.items():
            # Written out, since references in a schema are those from its root.
            begin = f'{"[" * self.is_list}{{"{name}": {json.dumps(tool)}, "{arguments}": '
            end = "}" + "]" * self.is_list + (self.joint + self.close if self.close else "")
            before = "" if self.is_bare else self.open + self.joint
            found.append(f"{write.text(before + begin)} {write.json(schema)} {write.text(end)}")
        return f"({' | '.join(found)})"


@dataclass(frozen=True)
class NamedJson(Format):
    """The name stands before the JSON, which is the arguments alone.

    head: a pattern of what stands between the mark and the arguments, with the groups name or other_name.
    closes: marks after the arguments, any of which ends the call; none where the JSON itself is the end.
    before, after: what a model writes around the arguments; before has {name} in it.
    """

    head: str = ""
    closes: tuple[str, ...] = ()
    before: str = ""
    after: str = ""

    def read(self, opened: Any, body: str, tools: Tools, is_end: bool) -> tuple[list[Call], int] | None:
        """As `Format` says."""
        at, groups = 0, opened.groupdict()
        if self.head:
            found = regex.match(self.head, body, flags=regex.DOTALL, partial=not is_end)
            if found is None:
                raise MalformedError
            if found.partial:
                return None
            at, groups = found.end(), found.groupdict()
        name = groups.get("name") or groups.get("other_name") or ""
        value = read_json(body, at)
        if value is None:
            return None
        call = call_of(name, value[0])
        if not self.closes:
            return [call], value[1]
        waits = False
        for close in self.closes:
            try:
                after = rest_of_close(body, value[1], close, is_end)
            except MalformedError:
                continue
            if after is not None:
                return [call], after
            waits = True
        if waits:
            return None
        raise MalformedError

    def grammar(self, write: Grammar, tools: Mapping[str, Mapping[str, Any]]) -> str:
        """As `Format` says."""
        found = []
        for tool, schema in tools.items():
            begin = write.text(self.before.replace("{name}", tool))
            found.append(f"{begin} {write.json(schema)} {write.text(self.after)}".strip())
        return f"({' | '.join(found)})"


def _named_in(value: Any) -> Call:
    """A call of which the JSON is a description; it may be in an object of its own under "function"."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        raise MalformedError
    name = next((value[key] for key in ("name", "tool_name") if isinstance(value.get(key), str)), None)
    if name is None:
        raise MalformedError
    return call_of(name, next((value[key] for key in ("arguments", "parameters") if key in value), {}))


@dataclass(frozen=True)
class Either(Format):
    """Several forms after the same mark; the model's own, which it is made to write, comes first."""

    forms: Sequence[Format] = ()

    def read(self, opened: Any, body: str, tools: Tools, is_end: bool) -> tuple[list[Call], int] | None:
        """As `Format` says."""
        waits = False
        for form in self.forms:
            try:
                found = form.read(opened, body, tools, is_end)
            except MalformedError:
                continue
            if found is not None:
                return found
            waits = True
        if waits:
            return None
        raise MalformedError

    def grammar(self, write: Grammar, tools: Mapping[str, Mapping[str, Any]]) -> str | None:
        """As `Format` says."""
        return self.forms[0].grammar(write, tools)
