"""POST /v1/messages: what Anthropic's protocol asks, and counting of tokens. What it is told is in messages_reply.py.

Messages become those of the chat API, so that one chat template, one way to call tools and one engine serve both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from .chat import Function, Tool, Value
from .faults import Refused
from .fields import Choosing, Count, Listed, ModelName, Strict, check_length, requests_for
from .requests import Constraint
from .requests import Request as EngineRequest
from .service import Ready

if TYPE_CHECKING:
    pass

StopSequences = Annotated[Listed[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=16)]


class Block(Strict):
    """A part of a message. Its type says which fields it has."""

    type: Literal["text", "thinking", "redacted_thinking", "tool_use", "tool_result"]
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Value] | None = None
    tool_use_id: str | None = None
    content: str | Listed[TextBlock] | None = None
    is_error: bool | None = None
    citations: None = None
    cache_control: dict[str, Value] | None = None


class TextBlock(Strict):
    """A text in a list of blocks."""

    type: Literal["text"]
    text: str
    citations: None = None
    cache_control: dict[str, Value] | None = None


class Message(Strict):
    """A message of the conversation so far."""

    role: Literal["user", "assistant", "system"]
    content: str | Listed[Block]


class ToolDefinition(Strict):
    """A tool that may be called. input_schema: a JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    input_schema: dict[str, Value]
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: dict[str, Value] | None = None
    eager_input_streaming: bool | None = None


class ToolChoice(Strict):
    """Whether and which tool is called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Strict):
    """Whether the model thinks aloud. budget_tokens: after so many tokens, it is made to answer."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Strict):
    """A JSON schema that the answer follows, in `schema`."""

    type: Literal["json_schema"]
    schema_: dict[str, Value] = Field(alias="schema")


class OutputConfig(Strict):
    """How much the model thinks, and the form of its answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountRequest(Strict):
    """What /v1/messages/count_tokens takes."""

    model: ModelName
    messages: Annotated[Listed[Message], Field(min_length=1)]
    system: str | Listed[TextBlock] | None = None
    tools: Listed[ToolDefinition] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Value] | None = None

    @property
    def tool_values(self) -> list[dict[str, Any]]:
        """The tools as a chat template takes them; none where none may be called."""
        if not self.tools or (self.tool_choice is not None and self.tool_choice.type == "none"):
            return []
        found = []
        for one in self.tools:
            function = Function(name=one.name, description=one.description, parameters=one.input_schema)
            found.append(Tool(type="function", function=function).model_dump(exclude_none=True))
        return found


class MessagesRequest(CountRequest):
    """What /v1/messages takes; any other field is refused."""

    max_tokens: Count
    stop_sequences: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=16)] | None
    ) = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    metadata: dict[str, Value] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    speed: Literal["standard"] | None = None

    @property
    def omits_thinking(self) -> bool:
        """Whether what is thought is left out of the answer."""
        return self.thinking is not None and self.thinking.display == "omitted"

    @property
    def has_one_call(self) -> bool:
        """Whether the answer ends with its first call."""
        return self.tool_choice is not None and bool(self.tool_choice.disable_parallel_tool_use)


def prompt_for(ready: Ready, asked: CountRequest) -> list[int]:
    """Token ids of a conversation.

    Raises:
        RequestError, Refused: it cannot be written.
    """
    from ..text.conversation import prompt_of
    from .constraints import check_tools

    tools = asked.tool_values
    check_tools(ready, tools)
    found: list[dict[str, Any]] = []
    if system := _system(asked.system):
        found.append({"role": "system", "content": system})
    for message in asked.messages:
        found += _as_chat(message)
    check_length(ready, found, tools)
    return prompt_of(ready.tokenizer, found, tools=tools or None, template_values=_template_values(ready, asked))


def prepare(ready: Ready, asked: MessagesRequest) -> list[EngineRequest]:
    """The engine's request; takes as long as its prompt needs to be encoded.

    Raises:
        RequestError, Refused: it cannot be answered; which field, and why.
    """
    from .constraints import call_constraints, following

    tools, choice = asked.tool_values, asked.tool_choice
    prompt = prompt_for(ready, asked)
    constraints: list[Constraint | None] = []
    if asked.messages[-1].role == "assistant":
        line = "an answer that is begun cannot be continued here; end with a message of the user"
        raise Refused(400, line, param="messages")
    if choice is not None and choice.type in ("any", "tool"):
        if choice.type == "tool" and choice.name is None:
            raise Refused(400, "tool_choice of type 'tool' needs a name", param="tool_choice")
        name, tokens = choice.name if choice.type == "tool" else None, _thinking_tokens(asked.thinking)
        constraints = call_constraints(ready, tools, name, 1, prompt, thinking_tokens=tokens)
    elif asked.output_config is not None and asked.output_config.format is not None:
        tokens = _thinking_tokens(asked.thinking)
        constraints = following(ready, 1, prompt, schema=asked.output_config.format.schema_, thinking_tokens=tokens)
    elif asked.thinking is not None:
        constraints = _budget(ready, asked.thinking, prompt)
    return requests_for(
        ready,
        prompt,
        choosing=Choosing(temperature=asked.temperature, top_p=asked.top_p, top_k=asked.top_k),
        max_new_tokens=asked.max_tokens,
        stop=asked.stop_sequences,
        constraints=constraints,
    )


def _budget(ready: Ready, thinking: Thinking, prompt: Sequence[int]) -> list[Constraint | None]:
    """What ends the model's thinking after so many tokens, or at once where it is not to think."""
    from .constraints import reasoning_budget

    tokens = _thinking_tokens(thinking)
    if tokens is None:
        return []
    found = reasoning_budget(ready, tokens, prompt)
    if not found and tokens:
        raise Refused(400, "this model's thinking cannot be cut; leave budget_tokens out", param="thinking")
    return found


