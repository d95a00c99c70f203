"""The published methods, one file each, by the name that `--policy` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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

_FIELDS = {"name": str, "lookahead": int}
_PARTS = ("place", "begin", "decide", "observe", "bound")

__all__ = ["DEFAULT_POLICY", "POLICIES", "BasePolicy", "Bound", "check_policy", "make_policy", "policy_name"]


def make_policy(name: str) -> Policy:
    """A fresh policy object.

    Raises:
        RequestError: when there is no policy of that name; lists those there are.
    """
    if name not in POLICIES:
        raise RequestError(f"no policy {name!r}; there are: {', '.join(sorted(POLICIES))}")
    return POLICIES[name]()


def check_policy(value: Any, name: str) -> str | Policy:
    """A policy's name, or an object that has all that a policy has.

    Raises:
        RequestError: it is neither.
    """
    if isinstance(value, str):
        make_policy(value)
        return value
    if isinstance(value, type):
        raise RequestError(f"{name} is the class {value.__name__}; give an object of it, {value.__name__}()")
    lacks = [part for part in _PARTS if not callable(getattr(value, part, None))]
    lacks += [part for part, kind in _FIELDS.items() if not isinstance(getattr(value, part, None), kind)]
    if lacks:
        raise RequestError(
            f"{name} is of type {type(value).__name__}, which lacks {', '.join(lacks)}; name one of "
            f"{', '.join(sorted(POLICIES))}, or give an object of a class derived from BasePolicy"
        )
    policy: Policy = value
    return policy


def policy_name(policy: str | Policy) -> str:
    """The name of a policy that is named or given."""
    return policy if isinstance(policy, str) else policy.name
