"""A module's own forward, kept by what takes its place, and the hooks inside that must be called all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any
from weakref import WeakMethod, ref

from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils.hooks import RemovableHandle
from transformers.utils import output_capturing

from ..engine.watch import Watch


def forward_of(module: Any) -> Callable[..., Any]:
    """The forward that a module has now: its class's, whatever that is when it is called, or one of its own.

    It does not keep the module alive: the module will hold what holds this, and a model must give its memory back when
    it goes, not when the garbage collector comes.
    """
    forward = module.forward
    if not isinstance(forward, MethodType):
        return forward  # type: ignore[no-any-return]
    find: Callable[[], Any] = ref(module) if "forward" not in vars(module) else WeakMethod(forward)

    def call(*args: Any, **kwargs: Any) -> Any:
        found = find()
        assert found is not None
        if isinstance(found, nn.Module):
            return type(found).forward(found, *args, **kwargs)
        return found(*args, **kwargs)

    return call


class Fused:
    """A forward that computes with what it copied from modules. It holds no module that holds it.

    watch: of all that it copied from; None until it is in its place.

    Args:
        module: whose forward it takes the place of.
    """

    watch: Watch | None = None

    def __init__(self, module: Any) -> None:
        self._original, self._find = forward_of(module), ref(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the module computes by its class's forward: what we copied belongs to the original."""
        copied = memo[id(self._find())]  # put there before its attributes are copied
        return MethodType(type(copied).forward, copied)


def put_in_place(module: nn.Module, fused: Fused, *owners: Any) -> None:
    """Give a module a forward that computes with what it copied from these owners, and note all of that."""
    module.forward = fused  # type: ignore[assignment]
    fused.watch = Watch(*owners)  # now, since the module's forward is among its attributes


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether one of these modules has a hook, so that it has to be called."""
    if _global_forward_hooks or _global_forward_pre_hooks:
        return True
    return any((m._forward_hooks or m._forward_pre_hooks) and _listens(m) for m in modules)


class HookWatch:
    """`has_hooks` for the same modules again and again: looks at them only where the answer may have changed."""

    def __init__(self) -> None:
        self._none_at = -1  # how many hooks torch had registered in all when none was found

    def found_in(self, modules: Callable[[], Iterable[nn.Module]]) -> bool:
        """Whether one of the modules has a hook, so that it has to be called."""
        latest = RemovableHandle.next_id  # of the hook that will be registered next
        collecting = _is_collecting()  # then hooks that are there already come alive
        if latest == self._none_at and not collecting:
            return False
        found = has_hooks(modules())
        self._none_at = -1 if found or collecting else latest
        return found


def _is_collecting() -> bool:
    """Whether hidden states or router logits were asked for, which Transformers collects by hooks that then stay."""
    collector = getattr(output_capturing, "_active_collector", None)
    return collector is None or bool(collector.get())  # empty where nothing was asked for


def _listens(module: nn.Module) -> bool:
    if module._forward_pre_hooks or _is_collecting():
        return True
    return any(getattr(hook, "__module__", "") != output_capturing.__name__ for hook in module._forward_hooks.values())