def _thinking_tokens(thinking: Thinking | None) -> int | None:
    """How many tokens may be thought; None for any number."""
    if thinking is None:
        return None
    return 0 if thinking.type == "disabled" else thinking.budget_tokens


def _template_values(ready: Ready, asked: CountRequest) -> dict[str, Any]:
    from ..text.conversation import template_reads

    values: dict[str, Any] = {}
    effort = None if asked.output_config is None else asked.output_config.effort
    if effort is not None:
        if not template_reads(ready.tokenizer, "reasoning_effort"):
            line = "the model's chat template knows no effort; leave it out of output_config"
            raise Refused(400, line, param="output_config")
        values["reasoning_effort"] = effort
    if asked.thinking is None:
        return values
    is_wanted = asked.thinking.type != "disabled"
    if template_reads(ready.tokenizer, "enable_thinking"):
        return values | {"enable_thinking": is_wanted}
    if asked.thinking.type == "enabled" and (ready.responses is None or ready.responses.channels is None):
        raise Refused(400, "this model does not think aloud; thinking must be disabled or left out", param="thinking")
    return values


def _system(given: str | Sequence[TextBlock] | None) -> str:
    """The instructions, without a block of Claude Code's that changes with each request and is for bills."""
    if given is None or isinstance(given, str):
        return given or ""
    return "\n".join(block.text for block in given if not block.text.startswith("x-anthropic-billing-header:"))


def _text(content: str | Sequence[TextBlock] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(block.text for block in content)


def _as_chat(message: Message) -> list[dict[str, Any]]:
    """A message as those of the chat API: results of tools are messages of their own there."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    found: list[dict[str, Any]] = []
    for block in message.content:
        if block.type == "tool_result":
            text = _text(block.content)
            if block.is_error and not text.lower().startswith("error"):
                text = f"Error: {text}"
            found.append({"role": "tool", "tool_call_id": _needed(block, "tool_use_id"), "content": text})
            continue
        if not found or found[-1]["role"] != message.role:
            found.append({"role": message.role, "content": ""})
        if block.type == "text":
            joint = "\n" if found[-1]["content"] else ""
            found[-1]["content"] += joint + _needed(block, "text")
        elif block.type == "thinking":
            found[-1]["reasoning_content"] = found[-1].get("reasoning_content", "") + _needed(block, "thinking")
        elif block.type == "tool_use":
            function = {"name": _needed(block, "name"), "arguments": json.dumps(block.input or {}, ensure_ascii=False)}
            calls = found[-1].setdefault("tool_calls", [])
            calls.append({"id": _needed(block, "id"), "type": "function", "function": function})
        else:
            raise Refused(400, f"a block of type {block.type} cannot be read here; leave it out", param="messages")
    return found


def _needed(block: Block, field: str) -> Any:
    value = getattr(block, field)
    if value is None:
        raise Refused(400, f"a block of type {block.type} needs {field}", param="messages")
    return value
