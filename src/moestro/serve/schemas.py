"""What is checked of a JSON schema before a grammar is made of it: keywords that would be ignored, depth and size.

>>> check_schema({"type": "string", "nullable": True})
Traceback (most recent call last):
    ...
moestro.errors.RequestError: the schema has 'nullable', which is not supported; leave it out
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ..errors import RequestError

MOST_CHARACTERS = 64_000  # of a schema as JSON: compiling takes more than linear time
_DEEPEST = 60  # the compiler's own limit is 128, with what is around a schema

_SCHEMAS = ("anyOf", "allOf", "oneOf", "prefixItems")  # keywords that hold a list of schemas
_NAMED = ("properties", "patternProperties", "$defs", "definitions")  # schemas by name
_ONE = ("items", "additionalProperties", "additionalItems")  # one schema, or a list of them as older drafts have it
_CHECKS = frozenset(  # followed, or refused by the compiler
    (
        *_SCHEMAS,
        *_NAMED,
        *_ONE,
        "type",
        "enum",
        "const",
        "$ref",
        "required",
        "pattern",
        "format",
        "minLength",
        "maxLength",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
        "minItems",
        "maxItems",
        "minProperties",
        "maxProperties",
        "not",
        "if",
        "then",
        "else",
        "contains",
        "minContains",
        "maxContains",
        "uniqueItems",
        "propertyNames",
        "dependentRequired",
        "dependentSchemas",
        "dependencies",
        "unevaluatedItems",
        "unevaluatedProperties",
        "$dynamicRef",
        "$recursiveRef",
    )
)
_NOTES = frozenset(  # that say nothing about which values are right
    (
        "$schema",
        "$id",
        "$anchor",
        "$comment",
        "title",
        "description",
        "default",
        "examples",
        "example",
        "deprecated",
        "readOnly",
        "writeOnly",
        "discriminator",
        "externalDocs",
        "propertyOrdering",
        "markdownDescription",
        "enumDescriptions",
    )
)


def check_schema(schema: dict[str, Any]) -> str:
    """Refuse a schema of which a part would be ignored, or that is too large to be compiled in a moment.

    Returns:
        The schema as JSON.

    Raises:
        RequestError: one line that names what is not supported.
    """
    _check_depth(schema)
    text = json.dumps(schema, ensure_ascii=False)
    if len(text) > MOST_CHARACTERS:
        line = f"the schema has {len(text)} characters as JSON; at most {MOST_CHARACTERS} are followed, make it shorter"
        raise RequestError(line)
    for part in _parts(schema):
        for name in part:
            if name not in _CHECKS and name not in _NOTES and (name == "x-guidance" or not name.startswith("x-")):
                raise RequestError(f"the schema has {name[:60]!r}, which is not supported; leave it out")
    return text


def _check_depth(schema: Any) -> None:
    level = [schema]
    for _ in range(_DEEPEST):
        level = [
            inner
            for one in level
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise RequestError(f"the schema is nested more than {_DEEPEST} levels deep, which is not supported; use $ref")


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """The schema and all that it is made of; what is no schema is left to the compiler."""
    left = [schema]
    while left:
        one = left.pop()
        if isinstance(one, list):
            left += one
        if not isinstance(one, dict):
            continue
        yield one
        left += [one[name] for name in (*_SCHEMAS, *_ONE) if name in one]
        left += [inner for name in _NAMED if isinstance(one.get(name), dict) for inner in one[name].values()]
