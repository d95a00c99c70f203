"""POST /v1/completions: a text that is continued as it is, without a chat template."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from pydantic import Field

from ..errors import RequestError
from .answers import Answers
from .chat import check_ended, usage
from .faults import Refused
from .fields import (
    MOST_ANSWERS,
    Choosing,
    Count,
    Listed,
    ModelName,
    NoEffect,
    Stop,
    StreamOptions,
    TokenId,
    check_length,
    check_values,
    requests_for,
)
from .requests import Finished, TokenLogprobs
from .requests import Request as EngineRequest
from .service import Ready
from .tokens import text_logprobs

_POSSIBLE: dict[str, tuple[Any, ...]] = {"suffix": ("",), "cache_prompt": (True,)}
_MOST_PROMPTS = 64


class CompletionRequest(Choosing, NoEffect):
    """What /v1/completions takes; any other field is refused."""

    model: ModelName
    prompt: (
        str
        | Annotated[Listed[str], Field(min_length=1, max_length=_MOST_PROMPTS)]
        | Annotated[Listed[TokenId], Field(min_length=1)]
        | Annotated[
            Listed[Annotated[Listed[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=_MOST_PROMPTS)
        ]
    )
    max_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    stop: Stop = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None


def prepare(ready: Ready, asked: CompletionRequest) -> list[EngineRequest]:
    """The engine's requests, prompt after prompt; takes as long as the prompts need to be encoded.

    Raises:
        RequestError, Refused: it cannot be answered; which field, and why.
    """
    check_values(asked, _POSSIBLE)
    n = asked.n or 1
    if asked.best_of is not None and asked.best_of != n:
        raise Refused(400, f"best_of is {asked.best_of}; only n itself ({n}) is supported", param="best_of")
    if asked.echo and asked.logprobs is not None:
        raise Refused(400, "echo with logprobs is not supported; leave one out", param="echo")
    if asked.echo and not all(isinstance(one, str) for one in _given(asked)):
        raise Refused(400, "echo needs prompts that are texts; leave it out", param="echo")
    if asked.stream_options is not None and not asked.stream:
        raise Refused(400, "stream_options needs stream to be true", param="stream_options")
    prompts = _prompts(ready, asked)
    if n * len(prompts) > ready.engine.max_requests + ready.engine.queue:
        raise RequestError(f"{len(prompts)} prompts with {n} answers each are more than may run and wait here")
    return [
        request
        for ids in prompts
        for request in requests_for(
            ready,
            ids,
            choosing=asked,
            n=n,
            max_new_tokens=asked.max_tokens or 16,  # OpenAI's default
            stop=asked.stop,
            logprobs=asked.logprobs,
            keeps_marks=False,
        )
    ]


def _prompts(ready: Ready, asked: CompletionRequest) -> list[list[int]]:
    """Token ids of each prompt."""
    from ..text.generation import encode

    for one in _given(asked):
        check_length(ready, one)
    return [one if isinstance(one, list) else list(map(int, encode(ready.tokenizer, one))) for one in _given(asked)]


def _given(asked: CompletionRequest) -> list[str | list[int]]:
    given: Any = asked.prompt
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given


class _Texts:
    """The texts so far of all answers."""

    def __init__(self, ready: Ready, asked: CompletionRequest, answers: Answers) -> None:
        self._ready, self._offsets = ready, [0] * len(answers)
        each = [one if isinstance(one, str) else "" for one in _given(asked)] if asked.echo else []
        self.echoes = [text for text in each for _ in range(asked.n or 1)] or [""] * len(answers)

    def choice(self, at: int, text: str, logprobs: tuple[TokenLogprobs, ...], reason: str | None) -> dict[str, Any]:
        """What is said of an answer, with its next piece."""
        logs = text_logprobs(self._ready, logprobs, self._offsets[at]) if logprobs else None
        self._offsets[at] += len(text)
        return {"index": at, "text": text, "logprobs": logs, "finish_reason": reason}


async def whole(ready: Ready, asked: CompletionRequest, answers: Answers, head: dict[str, Any]) -> dict[str, Any]:
    """The answer as one object."""
    texts = _Texts(ready, asked, answers)
    said = list(texts.echoes)
    logs: list[list[TokenLogprobs]] = [[] for _ in said]
    ends: dict[int, Finished] = {}
    async for at, event in answers:
        if isinstance(event, Finished):
            check_ended(event)
            ends[at] = event
            continue
        said[at] += "".join(part.text for part in event.parts)
        logs[at] += event.logprobs
    choices = [texts.choice(at, said[at], tuple(logs[at]), ends[at].reason) for at in range(len(answers))]
    return head | {"object": "text_completion", "choices": choices, "usage": usage(list(ends.values()), answers)}


async def chunks(ready: Ready, asked: CompletionRequest, answers: Answers, head: dict[str, Any]) -> AsyncIterator[Any]:
    """The answer in pieces."""
    texts = _Texts(ready, asked, answers)
    wants_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
    more = {"usage": None} if wants_usage else {}
    ends: list[Finished] = []

    def chunk(at: int, text: str, logprobs: tuple[TokenLogprobs, ...] = (), reason: str | None = None) -> Any:
        return head | {"object": "text_completion", "choices": [texts.choice(at, text, logprobs, reason)]} | more

    for at, text in enumerate(texts.echoes):
        if text:
            yield chunk(at, text)
    async for at, event in answers:
        if isinstance(event, Finished):
            check_ended(event)
            ends.append(event)
            yield chunk(at, "", (), event.reason)
        elif (text := "".join(part.text for part in event.parts)) or event.logprobs:
            yield chunk(at, text, event.logprobs)
    if wants_usage:
        yield head | {"object": "text_completion", "choices": [], "usage": usage(ends, answers)}
