"""The published methods, one file each, by the name that `--policy` takes."""

from __future__ import annotations

from collections.abc import Callable

from ...errors import RequestError
from ..contract import Policy
from .cpu_only import CpuOnly
from .layer_split import LayerSplit

POLICIES: dict[str, Callable[[], Policy]] = {CpuOnly.name: CpuOnly, LayerSplit.name: LayerSplit}
DEFAULT_POLICY = CpuOnly.name


def make_policy(name: str) -> Policy:
    """A fresh policy object.

    Raises:
        RequestError: when there is no policy of that name; lists those there are.
    """
    if name not in POLICIES:
        raise RequestError(f"no policy {name!r}; there are: {', '.join(sorted(POLICIES))}")
    return POLICIES[name]()
