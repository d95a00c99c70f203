"""The group of `moestro bench`, for whose commands and options other commands do not wait."""

from __future__ import annotations

from typing import Any

import typer

from .options import WholeHelp


class LateBench(WholeHelp):
    """A group whose commands are imported when one of them, or their list, is wanted."""

    _found: Any = None

    @property
    def commands(self) -> Any:
        """Name -> command."""
        if not self._found:
            from .bench import bench

            made: Any = typer.main.get_command(bench)
            self._found = made.commands
        return self._found

    @commands.setter
    def commands(self, found: Any) -> None:
        self._found = found
