"""Streams of server-sent events that notice when the client has left, and say that they live while nothing comes."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .faults import ClientLeft, error_value

logger = logging.getLogger("moestro")
T = TypeVar("T")
PING_S = 10.0


def event(value: Any, name: str | None = None) -> str:
    """One event as text, with JSON as its data."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def streamed(
    request: Request,
    events: AsyncIterator[str],
    *,
    close: Callable[[], None],
    ping: str = ": ping\n\n",
    failed: Callable[[Any], str] = event,
) -> StreamingResponse:
    """An answer of events.

    Args:
        close: called at the end, also where the client has left.
        ping: sent while nothing else comes.
        failed: writes the error object of an answer that fails in its midst.
    """

    async def body() -> AsyncIterator[bytes]:
        nothing = object()
        waits: asyncio.Task[Any] | None = None
        try:
            while True:
                waits = waits or asyncio.ensure_future(anext(events, nothing))
                done, _ = await asyncio.wait([waits], timeout=PING_S)
                if not done:
                    yield ping.encode()
                    continue
                text, waits = waits.result(), None
                if text is nothing:
                    return
                yield text.encode("utf-8", "replace")
        except Exception as error:
            yield failed(error_value(request.url.path, error)).encode("utf-8", "replace")
        finally:
            if waits is not None:
                waits.cancel()

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return _Closing(body(), close, media_type="text/event-stream", headers=headers)


class _Closing(StreamingResponse):
    """Calls `close` at the end, also where the client leaves before the first event is asked for."""

    def __init__(self, content: AsyncIterator[bytes], close: Callable[[], None], **more: Any) -> None:
        super().__init__(content, **more)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def unless_left(request: Request, answer: Awaitable[T], close: Callable[[], None]) -> T:
    """Await an answer; where the client leaves before, close what makes it.

    Raises:
        ClientLeft: it has left.
    """

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(left())
    try:
        await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ClientLeft
        return answering.result()
    finally:
        close()
        for task in (answering, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task
