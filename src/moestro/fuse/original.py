"""A module's own forward, kept by what takes its place, and hooks that it must not pass by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any
from weakref import WeakMethod

from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks


def forward_of(module: Any) -> Callable[..., Any]:
    """The forward that a module has now.

    It does not keep the module alive: the module will hold who holds this, and a model must give its memory back
    when it goes, not when the garbage collector comes.
    """
    if not isinstance(module.forward, MethodType):
        return module.forward  # type: ignore[no-any-return]
    method = WeakMethod(module.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = method()
        assert bound is not None
        return bound(*args, **kwargs)

    return forward


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether somebody listens to one of these modules, which then has to be called."""
    if _global_forward_hooks or _global_forward_pre_hooks:
        return True
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)
