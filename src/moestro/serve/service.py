"""A model that is being loaded by a thread, serves, or could not be loaded; what the routes of a server stand on.

service = Service("demo", lambda: Loaded(model, tokenizer, Engine(model, tokenizer)))
service.start()
service.ready().engine.submit(request)      # NotReady while it is being loaded
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock, Thread
from time import time
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ..errors import MoestroError, is_fault
from ..logs import keep_traceback
from ..progress import heard
from .preparing import Preparing
from .requests import NotReady

if TYPE_CHECKING:
    from fastapi import Request

    from ..text.responses import Responses
    from .engine import Engine
    from .grammar import Grammars

logger = logging.getLogger("moestro")
T = TypeVar("T")
U = TypeVar("U")
State = Literal["loading", "ready", "failed", "closing"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a load gives."""

    model: Any
    tokenizer: Any
    engine: Engine


@dataclass(frozen=True, slots=True)
class Ready:
    """What answers are made of.

    responses: how the tokenizer's family marks the parts of an answer; None for none. grammars: what compiles those
    that an answer is to follow. longest_token: characters.
    """

    model: Any
    tokenizer: Any
    engine: Engine
    responses: Responses | None
    grammars: Grammars
    longest_token: int


class Service:
    """One model under one name.

    created_s: when it was made, in seconds since 1970. preparing: for what takes long before a request is submitted.

    Args:
        name: of the model in answers.
        loads: called by the loading thread.
        is_strict: whether a request must name this model.
        has_key: whether requests must carry a key.
    """

    def __init__(
        self, name: str, loads: Callable[[], Loaded], *, is_strict: bool = False, has_key: bool = False
    ) -> None:
        self.name, self.is_strict, self.has_key = name, is_strict, has_key
        self.created_s = int(time())
        self.preparing = Preparing()
        self.error: str | None = None
        self.is_fault = False  # whether `error` is one that was not expected
        self._loads, self._lock = loads, Lock()
        self._state: State = "loading"
        self._progress: tuple[str, float | None] | None = None
        self._ready: Ready | None = None
        self._on_failed: Callable[[], None] = lambda: None

    def start(self, on_failed: Callable[[], None] = lambda: None) -> None:
        """Load in a thread of its own.

        Args:
            on_failed: called by that thread when the model could not be loaded.
        """
        self._on_failed = on_failed
        Thread(target=self._load, name="moestro-load", daemon=True).start()

    @property
    def state(self) -> State:
        """What it does; `failed` also when the engine's thread has died."""
        ready = self._ready
        if self._state == "ready" and ready is not None and ready.engine.progress().state == "failed":
            return "failed"
        return self._state

    @property
    def load_progress(self) -> tuple[str, float | None] | None:
        """What is done of loading now, in words, and which share of it, where that is known."""
        return self._progress if self._state == "loading" else None

    @property
    def engine(self) -> Engine | None:
        """The engine, once there is one."""
        return None if self._ready is None else self._ready.engine

    @property
    def model(self) -> Any | None:
        """The model, once it is loaded."""
        return None if self._ready is None else self._ready.model

    def ready(self) -> Ready:
        """What answers are made of.

        Raises:
            NotReady: there is none, or none any more.
        """
        ready = self._ready
        if self._state == "ready" and ready is not None:
            return ready
        if self._state == "loading":
            what, share = self._progress or ("loading", None)
            done = "" if share is None else f", {share:.0%} done"
            raise NotReady(f"the model {self.name} is being loaded ({what}{done}); try again")
        raise NotReady(self.error or "the server is being closed; start it again")

    async def prepared(self, request: Request, call: Callable[[Ready, U], T], ready: Ready, asked: U) -> T:
        """What a call makes of a request, by a thread of its own; for the server's event loop.

        Raises:
            QueueFull: as many requests are prepared as may run and wait. NotReady, ClientLeft: as they say.
        """
        most = ready.engine.max_requests + ready.engine.queue
        return await self.preparing.run(request, call, ready, asked, most=most)

    def close(self, *, finish: bool = True) -> bool:
        """Take no more requests; returns when running answers are finished, or were cut where they are not to be."""
        with self._lock:
            if self._state in ("loading", "ready"):
                self._state = "closing"
            ready = self._ready
        self.preparing.close()
        return ready is None or ready.engine.close(finish=finish)

    def _load(self) -> None:
        try:
            with heard(self._note):
                loaded = self._loads()
                from ..text.responses import find_responses

                responses = find_responses(loaded.tokenizer)
                grammars = _grammars(loaded)
                longest = max(map(len, loaded.tokenizer.get_vocab()))
        except BaseException as error:  # whatever it is, the server must say so and end
            self.is_fault = not isinstance(error, MoestroError) and is_fault(error)
            self.error = keep_traceback(error) if self.is_fault else str(error)
            self._state = "failed"
            self._on_failed()
            return
        with self._lock:
            self._ready = Ready(loaded.model, loaded.tokenizer, loaded.engine, responses, grammars, longest)
            is_closing = self._state == "closing"
            if not is_closing:
                self._state = "ready"
        if is_closing:
            loaded.engine.close(finish=False)
        else:
            logger.info("%s serves: %s", self.name, loaded.engine.batching)

    def _note(self, what: str, share: float | None) -> None:
        self._progress = (what, share)


def _grammars(loaded: Loaded) -> Grammars:
    from ..text.generation import embedding_rows
    from .grammar import Grammars
    from .sampling import ends_of

    return Grammars(loaded.tokenizer, embedding_rows(loaded.model), ends_of(loaded.model.generation_config))
