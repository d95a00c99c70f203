"""What a client is told when a request is refused or fails: OpenAI's error object, or Anthropic's on its own paths.

>>> status_of(RequestError("temperature is -1; it must be 0 or more"))
400
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from ..errors import BudgetError, MoestroError, RequestError
from ..logs import keep_traceback
from .requests import EngineStopped, NotReady, QueueFull, TooLong

_LONGEST_LINE = 1000  # characters
ANTHROPIC = "/v1/messages"  # paths that begin so
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class Refused(MoestroError):
    """A request that is refused with a status, a code and the field that is at fault."""

    def __init__(
        self,
        status: int,
        line: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})
        super().__init__(line)


class ClientLeft(Exception):
    """The client has closed its connection before it had its answer."""


class AnswerFailed(MoestroError):
    """An answer that was begun failed in the model's steps."""


def status_of(error: Exception) -> int:
    """The status of an answer that says no more than this error."""
    if isinstance(error, Refused):
        return error.status
    if isinstance(error, QueueFull):
        return 429
    if isinstance(error, (EngineStopped, NotReady)):
        return 503
    return 400 if isinstance(error, (RequestError, BudgetError)) else 500


def error_object(path: str, status: int, line: str, *, code: str | None = None, param: str | None = None) -> Any:
    """The JSON value that a client of a path reads."""
    if path.startswith(ANTHROPIC):
        kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": line}}
    kind = "invalid_request_error" if status < 500 else "server_error"
    if status in (401, 403, 429):
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}[status]
    return {"error": {"message": line, "type": kind, "param": param, "code": code}}


def error_value(path: str, error: Exception) -> Any:
    """The JSON value for an error, without its status: what stands in a stream that has begun."""
    code = "context_length_exceeded" if isinstance(error, TooLong) else getattr(error, "code", None)
    return error_object(path, status_of(error), _line(error), code=code, param=getattr(error, "param", None))


def error_answer(path: str, error: Exception) -> JSONResponse:
    """The whole answer to a request that is refused or failed."""
    headers = dict(getattr(error, "headers", None) or {})
    retry_s = getattr(error, "retry_s", None)
    if retry_s is not None:
        headers["Retry-After"] = f"{retry_s:.0f}"
    return JSONResponse(error_value(path, error), status_of(error), headers=headers)


def add_handlers(app: FastAPI) -> None:
    """Answer every error of an app so."""

    async def ours(request: Request, error: Exception) -> JSONResponse:
        return error_answer(request.url.path, error)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        param, line = in_one_line(error)
        return error_answer(request.url.path, Refused(400, line, param=param))

    async def other(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if isinstance(error.__cause__, Refused):  # FastAPI's word for whatever failed while it read the body
            return error_answer(request.url.path, error.__cause__)
        said = HTTPStatus(error.status_code).phrase
        line = f"{request.method} {request.url.path}: {said}" if error.detail == said else str(error.detail)
        refused = Refused(error.status_code, line, headers=error.headers)
        return error_answer(request.url.path, refused)

    async def left(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # for the journal alone

    app.add_exception_handler(MoestroError, ours)
    app.add_exception_handler(ClientLeft, left)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, other)
    app.add_exception_handler(Exception, ours)


def in_one_line(error: RequestValidationError) -> tuple[str | None, str]:
    """The field at fault of a request that is not as it must be, and what is wrong with it and with others."""
    said: list[str] = []
    first: str | None = None
    for one in error.errors():
        where = [str(part) for part in one["loc"] if part not in ("body", "query", "path")]
        param = ".".join(where) or None
        first = first or param
        what = str(one["msg"]).removeprefix("Value error, ")
        if one["type"] == "extra_forbidden":
            what = "is not supported; leave it out"
        elif one["type"] == "json_invalid":
            param, what = None, f"the body is not JSON ({what}: {one.get('ctx', {}).get('error', '')})"
        elif one["type"] == "missing" and not where:
            what = "the request has no body; it needs a JSON object"
        said.append(f"{param}: {what}" if param else what)
    shown = list(dict.fromkeys(said))
    return first, " ".join("; ".join(shown[:3]).split())[:600]


def _line(error: Exception) -> str:
    line = str(error) if isinstance(error, MoestroError) else keep_traceback(error)
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}..."  # it may say what the client has sent
