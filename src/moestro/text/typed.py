"""A value that stands as plain text, as the type that the tool's JSON schema gives it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_ORDER = ("null", "boolean", "integer", "number", "object", "array")  # the narrower type first
_KINDS: dict[str, type | tuple[type, ...]] = {
    "null": type(None),
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "object": dict,
    "array": list,
}


def typed_value(text: str, schema: Mapping[str, Any], key: str) -> Any:
    """The value of an argument.

    Args:
        schema: of all arguments. A value of no known type is JSON where it can be read as such, and a text elsewhere.
    """
    properties = schema.get("properties")
    one = properties.get(key) if isinstance(properties, dict) else None
    try:
        types = _types(one, schema, 0)
    except (TypeError, AttributeError):  # it is no schema
        types = set()
    if types == {"string"}:
        return text
    value = _parsed(text)
    if not types:
        return text if value is _NOTHING else value
    for kind in _ORDER:
        if kind not in types:
            continue
        if kind == "integer" and isinstance(value, float) and value.is_integer() and "number" not in types:
            return int(value)
        is_bool_as_number = isinstance(value, bool) and kind in ("integer", "number")
        if value is not _NOTHING and isinstance(value, _KINDS[kind]) and not is_bool_as_number:
            return value
    return text


_NOTHING = object()


def _parsed(text: str) -> Any:
    text = text.strip()
    text = {"True": "true", "False": "false", "None": "null"}.get(text, text)

    def no_constant(name: str) -> Any:
        raise ValueError(name)

    try:
        return json.loads(text, parse_constant=no_constant)
    except (ValueError, RecursionError):
        return _NOTHING


def _types(schema: Any, root: Mapping[str, Any], depth: int) -> set[str]:
    """All types that a schema allows; none where it does not say."""
    if not isinstance(schema, dict) or depth > 8:
        return set()
    if isinstance(reference := schema.get("$ref"), str) and reference.startswith("#/"):
        found: Any = root
        for step in reference[2:].split("/"):
            found = found.get(step) if isinstance(found, dict) else None
        return _types(found, root, depth + 1)
    declared = schema.get("type")
    types = {declared} if isinstance(declared, str) else set(declared) if isinstance(declared, list) else set()
    for word in ("anyOf", "oneOf", "allOf"):
        for choice in schema.get(word) or ():
            types |= _types(choice, root, depth + 1)
    if schema.get("nullable"):
        types.add("null")
    choices = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if not types and choices and all(isinstance(one, str) for one in choices):
        return {"string"}
    return {one for one in types if isinstance(one, str)}
