"""What all reports of benchmarks share: JSON that names the machine and the commit, and tables."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..compute.cpu import levels
from ..errors import RequestError
from ..machine.probe import cpu_model
from .machine_card import git_commit


class Report:
    """The base of dataclasses of figures. Each also has `print`, which shows the figures to people."""

    def to_json(self) -> dict[str, Any]:
        """All figures, the CPU's model and the commit, as `--json` prints them."""
        return asdict(self) | {"cpu": cpu_model(), "commit": git_commit()}  # type: ignore[call-overload,no-any-return]


def check_kernels() -> None:
    """Refuse to measure without the CPU kernels.

    Raises:
        RequestError: this package was built without them.
    """
    if not levels():
        raise RequestError("this package was built without its kernels; install it where a C++ compiler is")
