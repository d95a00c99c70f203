"""Calls whose arguments stand in marks of their own (Qwen3-Coder, GLM, MiniMax), in Gemma's notation, or in Python."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import regex

from .calls import Call, Format, Grammar, MalformedError, Tools, call_of, with_references
from .typed import typed_value

_ENDS = 64  # brackets at the end of a piece that may end a call in Python

_QUOTE = '<|"|>'  # of Gemma's texts


@dataclass(frozen=True)
class Marked(Format):
    """Each argument stands between marks, its value as plain text, or as JSON where it is none.

    head: a pattern of the text between the opening mark and the arguments, with the group name. close: the mark after
    the last argument, as a pattern. key: a pattern of the mark before a value, with the groups key and perhaps is_text.
    ends: the mark after a value. breaks: whether each value has a line of its own.
    begin, key_text, between, end: what a model writes, with {name} and {key} in it.
    """

    head: str = ""
    key: str = ""
    ends: str = ""
    close: str = ""
    breaks: bool = False
    begin: str = ""
    key_text: str = ""
    between: str = ""
    end: str = ""

    def read(self, opened: Any, body: str, tools: Tools, is_end: bool) -> tuple[list[Call], int] | None:
        """As `Format` says."""
        head = regex.match(self.head, body, flags=regex.DOTALL, partial=not is_end)
        if head is None:
            raise MalformedError
        if head.partial:
            return None
        closed = regex.search(self.close, body, pos=head.end(), flags=regex.DOTALL)
        if closed is None:
            if is_end:
                raise MalformedError
            return None
        name = head.group("name").strip()
        schema = tools.get(name, {})
        arguments = dict(self._values(body[head.end() : closed.start()], schema))
        return [call_of(name, arguments)], closed.end()

    def _values(self, text: str, schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        at = 0
        ends = re.escape(self.ends)
        while text[at:].strip():
            opened = regex.match(r"\s*" + self.key, text, pos=at, flags=regex.DOTALL)
            # A value may hold the mark after it, but hardly followed by the next argument.
            pattern = rf"{ends}(?=\s*(?:{self.key}|\Z))"
            closed = opened and regex.search(pattern, text, pos=opened.end(), flags=regex.DOTALL)
            if not closed:
                raise MalformedError
            value = text[opened.end() : closed.start()]
            if self.breaks:
                value = value.removeprefix("\n").removesuffix("\n")
            key, is_text = opened.group("key"), opened.groupdict().get("is_text")
            yield key.strip(), value if is_text == "true" else typed_value(value, schema, key.strip())
            at = closed.end()

    def grammar(self, write: Grammar, tools: Tools) -> str | None:
        """As `Format` says."""
        return f"({' | '.join(self._written(write, name, schema) for name, schema in tools.items())})"

    def _written(self, write: Grammar, name: str, schema: Mapping[str, Any]) -> str:
        pieces = [write.text(self.begin.replace("{name}", name))]
        required = schema.get("required", ())
        for key, one in (schema.get("properties") or {}).items():
            is_text = isinstance(one, dict) and one.get("type") == "string"
            mark = self.key_text.replace("{key}", key).replace("{is_text}", "true" if is_text else "false")
            ends = ("\n" if self.breaks else "") + self.ends
            if not is_text:
                value = f"{write.json(with_references(one, schema))} {write.text(ends)}"
            elif all(isinstance(choice, str) for choice in one.get("enum", [None])):
                value = f"({' | '.join(write.text(choice) for choice in one['enum'])}) {write.text(ends)}"
            else:
                value = write.until(ends)
            piece = f"{write.text(mark)} {value} {write.text(self.between)}".strip()
            pieces.append(piece if key in required else f"({piece})?")
        return " ".join([*pieces, write.text(self.end)])


@dataclass(frozen=True)
class Gemma(Format):
    """Gemma 4: call:NAME{key:value} with texts in a quotation mark of their own."""

    close: str = "<tool_call|>"

    def read(self, opened: Any, body: str, tools: Tools, is_end: bool) -> tuple[list[Call], int] | None:
        """As `Format` says."""
        head = regex.match(r"\s*call:(?P<name>[^{}\s]+)\s*(?=\{)", body, partial=not is_end)
        if head is None:
            raise MalformedError
        end = body.find(self.close)
        if head.partial or (end < 0 and not is_end):
            return None
        text = body[head.end() : end if end >= 0 else len(body)]
        return [call_of(head.group("name"), _of_gemma(text))], end + len(self.close) if end >= 0 else len(body)

    def grammar(self, write: Grammar, tools: Tools) -> str | None:
        """As `Format` says."""
        found = []
        for name, schema in tools.items():
            pieces = []
            for key, one in sorted((schema.get("properties") or {}).items()):
                pieces.append((key in schema.get("required", ()), f"{write.text(key + ':')} {_as_gemma(write, one)}"))
            found.append(
                f"{write.text(self.open + f'call:{name}{{')} {_joined(write, pieces)} {write.text('}' + self.close)}"
            )
        return f"({' | '.join(found)})"


def _joined(write: Grammar, pieces: list[tuple[bool, str]], joint: str = ",") -> str:
    """The pieces with commas between them, of which those that are not required may be missing."""
    comma = write.text(joint)
    if not pieces:
        return ""
    (needed, first), rest = pieces[0], pieces[1:]
    after = "".join(f" {comma} {one}" if must else f" ({comma} {one})?" for must, one in rest)
    if needed:
        return f"{first}{after}"
    return f"({first}{after} | {_joined(write, rest, joint)})" if rest else f"({first})?"


def _as_gemma(write: Grammar, schema: Any) -> str:
    kind = schema.get("type") if isinstance(schema, dict) else None
    quote = write.text(_QUOTE)
    if kind == "string" and "enum" in schema:
        return f"{quote} ({' | '.join(write.text(str(one)) for one in schema['enum'])}) {quote}"
    if kind == "string":
        return f"{quote} {write.until(_QUOTE)}"
    if kind in ("integer", "number", "boolean", "null"):
        return write.json(schema)
    if kind == "array":
        item = _as_gemma(write, schema.get("items", {"type": "string"}))
        return f"{write.text('[')} ({item} ({write.text(',')} {item})*)? {write.text(']')}"
    properties = schema.get("properties") if isinstance(schema, dict) else None
    pieces = [
        (key in schema.get("required", ()), f"{write.text(key + ':')} {_as_gemma(write, one)}")
        for key, one in sorted((properties or {}).items())
    ]
    return f"{write.text('{')} {_joined(write, pieces)} {write.text('}')}"


def _of_gemma(text: str) -> Any:
    """A value in Gemma's notation."""
    pieces = text.split(_QUOTE)
    if len(pieces) % 2 == 0:
        raise MalformedError
    for at, piece in enumerate(pieces):
        if at % 2:
            pieces[at] = json.dumps(piece)
        else:
            piece = re.sub(
                r"([{,]\s*)([^\s{}\[\],:\"][^{}\[\],:\"]*?)\s*:", lambda m: f"{m[1]}{json.dumps(m[2])}:", piece
            )
            pieces[at] = re.sub(r"(?<=[:,\[])\s*None\b", "null", piece)
    try:
        return json.loads("".join(pieces), strict=False)
    except (ValueError, RecursionError) as error:
        raise MalformedError from error


