"""The server's routes, around a `Service` that loads and answers.

uvicorn.run(make_app(Service("demo", loads)))
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from time import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from . import chat, completions, messages, messages_reply
from .answers import Answers
from .assets import page_routes
from .body import JsonRoute
from .description import describe
from .faults import add_handlers
from .fields import check_model
from .guard import Guard
from .info import info_routes
from .journal import Journal
from .live import Live, live_routes
from .service import Service
from .stream import event, streamed, unless_left


def make_app(
    service: Service,
    *,
    host: str = "127.0.0.1",
    names: Collection[str] = (),
    key: str | None = None,
    body_bytes: int = 8 << 20,
    body_s: float = 30.0,
    on_failed: Callable[[], None] = lambda: None,
) -> FastAPI:
    """All routes, with what guards them.

    Args:
        host, names, key, body_bytes, body_s: as in `Guard`.
        on_failed: called by another thread when the model could not be loaded.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start(on_failed)
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="Moestro", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.router.route_class = JsonRoute
    journal = Journal(service)
    add_handlers(app)
    app.add_middleware(Guard, host=host, names=names, key=key, body_bytes=body_bytes, body_s=body_s)
    app.add_middleware(journal.middleware)
    app.include_router(info_routes(service, journal))
    app.include_router(live_routes(Live(service)))
    app.include_router(page_routes())
    _add_answers(app, service, journal)
    describe(app)
    return app


def _add_answers(app: FastAPI, service: Service, journal: Journal) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(asked: chat.ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        check_model(service, asked.model)
        ready = service.ready()
        requests = await service.prepared(request, chat.prepare, ready, asked)
        one = asked.parallel_tool_calls is False
        answers = Answers(ready, requests, tools=asked.tool_values, has_one_call=one, on_end=journal.noting(request))
        head = _head("chatcmpl", asked.model)
        if asked.stream:
            return _openai_stream(request, chat.chunks(ready, asked, answers, head), answers)
        return JSONResponse(await unless_left(request, chat.whole(ready, asked, answers, head), answers.close))

    @app.post("/v1/completions", response_model=None)
    async def text_completions(asked: completions.CompletionRequest, request: Request) -> Response:
        """Continue a text."""
        check_model(service, asked.model)
        ready = service.ready()
        requests = await service.prepared(request, completions.prepare, ready, asked)
        answers = Answers(ready, requests, is_plain=True, on_end=journal.noting(request))
        head = _head("cmpl", asked.model)
        if asked.stream:
            return _openai_stream(request, completions.chunks(ready, asked, answers, head), answers)
        return JSONResponse(await unless_left(request, completions.whole(ready, asked, answers, head), answers.close))

    @app.post("/v1/messages", response_model=None)
    async def anthropic_messages(asked: messages.MessagesRequest, request: Request) -> Response:
        """Answer a conversation, by Anthropic's protocol."""
        check_model(service, asked.model)
        ready = service.ready()
        requests = await service.prepared(request, messages.prepare, ready, asked)
        one = asked.has_one_call
        answers = Answers(ready, requests, tools=asked.tool_values, has_one_call=one, on_end=journal.noting(request))
        head = {"id": f"msg_{secrets.token_hex(12)}", "model": asked.model}
        if asked.stream:
            told = messages_reply.events(asked, answers, head, len(requests[0].prompt))
            return streamed(request, told, close=answers.close, ping=messages_reply.PING, failed=messages_reply.failed)
        return JSONResponse(await unless_left(request, messages_reply.whole(asked, answers, head), answers.close))

    @app.post("/v1/messages/count_tokens", response_model=None)
    async def count_tokens(asked: messages.CountRequest, request: Request) -> Any:
        """Count the tokens of a conversation, by Anthropic's protocol."""
        check_model(service, asked.model)
        prompt = await service.prepared(request, messages.prompt_for, service.ready(), asked)
        return {"input_tokens": len(prompt)}


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"{kind}-{secrets.token_hex(12)}", "object": "", "created": int(time()), "model": model}


def _openai_stream(request: Request, values: AsyncIterator[Any], answers: Answers) -> Response:
    async def events() -> AsyncIterator[str]:
        async for value in values:
            yield event(value)
        yield "data: [DONE]\n\n"

    return streamed(request, events(), close=answers.close)
