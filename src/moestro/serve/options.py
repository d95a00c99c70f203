"""The options of a server: names, defaults, help and checks. Needs the standard library alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from ..planning.budget import parse_bytes
from ..planning.option import Checked, named, needs, option
from ..planning.options import MOST_SEQUENCES

KEY_VARIABLE = "MOESTRO_API_KEY"
DEFAULT_CONTEXT = 4096


@dataclass(frozen=True, kw_only=True)
class ServeOptions(Checked):
    """Where a server listens, which clients it answers, and how many requests at a time."""

    host: str = option(
        "127.0.0.1", "The address; 0.0.0.0 lets other machines in.", metavar="ADDRESS", check=named("one")
    )
    port: int = option(
        8080, "The port; 0 takes a free one.", metavar="N", check=needs(lambda n: 0 <= n <= 65535, "0 to 65535")
    )
    allow_host: Sequence[str] = option(
        (), "A name under which clients reach the server; may be given several times.", metavar="NAME", unset="none"
    )
    api_key: str | None = option(
        None,
        f"The key that requests must carry. Better in the variable {KEY_VARIABLE}, which no list of processes shows.",
        metavar="KEY",
        unset=f"{KEY_VARIABLE}, or none",
        check=named("a key"),
        is_secret=True,
    )
    max_requests: int = option(
        4,
        "Requests that are answered at a time; memory for all of them is taken at the start.",
        metavar="N",
        check=needs(lambda n: 1 <= n <= MOST_SEQUENCES, f"1 to {MOST_SEQUENCES}"),
    )
    queue: int = option(64, "Requests that may wait besides.", metavar="N", check=needs(lambda n: n >= 0, "0 or more"))
    prefix_memory: str | int = option(
        "1GiB",
        "Memory for keys and values of what was read, so that the next turn reads its new tokens alone; 0B for none.",
        metavar="SIZE",
        check=parse_bytes,
    )
    served_name: str | None = option(
        None, "The model's name in answers.", metavar="NAME", unset="MODEL", check=named("a name")
    )
    strict_model: bool = option(False, "Refuse requests that name another model.")
    max_body: str | int = option("8MiB", "The largest body of a request.", metavar="SIZE", check=parse_bytes)

    @property
    def key(self) -> str | None:
        """The key that requests must carry."""
        return self.api_key or os.environ.get(KEY_VARIABLE) or None