@dataclass(frozen=True)
class Python(Format):
    """A list of calls in Python, as LFM2 and some of Llama's templates have them."""

    close: str = ""

    def read(self, opened: Any, body: str, tools: Tools, is_end: bool) -> tuple[list[Call], int] | None:
        """As `Format` says."""
        head = regex.match(r"\s*\[\s*[\w.-]+\s*\(", body, partial=not is_end)
        if head is None:
            raise MalformedError
        if head.partial:
            return None
        ends = [found.end() for found in re.finditer(r"\]", body)]
        ends = ends if is_end else ends[-_ENDS:]  # those before were tried with earlier pieces
        if self.close:
            at = body.find(self.close)
            if at < 0 and not is_end:
                return None
            calls = _of_python(body[: at if at >= 0 else len(body)].strip())
            if calls is None:
                raise MalformedError
            return calls, at + len(self.close) if at >= 0 else len(body)
        for end in ends:
            calls = _of_python(body[:end].strip())
            if calls is not None and all(call.name in tools for call in calls):
                return calls, end
        if is_end:
            raise MalformedError
        return None

    def grammar(self, write: Grammar, tools: Tools) -> str | None:
        """As `Format` says."""
        found = []
        for name, schema in tools.items():
            required = schema.get("required", ())
            pieces = [
                (key in required, f"{write.text(key + '=')} {write.json(with_references(one, schema))}")
                for key, one in (schema.get("properties") or {}).items()
            ]
            begin, end = write.text(f"{self.open}[{name}("), write.text(f")]{self.close}")
            found.append(f"{begin} {_joined(write, pieces, ', ')} {end}")
        return f"({' | '.join(found)})"


def _of_python(text: str) -> list[Call] | None:
    try:
        tree = ast.parse(text, mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            return None
        return [_python_call(one) for one in tree.elts]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args or any(one.arg is None for one in node.keywords):
        raise MalformedError
    return call_of(ast.unparse(node.func), {str(one.arg): _python_value(one.value) for one in node.keywords})


def _python_value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return json.loads(node.id)
    if isinstance(node, ast.List | ast.Tuple):
        return [_python_value(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {str(ast.literal_eval(key)): _python_value(value) for key, value in pairs if key is not None}
    value = ast.literal_eval(node)
    if not isinstance(value, str | int | float | bool | None):
        raise MalformedError
    return value
