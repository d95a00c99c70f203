"""What takes long before a request is submitted, outside of the event loop: writing and encoding prompts, grammars.

prompt = await preparing.run(request, encode, tokenizer, text, most=8)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request

from .requests import NotReady, QueueFull
from .stream import unless_left

T = TypeVar("T")
_RETRY_S = 1.0


class Preparing:
    """A thread that prepares one request after the other; for one event loop."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "moestro-prepare")
        self._count, self._is_closed = 0, False

    async def run(self, request: Request, call: Callable[..., T], *given: Any, most: int) -> T:
        """What a call gives; it is left out where its client leaves before it has begun.

        Args:
            most: calls that may run and wait.

        Raises:
            QueueFull, NotReady, ClientLeft: as they say.
        """
        if self._count >= most:
            raise QueueFull(self._count, _RETRY_S)
        self._count += 1
        try:
            return await unless_left(request, self._called(call, *given), close=lambda: None)
        finally:
            self._count -= 1

    def close(self) -> None:
        """Take no more calls and leave out those that wait."""
        self._is_closed = True
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _called(self, call: Callable[..., T], *given: Any) -> T:
        try:
            called = asyncio.get_running_loop().run_in_executor(self._executor, call, *given)
        except RuntimeError:  # shut down
            raise _closing() from None
        try:
            return await called
        except asyncio.CancelledError:
            if self._is_closed:
                raise _closing() from None
            raise


def _closing() -> NotReady:
    return NotReady("the server is being closed; start it again")
