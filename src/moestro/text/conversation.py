"""The tokens of a conversation with tools, by the tokenizer's own chat template.

Templates differ in what they read: arguments of a call as a mapping or as JSON, texts in one or in parts, identifiers
of a call in a form of their own. Each way is tried on a copy of the conversation with other texts in it, and the first
one by which all of them come out again is taken. What no way writes is refused.
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import RequestError, first_line
from .channels import REASONING_FIELDS
from .generation import encode
from .plain import Guard
from .templates import Message, has_template

_LISTED = re.compile(r"""['"]type['"]:\s*['"]text['"]""")  # a list of parts that was printed as Python or JSON
_RESERVED = {"messages", "eos_token", "bos_token", "raise_exception", "strftime_now"}
_NINE = 9  # letters of a call's identifier that Mistral's templates want


@dataclass(frozen=True)
class _Way:
    """A way to give a conversation to a template."""

    ids: str = "given"  # identifiers of calls: given | nine | indexed
    keeps_reasoning: bool = True
    in_parts: bool = False
    no_text: str | None = ""  # the content of a message that has none
    as_mapping: bool = True  # arguments of calls


def _ways(messages: Sequence[Message]) -> Iterator[_Way]:
    has_calls = any(message.get("tool_calls") for message in messages)
    has_reasoning = any(field in message for message in messages for field in REASONING_FIELDS)
    choices = (
        ("given", "nine", "indexed") if has_calls else ("given",),
        (True, False) if has_reasoning else (True,),
        (False, True),
        ("", None) if has_calls else ("",),
        (True, False) if has_calls else (True,),
    )
    return itertools.starmap(_Way, itertools.product(*choices))


def prompt_of(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    *,
    tools: Sequence[Any] | None = None,
    template_values: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation, up to where the next answer begins.

    Special tokens in a message, a tool or a result stay text. Without a chat template, the messages are one plain text.

    Args:
        messages: as OpenAI's chat has them: role, content (a text, parts with a text each, or None), name, tool_calls
            with their arguments as JSON, tool_call_id, reasoning_content or reasoning.
        tools: as OpenAI's chat has them.
        template_values: variables of the template, such as enable_thinking.

    Raises:
        RequestError: the template cannot write the conversation, or leaves out a part of it.
    """
    read = [_read(message) for message in messages]
    values = dict(template_values or {})
    _check_values(tokenizer, values)
    if not has_template(tokenizer):
        return _plain_prompt(tokenizer, read, tools)
    _name_results(read)
    if "developer" not in str(tokenizer.chat_template):
        read = [one | {"role": "system"} if one["role"] == "developer" else one for one in read]
    guard = Guard(tokenizer, [read, list(tools or ()), values])
    reasons: dict[str, None] = {}
    for way in _ways(read):
        missing = _missing(tokenizer, read, tools, guard.protect(values), way)
        if missing is not None:
            reasons[missing] = None
            continue
        shaped = _shaped(guard.protect(read), way, guard)
        try:
            text = _apply(tokenizer, shaped, guard.protect(list(tools)) if tools else None, guard.protect(values))
        except Exception as error:  # a template is a program that may raise anything
            reasons[_reason(error)] = None
            continue
        return guard.encode(text)
    raise RequestError(f"the model's chat template cannot write this conversation: {next(iter(reasons))}")


def template_reads(tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    """Whether the chat template reads a variable."""
    return re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)) is not None


def _plain_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Any) -> list[int]:
    if tools or any(one["role"] == "tool" or one.get("tool_calls") for one in messages):
        raise RequestError("this model has no chat template, so it knows no tools; leave tools and their results out")
    joints = ["" if i == 0 or m["role"] == "assistant" else "\n" for i, m in enumerate(messages)]
    text = "".join(joint + message["content"] for joint, message in zip(joints, messages, strict=True))
    guard = Guard(tokenizer, text)
    first = [int(one) for one in encode(tokenizer, "a")]
    bare = [int(one) for one in encode(tokenizer, "a", add_special_tokens=False)]
    begin = first[: len(first) - len(bare)] if first[-len(bare) :] == bare else []
    return [*begin, *guard.encode(guard.protect(text))]


def _read(message: Mapping[str, Any]) -> Message:
    """A message with its content as one text, its reasoning under all names, and its arguments read."""
    found: Message = {"role": message["role"], "content": _text(message.get("content") or message.get("refusal"))}
    for field in ("name", "tool_call_id"):
        if message.get(field) is not None:
            found[field] = message[field]
    reasoning = next((message[field] for field in REASONING_FIELDS if message.get(field)), None)
    if reasoning and message["role"] == "assistant":
        found |= dict.fromkeys(REASONING_FIELDS, reasoning)
    if message.get("tool_calls"):
        found["tool_calls"] = [_call(one, at) for at, one in enumerate(message["tool_calls"])]
    return found


def _text(content: str | Sequence[Any] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = (part if isinstance(part, str) else part.get("text") or part.get("refusal") or "" for part in content)
    return "\n".join(texts)


def _call(call: Mapping[str, Any], at: int) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            line = f"the arguments of an earlier call of {function['name']!r} are not JSON ({first_line(error)})"
            raise RequestError(f"{line}; send them as they were answered") from error
    if not isinstance(arguments, dict):
        raise RequestError(f"the arguments of an earlier call of {function['name']!r} are not an object of JSON")
    return {"id": call.get("id") or f"call_{at}", "type": "function", "function": function | {"arguments": arguments}}


def _name_results(messages: Sequence[Message]) -> None:
    """Give each result the name of its tool, which some templates write."""
    names: dict[str, str] = {}
    for message in messages:
        names |= {call["id"]: call["function"]["name"] for call in message.get("tool_calls", ())}
        if message["role"] == "tool" and "name" not in message and message.get("tool_call_id") in names:
            message["name"] = names[message["tool_call_id"]]


def _shaped(messages: Sequence[Message], way: _Way, guard: Guard | None = None) -> list[Message]:
    """The messages in the form that a way gives them."""
    renamed = _renamed(messages, way.ids, guard)
    found = []
    for message in messages:
        shaped = dict(message)
        if not way.keeps_reasoning:
            shaped = {key: value for key, value in shaped.items() if key not in REASONING_FIELDS}
        if not shaped["content"] and "tool_calls" in shaped:
            shaped["content"] = way.no_text
        elif way.in_parts:
            shaped["content"] = [{"type": "text", "text": shaped["content"]}]
        if "tool_calls" in shaped:
            shaped["tool_calls"] = [_as_way(call, way, renamed) for call in shaped["tool_calls"]]
        if shaped.get("tool_call_id") in renamed:
            shaped["tool_call_id"] = renamed[shaped["tool_call_id"]]
        found.append(shaped)
    return found


def _as_way(call: Mapping[str, Any], way: _Way, renamed: Mapping[str, str]) -> dict[str, Any]:
    function = call["function"]
    if not way.as_mapping:
        function = function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    return {**call, "id": renamed[call["id"]], "function": function}


def _renamed(messages: Sequence[Message], ids: str, guard: Guard | None) -> dict[str, str]:
    """The identifiers of calls as a template wants them: as given, of nine letters, or as functions.NAME:0."""
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    if ids == "given":
        return {call["id"]: call["id"] for call in calls}
    if ids == "indexed":
        return {call["id"]: f"functions.{call['function']['name']}:{at}" for at, call in enumerate(calls)}
    return {call["id"]: f"{at:0{_NINE}d}" for at, call in enumerate(calls)}


def _missing(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    values: Mapping[str, Any],
    way: _Way,
) -> str | None:
    """What a template leaves out or cannot write of a conversation of this form; None where it writes all of it."""
    probes = list(_probe(messages))
    declared = [_named(tool, f"tool{at}probe") for at, tool in enumerate(tools or ())]
    wanted = {f"tool{at}probe": "the tools" for at in range(len(declared))}
    wanted |= {text: what for _, asked in probes for text, what in asked.items()}
    try:
        text = _apply(tokenizer, _shaped([message for message, _ in probes], way), declared or None, values)
    except Exception as error:  # a template is a program that may raise anything
        return _reason(error)
    if way.in_parts and _LISTED.search(text):
        return "it reads no parts"
    seen = set(re.findall(r"(?:text|key|value|name|tool)\d+probe", text))
    left = next((what for probe, what in wanted.items() if probe not in seen), None)
    if left is not None:
        return f"it leaves out {left}"
    # Arguments that are escaped twice, or printed as Python, are not what the model has learned.
    if re.search(r"""\\+"key\d+probe|'key\d+probe'\s*:""", text):
        return "it writes the arguments of calls otherwise"
    return None


def _probe(messages: Sequence[Message]) -> Iterator[tuple[Message, dict[str, str]]]:
    """The messages with other texts in them, and what each text that must come out again is."""
    last = max((at for at, one in enumerate(messages) if one["role"] == "user"), default=-1)
    whats = {"system": "the system prompt", "developer": "the developer's instructions", "tool": "a tool's result"}
    for at, message in enumerate(messages):
        probe, wanted = dict(message), {}
        if message["content"].strip():
            probe["content"] = f"text{at}probe"
            what = "what the user says" if at == last else whats.get(message["role"])
            wanted = {probe["content"]: what} if what else {}
        if "tool_calls" in message:
            probe["tool_calls"] = []
            for index, call in enumerate(message["tool_calls"]):
                key, value, name = (f"{word}{at}{index}probe" for word in ("key", "value", "name"))
                probe["tool_calls"].append(call | {"function": {"name": name, "arguments": {key: value}}})
                wanted |= dict.fromkeys((key, value, name), "a call of a tool")
        yield probe, wanted


def _named(tool: Any, name: str) -> Any:
    if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
        raise RequestError("a tool must be an object with a function; see OpenAI's description of tools")
    return tool | {"function": tool["function"] | {"name": name}}


def _check_values(tokenizer: PreTrainedTokenizerBase, values: Mapping[str, Any]) -> None:
    known = set(inspect.signature(tokenizer.apply_chat_template).parameters)
    for name in values:
        if name in known | _RESERVED | set(tokenizer.special_tokens_map):
            raise RequestError(f"chat_template_kwargs cannot set {name!r}; it is set by the request itself")


def _apply(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Any, values: Mapping[str, Any]
) -> str:
    text: str = tokenizer.apply_chat_template(
        list(messages), tools=tools, add_generation_prompt=True, tokenize=False, **values
    )
    return text


def _reason(error: Exception) -> str:
    kind = type(error).__name__
    return first_line(error) if kind in ("TemplateError", "ValueError") else f"{kind}: {first_line(error)}"
