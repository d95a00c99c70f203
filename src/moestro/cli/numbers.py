"""Options that are several numbers, like 1,4,16."""

from __future__ import annotations

from ..errors import RequestError


def numbers(flag: str, given: str | None, least: int) -> tuple[int, ...]:
    """The numbers that an option names, each once; none where it is not given.

    Raises:
        RequestError: one is no number from `least` on.
    """
    parts = [] if given is None else given.split(",")
    if wrong := [part for part in parts if not part.strip().isdecimal() or int(part) < least]:
        raise RequestError(f"{flag} {given}: {wrong[0]!r} is no number from {least} on; give some like 4,8,16")
    return tuple(dict.fromkeys(int(part) for part in parts))
