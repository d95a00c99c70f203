"""Every command of the command line, found by walking it as its parser does, so that late imports are made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from moestro.cli import main as cli


def _walk(command: Any, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield names, command
    for name, one in getattr(command, "commands", {}).items():
        yield from _walk(one, *names, name)


EVERY: dict[tuple[str, ...], Any] = dict(_walk(typer.main.get_command(cli.app)))  # with the groups
COMMANDS = {names: one for names, one in EVERY.items() if not hasattr(one, "commands")}
