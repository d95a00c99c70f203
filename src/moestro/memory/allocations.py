"""Follows the memory that operations ask for: each storage from the operation that makes it to its last tensor's end.

    >>> with StorageFollower() as follower:
    ...     total = torch.ones(1024, device="meta") + 1
    >>> follower.peak_bytes
    8192

Knows neither models nor plans.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")


class TooLong(Exception):
    """A pass had more operations than were allowed."""


class StorageFollower(TorchDispatchMode):
    """Counts the bytes of storages that operations make in it: alive now, and the most at once.

    Follows tensors of any device, of this thread. On meta, what an operation gives for arguments of equal shapes is
    remembered: layers are alike, and most of a pass would be spent on working out shapes again.
    """

    def __init__(self, most_calls: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's is not
        self.live_bytes: int = 0
        self.peak_bytes: int = 0
        self.calls: int = 0
        self._most_calls = most_calls
        self._alive: set[int] = set()
        self._known: dict[Any, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if self._most_calls is not None and self.calls > self._most_calls:
            raise TooLong
        if not _makes_new(func):
            return func(*args, **(kwargs or {}))
        out = self._call(func, args, kwargs or {})
        for found in out if isinstance(out, tuple | list) else (out,):
            if isinstance(found, Tensor):
                self._follow(found)
        return out

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        try:
            key = (func, _shapes(args), _shapes(tuple(kwargs.items())))
            known = self._known.get(key)
        except TypeError:  # an argument that cannot be a key
            return func(*args, **kwargs)
        if known is not None:
            made = tuple(torch.empty_strided(*like[:2], dtype=like[2], device=META) for like in known)
            return made[0] if len(made) == 1 else made
        out = func(*args, **kwargs)
        several = out if isinstance(out, tuple) else (out,)
        if all(isinstance(t, Tensor) and t.is_meta for t in several):
            self._known[key] = [(t.shape, t.stride(), t.dtype) for t in several]
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, n_bytes = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        weakref.finalize(storage, self._forget, key, n_bytes).atexit = False
        self.live_bytes += n_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, key: int, n_bytes: int) -> None:
        self._alive.discard(key)
        self.live_bytes -= n_bytes


@functools.cache
def _makes_new(func: Any) -> bool:
    """Whether all that an operation returns is new, so that its shapes tell all about it."""
    schema = func._schema
    return not schema.is_mutable and all(one.alias_info is None for one in schema.returns)


def _shapes(thing: Any) -> Any:
    """An argument as a key: a tensor by its shape, strides and dtype; tensors that are not on meta cannot be one."""
    if isinstance(thing, Tensor):
        if not thing.is_meta:
            raise TypeError
        return thing.shape, thing.stride(), thing.dtype
    if isinstance(thing, list | tuple):
        return tuple([_shapes(part) for part in thing])
    return type(thing), thing
