"""The JSON of a request's body: read as the standard has it, and refused before it can cost much time or memory.

>>> parse_json(b'{"temperature": 1.0}')
{'temperature': 1.0}
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from .faults import Refused

# Of 8 MiB of brackets, Python's objects would take hundreds of megabytes, and pydantic's errors gigabytes.
MOST_OBJECTS, MOST_FIELDS, MOST_LISTS, DEEPEST = 100_000, 10_000, 500_000, 128
_HALF_OF_A_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")


class JsonRoute(APIRoute):
    """A route whose body is read by `parse_json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As FastAPI's, with another request."""
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return handled


class _JsonRequest(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = parse_json(await self.body())
        return self._json


def parse_json(body: bytes) -> Any:
    """The value of a body: UTF-8, without the numbers that JSON does not have, each field of an object once.

    Raises:
        Refused, json.JSONDecodeError: it is no such value, or has more parts than a request can need.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(400, f"the body is not UTF-8 (byte {error.start})") from None
    if text.count("[") > MOST_LISTS:
        raise Refused(400, f"the body has more than {MOST_LISTS} lists; send less")
    objects = _Objects()
    try:
        value = json.loads(text, object_pairs_hook=objects, parse_constant=_no_number)
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python's own limit
        raise Refused(400, "the body has a number of thousands of digits; send a shorter one") from None
    _check_depth(value)
    if _HALF_OF_A_PAIR.search(body) is not None:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            line = "the body has half of a surrogate pair (\\ud800 to \\udfff), which is no character"
            raise Refused(400, line) from None
    return value


class _Objects:
    """Makes objects of pairs, and counts them."""

    def __init__(self) -> None:
        self._left = MOST_OBJECTS

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        self._left -= 1
        if self._left < 0:
            raise Refused(400, f"the body has more than {MOST_OBJECTS} objects; send less")
        if len(pairs) > MOST_FIELDS:
            raise Refused(400, f"an object of the body has {len(pairs)} fields; at most {MOST_FIELDS} are possible")
        found = dict(pairs)
        if len(found) < len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise Refused(400, f"the body has {twice[:80]!r} twice in one object; leave one out")
        return found


def _no_number(name: str) -> Any:
    raise Refused(400, f"the body has {name}, which is no number of JSON; leave it out")


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise _too_deep()
        parts = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list)))
        level = [part for several in parts for part in several if isinstance(part, (dict, list))]


def _too_deep() -> Refused:
    return Refused(400, f"the body is nested deeper than {DEEPEST} objects and lists; send a flatter one")
