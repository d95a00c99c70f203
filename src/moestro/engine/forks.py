"""What a forked child makes anew or refuses: threads do not follow a fork, and locks that they held stay held.

The kernels make their own pool anew (csrc/experts.cpp). torch's pool cannot be: in a child, torch itself computes on
one thread, or it would wait for the parent's for good. Models whose device has threads of its own refuse to go on.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from weakref import WeakSet

import torch

from ..errors import ModelError

_locks: WeakSet[StepLock] = WeakSet()
_is_child = False


class _Taken(threading.local):
    """The locks that a thread has taken, the latest last."""

    def __init__(self) -> None:
        self.locks: list[threading.RLock] = []


class StepLock:
    """Lets one thread at a time take a model's layer steps. In a forked child it is free, or refuses all steps.

    Args:
        threads_of: the name of a device that has threads; None for one that has none, which a child can use.
    """

    def __init__(self, threads_of: str | None) -> None:
        self._threads_of, self._lock, self._is_lost = threads_of, threading.RLock(), False
        self._of_thread = _Taken()
        _locks.add(self)

    def __enter__(self) -> None:
        if self._is_lost:
            raise ModelError(
                f"this process was forked from the one that loaded the model, and the threads of device "
                f"{self._threads_of} stayed there; start processes by multiprocessing's 'spawn' and load it in them"
            )
        lock = self._lock
        lock.acquire()
        self._of_thread.locks.append(lock)

    def __exit__(self, *_: object) -> None:
        self._of_thread.locks.pop().release()  # the one that was taken, also where a fork came in between

    def go_on_in_child(self) -> None:
        """Forget the parent's threads, of which one may have held the lock."""
        self._lock, self._is_lost = threading.RLock(), self._threads_of is not None


def set_torch_threads(threads: int) -> None:
    """Let torch's operations use so many threads; in a forked child they keep to one."""
    if not _is_child:
        torch.set_num_threads(threads)


def only_here(call: Callable[[], None]) -> Callable[[], None]:
    """The call, which does nothing in a forked child, where it might wait for the parent's threads."""
    here = os.getpid()
    return lambda: call() if os.getpid() == here else None


def _go_on_in_child() -> None:
    global _is_child
    _is_child = True
    torch.set_num_threads(1)
    for lock in list(_locks):
        lock.go_on_in_child()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_go_on_in_child)
