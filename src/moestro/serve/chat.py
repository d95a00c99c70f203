"""POST /v1/chat/completions: OpenAI's chat, streamed or whole."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from ..errors import RequestError
from .answers import Answers
from .faults import AnswerFailed, Refused
from .fields import (
    MOST_ANSWERS,
    Choosing,
    Count,
    Listed,
    ModelName,
    NoEffect,
    Stop,
    StreamOptions,
    Strict,
    check_length,
    check_values,
    requests_for,
)
from .requests import Constraint, Finished
from .requests import Request as EngineRequest
from .service import Ready
from .tokens import content_logprobs

_POSSIBLE: dict[str, tuple[Any, ...]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "cache_prompt": (True,),
}
_REASONS = {"stop": "stop", "length": "length"}
Value = Any  # of JSON


class TextPart(Strict):
    """A part of a message; only texts are supported."""

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    cache_control: dict[str, Value] | None = None


class CalledFunction(Strict):
    """The function of a call. arguments: JSON."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A call that an earlier answer made."""

    id: str | None = None
    type: Literal["function"] | None = None
    index: int | None = None
    function: CalledFunction


class Message(Strict):
    """A message of the conversation so far."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Listed[TextPart] | None = None
    name: str | None = None
    tool_calls: Listed[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    annotations: Listed[Value] | None = None
    audio: None = None
    function_call: None = None


class Function(Strict):
    """A function that may be called. parameters: a JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Value] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool that may be called."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """The name of a function."""

    name: str


class NamedTool(Strict):
    """The one tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    """A schema that the answer follows, in `schema`."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Value] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Choosing, NoEffect):
    """What /v1/chat/completions takes; any other field is refused."""

    model: ModelName
    messages: Annotated[Listed[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    stop: Stop = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Listed[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: dict[str, Value] | None = None
    store: bool | None = None
    service_tier: str | None = None
    modalities: Listed[str] | None = None
    verbosity: str | None = None

    @property
    def tool_values(self) -> list[dict[str, Any]]:
        """The tools as a chat template takes them; none where none may be called."""
        if not self.tools or self.tool_choice == "none":
            return []
        return [one.model_dump(exclude_none=True) for one in self.tools]


def prepare(ready: Ready, asked: ChatRequest) -> list[EngineRequest]:
    """The engine's requests for a chat; takes as long as its prompt needs to be encoded.

    Raises:
        RequestError, Refused: it cannot be answered; which field, and why.
    """
    from ..text.conversation import prompt_of

    check_values(asked, _POSSIBLE)
    if asked.max_tokens and asked.max_completion_tokens and asked.max_tokens != asked.max_completion_tokens:
        raise Refused(400, "max_tokens and max_completion_tokens differ; leave one out", param="max_tokens")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise Refused(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    if asked.stream_options is not None and not asked.stream:
        raise Refused(400, "stream_options needs stream to be true", param="stream_options")
    from .constraints import check_tools

    tools = asked.tool_values
    check_tools(ready, tools)
    messages = [one.model_dump(exclude_none=True) for one in asked.messages]
    check_length(ready, messages, tools, asked.chat_template_kwargs)
    prompt = prompt_of(
        ready.tokenizer,
        messages,
        tools=tools or None,
        template_values=_template_values(ready, asked),
    )
    n = asked.n or 1
    return requests_for(
        ready,
        prompt,
        choosing=asked,
        n=n,
        max_new_tokens=asked.max_completion_tokens or asked.max_tokens,
        stop=asked.stop,
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        constraints=_constraints(ready, asked, tools, prompt, n),
    )


def _constraints(
    ready: Ready, asked: ChatRequest, tools: list[dict[str, Any]], prompt: list[int], n: int
) -> list[Constraint | None]:
    from .constraints import call_constraints, following, reasoning_budget

    choice, wanted = asked.tool_choice, asked.response_format
    is_json = wanted is not None and wanted.type != "text"
    if choice == "required" or isinstance(choice, NamedTool):
        if is_json:
            line = "response_format cannot be followed by a call that tool_choice wants; leave one out"
            raise Refused(400, line, param="tool_choice")
        name = None if isinstance(choice, str) else choice.function.name
        tokens = 0 if asked.reasoning_effort == "none" else None
        return call_constraints(ready, tools, name, n, prompt, thinking_tokens=tokens)
    if asked.reasoning_effort == "none" and not is_json:
        return [one for _ in range(n) for one in reasoning_budget(ready, 0, prompt)]
    if not is_json:
        return []
    assert wanted is not None
    schema: dict[str, Any] | None = None
    if wanted.type == "json_object" and wanted.json_schema is not None:
        raise Refused(400, "response_format has a json_schema; its type must be 'json_schema'", param="response_format")
    if wanted.type == "json_schema":
        if wanted.json_schema is None or wanted.json_schema.schema_ is None:
            raise Refused(400, "response_format needs a schema in json_schema.schema", param="response_format")
        schema = wanted.json_schema.schema_
    try:
        tokens = 0 if asked.reasoning_effort == "none" else None
        return following(ready, n, prompt, schema=schema, thinking_tokens=tokens)
    except RequestError as error:
        raise Refused(400, str(error), param="response_format") from error


def _template_values(ready: Ready, asked: ChatRequest) -> dict[str, Any]:
    from ..text.conversation import template_reads

    values = dict(asked.chat_template_kwargs or {})
    reads = partial(template_reads, ready.tokenizer)
    for name in values:
        if not reads(name):
            line = f"the model's chat template does not read {name!r}"
            raise Refused(400, line, param=f"chat_template_kwargs.{name}")
    effort = asked.reasoning_effort
    if effort is None:
        return values
    if reads("reasoning_effort") and effort != "none":
        values["reasoning_effort"] = effort
    elif reads("enable_thinking"):
        values["enable_thinking"] = effort != "none"
    elif effort not in ("none", "medium") or reads("reasoning_effort"):
        line = f"the model's chat template knows no reasoning effort {effort!r}; leave it out"
        raise Refused(400, line, param="reasoning_effort")
    return values


async def whole(ready: Ready, asked: ChatRequest, answers: Answers, head: dict[str, Any]) -> dict[str, Any]:
    """The answer as one object."""
    choices: dict[int, dict[str, Any]] = {}
    ends: list[Finished] = []
    for at in range(len(answers)):
        message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
        choices[at] = {"index": at, "message": message, "logprobs": None, "finish_reason": None}
    async for at, event in answers:
        choice = choices[at]
        message = choice["message"]
        if isinstance(event, Finished):
            ends.append(event)
            check_ended(event)
            choice["finish_reason"] = _reason(event, bool(message.get("tool_calls")))
            if message["content"] is None and not message.get("tool_calls"):
                message["content"] = ""
            continue
        for part in event.parts:
            if part.kind == "tool_call":
                calls = message.setdefault("tool_calls", [])
                calls.append(_call(head, at, len(calls), part.name, part.text, is_delta=False))
            else:
                field = "content" if part.kind == "content" else "reasoning_content"
                message[field] = (message.get(field) or "") + part.text
        if event.logprobs:
            found = choice["logprobs"] or {"content": [], "refusal": None}
            found["content"] += content_logprobs(ready, event.logprobs)
            choice["logprobs"] = found
    return head | {"object": "chat.completion", "choices": list(choices.values()), "usage": usage(ends, answers)}


async def chunks(ready: Ready, asked: ChatRequest, answers: Answers, head: dict[str, Any]) -> AsyncIterator[Any]:
    """The answer as OpenAI's chunks."""
    options = asked.stream_options
    wants_usage = options is not None and bool(options.include_usage)
    head = head | {"object": "chat.completion.chunk"}
    more = {"usage": None} if wants_usage else {}
    calls: dict[int, int] = {}
    ends: list[Finished] = []

    def chunk(at: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        choice = {"index": at, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return head | {"choices": [choice]} | more

    for at in range(len(answers)):
        yield chunk(at, {"role": "assistant", "content": "", "refusal": None})
    async for at, event in answers:
        if isinstance(event, Finished):
            ends.append(event)
            check_ended(event)
            yield chunk(at, {}, _reason(event, at in calls))
            continue
        deltas = [_delta(head, at, calls, part) for part in event.parts]
        logprobs = {"content": content_logprobs(ready, event.logprobs), "refusal": None} if event.logprobs else None
        for delta in deltas[:-1]:
            yield chunk(at, delta)
        if deltas or logprobs:
            yield chunk(at, deltas[-1] if deltas else {}, logprobs=logprobs)
    if wants_usage:
        yield head | {"choices": [], "usage": usage(ends, answers)}


def _delta(head: dict[str, Any], at: int, calls: dict[int, int], part: Any) -> dict[str, Any]:
    if part.kind == "tool_call":
        index = calls.get(at, 0)
        calls[at] = index + 1
        return {"tool_calls": [_call(head, at, index, part.name, part.text, is_delta=True)]}
    return {"content" if part.kind == "content" else "reasoning_content": part.text}


def _call(head: dict[str, Any], at: int, index: int, name: str, arguments: str, *, is_delta: bool) -> dict[str, Any]:
    call = {
        "id": f"call_{head['id'].rpartition('-')[2][:20]}_{at}_{index}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
    return {"index": index} | call if is_delta else call


def _reason(finished: Finished, has_called: bool) -> str:
    return "tool_calls" if has_called and finished.reason == "stop" else _REASONS[finished.reason]


def check_ended(finished: Finished) -> None:
    """Raise where an answer has no end that OpenAI's API knows."""
    if finished.reason == "error":
        raise AnswerFailed(finished.error or "the answer failed")
    if finished.reason == "cancelled":
        raise Refused(503, "the server is being closed; ask again", headers={"Retry-After": "5"})


def usage(ends: list[Finished], answers: Answers) -> dict[str, Any]:
    """Counts of tokens: of the prompt once, of all answers together."""
    prompt = ends[0].prompt_tokens if ends else 0
    new = sum(end.completion_tokens for end in ends)
    cached = min((end.cached_tokens for end in ends), default=0)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": sum(answers.reasoning_tokens)},
    }
