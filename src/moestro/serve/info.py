"""What a server says of itself: its model, its health, its figures, and what a text is in tokens."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from .body import JsonRoute
from .chat import Message, Tool
from .faults import Refused
from .fields import Listed, ModelName, Strict, check_length, check_model
from .journal import Journal
from .service import Ready, Service


class TokenizeRequest(Strict):
    """What /tokenize takes: a text, or a conversation as the chat template writes it."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: Listed[Message] | None = None
    tools: Listed[Tool] | None = None
    add_special_tokens: bool = True


def info_routes(service: Service, journal: Journal) -> APIRouter:
    """/health, /metrics, /v1/models and /tokenize."""
    routes = APIRouter(route_class=JsonRoute)

    @routes.get("/health", response_model=None)
    async def health() -> Response:
        """200 where the model serves; 503 with what is done of loading, or why it does not serve."""
        value = _health(service)
        return JSONResponse(value, 200 if value["status"] == "ready" else 503)

    @routes.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Figures in Prometheus' form."""
        return Response(generate_latest(journal.registry), media_type=CONTENT_TYPE_LATEST)

    @routes.get("/v1/models", response_model=None)
    async def models() -> Any:
        """The one model, as OpenAI's and Anthropic's clients read it."""
        one = _model(service)
        return {"object": "list", "data": [one], "has_more": False, "first_id": one["id"], "last_id": one["id"]}

    @routes.get("/v1/models/{name:path}", response_model=None)
    async def model(name: str) -> Any:
        """The one model by its name."""
        if name != service.name:
            line = f"there is no model {name!r}; this server has {service.name!r}"
            raise Refused(404, line, code="model_not_found", param="model")
        return _model(service)

    @routes.post("/tokenize", response_model=None)
    async def tokenize(asked: TokenizeRequest, request: Request) -> Any:
        """The tokens of a text or a conversation."""
        if asked.model is not None:
            check_model(service, asked.model)
        ready = service.ready()
        tokens = await service.prepared(request, _tokens, ready, asked)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": ready.engine.context}

    return routes


def _tokens(ready: Ready, asked: TokenizeRequest) -> list[int]:
    from ..text.conversation import prompt_of
    from ..text.generation import encode

    if (asked.prompt is None) == (asked.messages is None):
        raise Refused(400, "one of prompt and messages is needed", param="prompt")
    check_length(ready, asked.prompt)
    if asked.messages is None:
        ids = encode(ready.tokenizer, asked.prompt or "", asked.add_special_tokens)
        return list(map(int, ids))
    messages = [one.model_dump(exclude_none=True) for one in asked.messages]
    tools = [one.model_dump(exclude_none=True) for one in asked.tools or ()]
    check_length(ready, messages, tools)
    return prompt_of(ready.tokenizer, messages, tools=tools or None)


def _model(service: Service) -> dict[str, Any]:
    made = datetime.fromtimestamp(service.created_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    found: dict[str, Any] = {"id": service.name, "object": "model", "created": service.created_s, "owned_by": "moestro"}
    found |= {"type": "model", "display_name": service.name, "created_at": made}
    if (engine := service.engine) is not None:
        found["max_model_len"] = engine.context
    return found


def _health(service: Service) -> dict[str, Any]:
    found: dict[str, Any] = {"status": service.state, "model": service.name}
    if service.state == "loading":
        what, share = service.load_progress or ("loading", None)
        found["loading"] = {"what": what, "share": share}
    if (engine := service.engine) is not None:
        now = engine.progress()
        found |= {
            "batching": engine.batching,
            "max_requests": engine.max_requests,
            "context": engine.context,
            "queue": engine.queue,
            "running": now.running,
            "waiting": now.waiting,
        }
        if now.error is not None:
            found["error"] = now.error
    if service.error is not None:
        found["error"] = service.error
    return found
