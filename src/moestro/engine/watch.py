"""What a fast path copied when it was made, noted so that each use can see whether it still holds.

A fast path (a fused layer, a captured step, a recognized activation) computes with what it read once: a router's top_k,
a norm's epsilon, the address of a weight. A `Watch` notes every attribute of the modules and configs that these came
from, and `holds` compares all of them, in 0.4 us a module. What does not hold any longer goes the original way.

Not noted is what tensors contain: kernels read weights where they lie, each time, and packed weights refuse to be
edited in place (`decode/dense.py`). Of classes, the methods of `_METHODS` are noted; functions of Python modules
are not.

    >>> norm = torch.nn.RMSNorm(8, eps=1e-5)
    >>> watch = Watch(norm)
    >>> norm.eps = 1e-6
    >>> watch.holds()
    False
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers import PreTrainedConfig

# What torch itself keeps in a module: hooks, which `decode/hooks.py` asks for, and dicts that are compared one by one.
_TORCH_KEEPS = frozenset(vars(nn.Module())) - {"training"}
_TENSORS = ("_parameters", "_buffers")
# Set on a decoder when hidden states are first asked for; it changes nothing.
_TRANSFORMERS_NOTES = ("_output_capturing_hooks_installed",)


GLOBAL_HOOKS = (_global_forward_hooks, _global_forward_pre_hooks)  # of all modules
_METHODS = ("forward", "_apply_gate")  # by which modules compute, the second of experts
_HOLDERS = ("forward", "_moestro")  # attributes through which a module holds a fast path, which holds the watch


class _Held:
    """Equals the object that an attribute had, without keeping it alive."""

    __slots__ = ("_find",)

    def __init__(self, value: Any) -> None:
        self._find = ref(value)

    def __eq__(self, other: object) -> bool:
        return other is not None and self._find() is other

    __hash__ = None  # type: ignore[assignment]


class _Noted(NamedTuple):
    """A module, its class, what gets its attributes, these, how many there are, and the addresses of those inside."""

    find: ReferenceType[Any]
    kind: type
    getter: itemgetter[Any]
    values: tuple[Any, ...]
    size: int
    inside: list[int]


class Watch:
    """Notes of modules, each by itself, and of configs with all that these hold.

    It keeps no module alive, since a module holds the fast path that holds the watch. A module inside that was replaced
    is told by its address, so it must be noted too if it can go: an address may be used again.

    Args:
        owners: modules (without those inside), configs. hooks: whether to note which modules have forward hooks.
    """

    def __init__(self, *owners: Any, hooks: bool = False) -> None:
        self._owners: list[_Noted] = []
        self._homes: list[dict[Any, Any]] = []  # these three side by side, an item for each entry of a dict
        self._names: list[Any] = []
        self._values: list[Any] = []
        self._dicts: list[dict[Any, Any]] = []
        self._sizes: list[int] = []
        self._lists: list[tuple[list[Any], list[Any]]] = []
        self._tensors: list[Tensor] = []
        self._methods: dict[tuple[type, str], Any] = {}
        self._hooks: list[dict[int, Any]] = []
        self._notes_hooks = hooks
        self._seen: set[int] = set()
        for owner in owners:
            self.add(owner)
        self._places = list(map(Tensor.data_ptr, self._tensors))
        self._counts = list(map(Tensor.numel, self._tensors))
        self._strides = list(map(Tensor.stride, self._tensors))
        self._hooked = list(map(bool, self._hooks))

    def add(self, owner: Any) -> None:
        """Note all attributes of an object. Only before the first question."""
        if id(owner) in self._seen:
            return
        self._seen.add(id(owner))
        if isinstance(owner, nn.Module):
            self._add_module(owner)
        elif isinstance(owner, PreTrainedConfig):
            self._add_dict(vars(owner))
        elif isinstance(owner, dict):
            self._add_dict(owner)
        elif isinstance(owner, list):
            self._lists.append((owner, list(owner)))
        elif isinstance(owner, tuple):
            for item in owner:
                self.add(item)
        elif isinstance(owner, Tensor):
            self._tensors.append(owner)

    def holds(self) -> bool:
        """Whether everything is as it was noted, and no gradient is asked for."""
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self._tensors):
            return False
        try:
            for (kind, name), method in self._methods.items():
                if getattr(kind, name) is not method:
                    return False
            for find, kind, getter, values, size, inside in self._owners:
                owner = find()
                now = owner.__dict__
                if type(owner) is not kind:
                    return False
                if len(now) != size and _count(now) != size:
                    return False
                children = now["_modules"]
                if getter(now) != values or ((children or inside) and list(map(id, children.values())) != inside):
                    return False
            return (
                list(map(dict.get, self._homes, self._names)) == self._values
                and list(map(len, self._dicts)) == self._sizes
                and list(map(Tensor.data_ptr, self._tensors)) == self._places
                and list(map(Tensor.numel, self._tensors)) == self._counts
                and list(map(Tensor.stride, self._tensors)) == self._strides
                and list(map(bool, self._hooks)) == self._hooked
                and all(now == before for now, before in self._lists)
            )
        except (AttributeError, KeyError, RuntimeError):  # gone; or a tensor stands where another stood
            return False

    def notes(self) -> Iterator[tuple[Any, str]]:
        """What was noted: an owner (a module, a dict, a list or a tensor) and a name in it."""
        for find, _, getter, *_ in self._owners:
            owner: Any = find()
            yield from ((owner, name) for name in getter.__reduce__()[1])
            yield from ((owner, name) for name in owner._modules)
        yield from zip(self._homes, self._names, strict=True)
        yield from ((items, "") for items, _ in self._lists)
        yield from ((tensor, "") for tensor in self._tensors)

    def _add_module(self, module: nn.Module) -> None:
        entries = vars(module)
        ignored = {*_TORCH_KEEPS, *_TRANSFORMERS_NOTES, "_is_hf_initialized", "training"}
        names = ["training", "_parameters", *(name for name in entries if name not in ignored)]
        values = [_Held(entries[name]) if name in _HOLDERS else entries[name] for name in names]
        for name in _METHODS:
            if (method := getattr(type(module), name, None)) is not None:
                self._methods[type(module), name] = method
        if self._notes_hooks:
            self._hooks += [module._forward_hooks, module._forward_pre_hooks, *GLOBAL_HOOKS]
        inside = list(map(id, module._modules.values()))
        getter = itemgetter(*names)
        self._owners.append(_Noted(ref(module), type(module), getter, tuple(values), _count(entries), inside))
        for name in _TENSORS:
            self._add_dict(entries[name])
        for name, value in entries.items():
            if name not in _TORCH_KEEPS and not isinstance(value, nn.Module):
                self.add(value)

    def _add_dict(self, entries: dict[Any, Any]) -> None:
        self._dicts.append(entries)
        self._sizes.append(len(entries))
        for name, value in entries.items():
            self._homes.append(entries)
            self._names.append(name)
            self._values.append(value)
            self.add(value)


def _count(entries: dict[str, Any]) -> int:
    """How many attributes a module has, without a note that changes nothing."""
    return len(entries) - sum(name in entries for name in _TRANSFORMERS_NOTES)
