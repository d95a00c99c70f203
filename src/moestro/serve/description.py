"""What /openapi.json says beyond FastAPI's own description: which statuses an operation has, and the errors' form."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from .faults import ANTHROPIC

_OF_ALL = {
    400: "The request cannot be answered; which field, and why",
    401: "The key is missing or wrong",
    403: "A host or a page that may not use this server",
}
_OF_BODIES = {
    408: "The body was not there in time",
    413: "The body is too large",
    415: "The body is not plain JSON",
    429: "As many requests wait as may; Retry-After says when to ask again",
    500: "The answer failed; the server goes on",
    503: "The model is being loaded, or the server closed",
}
_STREAMS = ("/v1/chat/completions", "/v1/completions", "/v1/messages")  # where the request says so
_OPENAI_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}


def describe(app: FastAPI) -> None:
    """Have an app describe itself so."""
    fastapis = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = fastapis()
            schemas = found.setdefault("components", {}).setdefault("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            schemas |= {"OpenAIError": _OPENAI_ERROR, "AnthropicError": _ANTHROPIC_ERROR}
            for path, methods in found["paths"].items():
                for method, operation in methods.items():
                    operation["responses"] = _responses(path, method, operation["responses"]["200"])
        return app.openapi_schema or {}

    app.openapi = described  # type: ignore[method-assign]


def _responses(path: str, method: str, good: dict[str, Any]) -> dict[str, Any]:
    anything = {"schema": {"type": "object"}}
    kinds = {"/metrics": ["text/plain"], "/live": ["text/event-stream"]}.get(path, ["application/json"])
    if path in _STREAMS:
        kinds = [*kinds, "text/event-stream"]
    text: dict[str, Any] = {"schema": {"type": "string"}}
    content = {kind: anything if kind == "application/json" else text for kind in kinds}
    found: dict[str, Any] = {"200": good | {"content": content}}
    statuses = _OF_ALL | (_OF_BODIES if method == "post" else {})
    if path == "/live":
        statuses |= {429: "Too many streams are open"}
    if path in ("/v1/models/{name}", *_STREAMS, "/tokenize", f"{ANTHROPIC}/count_tokens"):
        statuses |= {404: "There is no model of this name"}
    name = "AnthropicError" if path.startswith(ANTHROPIC) else "OpenAIError"
    error = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    found |= {str(status): {"description": what, "content": error} for status, what in sorted(statuses.items())}
    if path == "/health":
        found["503"] = {"description": "The model does not answer; why", "content": {"application/json": anything}}
    return found
