"""The published methods, one file each, by the name that `--policy` takes."""

from __future__ import annotations

from collections.abc import Callable

from ...errors import RequestError
from ..contract import Bound, Policy
from .bandwidth_split import BandwidthSplit
from .base import BasePolicy
from .cpu_only import CpuOnly
from .fiddler import Fiddler
from .layer_split import LayerSplit
from .layer_streaming import LayerStreaming
from .lru import Lru
from .lru_speculative import LruSpeculative
from .moestro import Moestro

POLICIES: dict[str, Callable[[], Policy]] = {
    policy.name: policy
    for policy in (CpuOnly, LayerSplit, LayerStreaming, Lru, LruSpeculative, Fiddler, BandwidthSplit, Moestro)
}
DEFAULT_POLICY = Moestro.name

__all__ = ["DEFAULT_POLICY", "POLICIES", "BasePolicy", "Bound", "make_policy"]


def make_policy(name: str) -> Policy:
    """A fresh policy object.

    Raises:
        RequestError: when there is no policy of that name; lists those there are.
    """
    if name not in POLICIES:
        raise RequestError(f"no policy {name!r}; there are: {', '.join(sorted(POLICIES))}")
    return POLICIES[name]()
