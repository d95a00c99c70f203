"""The stream of what the server does now, at /live, for the page; docs/live.md describes it.

One task looks at the engine twice a second, as long as there is a stream. Every stream is sent what it has not seen
yet, so that a slow client misses updates and delays nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from .faults import Refused
from .service import Service
from .stream import event, streamed

if TYPE_CHECKING:
    from .scene import Scene

logger = logging.getLogger("moestro")
EVERY_S = 0.5
MOST_STREAMS = 8


class Live:
    """The streams of one server.

    Args:
        every_s: between two updates.
    """

    def __init__(self, service: Service, every_s: float = EVERY_S) -> None:
        self._service, self._every_s = service, every_s
        self._streams = 0
        self._task: asyncio.Task[None] | None = None
        self._values: dict[str, Any] = {}  # of the events, by name, in the order in which they are sent
        self._texts: dict[str, tuple[int, str]] = {}  # each with a number that grows
        self._number = 0
        self._tick = asyncio.Event()
        self._is_over = False

    def stream(self, request: Request) -> Response:
        """A stream for one client.

        Raises:
            Refused: there are too many.
        """
        if self._streams >= MOST_STREAMS:
            line = f"{self._streams} streams of /live are open, which is the most; close a page that shows one"
            raise Refused(429, line, headers={"Retry-After": "5"})
        self._streams += 1
        if self._task is None or self._task.done():
            self._is_over = False
            self._task = asyncio.create_task(self._look())
        return streamed(request, self._events(), close=self._leave)

    def _leave(self) -> None:
        self._streams -= 1
        if not self._streams and self._task is not None:
            self._task.cancel()
            self._task = None

    async def _events(self) -> AsyncIterator[str]:
        seen: dict[str, int] = {}
        while True:
            tick = self._tick
            for name, (number, text) in list(self._texts.items()):
                if seen.get(name) != number:
                    seen[name] = number
                    yield text
            if self._is_over:
                return
            await tick.wait()

    async def _look(self) -> None:
        """Look until the server is closed or the last client has left."""
        self._texts.clear()
        self._values.clear()
        scene: Scene | None = None
        try:
            while True:
                state = self._state()
                self._tell("state", state)
                if state["state"] in ("closing", "failed"):
                    self._is_over = True
                elif state["state"] == "ready":
                    scene = scene or self._begin()
                    await self._show(scene)
                self._wake()
                if self._is_over:
                    return
                await asyncio.sleep(self._every_s)
        except Exception:
            logger.exception("the page's stream has failed")
            self._is_over = True
        finally:
            self._wake()
            if scene is not None:
                scene.close()

    def _wake(self) -> None:
        """Let each stream send what is new."""
        self._tick.set()
        self._tick = asyncio.Event()

    def _begin(self) -> Scene:
        from .scene import Scene  # it needs torch, which a server that loads does not wait for

        ready = self._service.ready()
        return Scene(self._service.name, ready.model, ready.engine)

    async def _show(self, scene: Scene) -> None:
        if "model" not in self._values:
            self._tell("model", await asyncio.to_thread(scene.opening))
        update, cells = await asyncio.to_thread(scene.now)
        self._tell("cells", {"cells": cells})
        self._tell("now", update)

    def _tell(self, name: str, value: Any) -> None:
        """Have an event sent, unless it says what it said before."""
        if self._values.get(name) != value:
            self._number += 1
            self._values[name], self._texts[name] = value, (self._number, event(value, name))

    def _state(self) -> dict[str, Any]:
        service = self._service
        found: dict[str, Any] = {"state": service.state, "model": service.name}
        if service.state == "loading":
            found["what"], found["share"] = service.load_progress or ("loading", None)
        progress = None if service.engine is None else service.engine.progress()
        error = service.error or (None if progress is None else progress.error)
        if error is not None:
            found["error"] = error
        return found


def live_routes(live: Live) -> APIRouter:
    """/live."""
    routes = APIRouter()

    @routes.get("/live", response_model=None)
    async def stream(request: Request) -> Response:
        """What the server does now, as a stream of events."""
        return live.stream(request)

    return routes
