"""An answer as Anthropic's protocol tells it: one message of blocks, or events that make one."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from .answers import Answers
from .chat import check_ended
from .messages import MessagesRequest
from .requests import Finished
from .stream import event

if TYPE_CHECKING:
    from ..text.responses import Part

PING = event({"type": "ping"}, "ping")


async def whole(asked: MessagesRequest, answers: Answers, head: dict[str, Any]) -> dict[str, Any]:
    """The answer as one object."""
    blocks: list[dict[str, Any]] = []
    end: Finished | None = None
    async for _, said in answers:
        if isinstance(said, Finished):
            end = said
            check_ended(said)
            continue
        for part in said.parts:
            if part.kind == "reasoning" and asked.omits_thinking:
                continue
            if not blocks or _kind(part) != blocks[-1]["type"] or part.kind == "tool_call":
                blocks.append(_opened(part, head, len(blocks)))
            _extend(blocks[-1], part)
    assert end is not None
    ended = {"stop_reason": _reason(end, blocks), "stop_sequence": _stop_text(end)}
    return head | {"type": "message", "role": "assistant", "content": blocks} | ended | {"usage": _usage(end)}


async def events(
    asked: MessagesRequest, answers: Answers, head: dict[str, Any], prompt_tokens: int
) -> AsyncIterator[str]:
    """The answer as Anthropic's events."""
    begun = {"input_tokens": prompt_tokens, "output_tokens": 0}
    begun |= {"cache_read_input_tokens": 0, "cache_creation_input_tokens": 0}
    message = head | {"type": "message", "role": "assistant", "content": [], "stop_reason": None, "stop_sequence": None}
    yield event({"type": "message_start", "message": message | {"usage": begun}}, "message_start")
    yield PING
    blocks: list[dict[str, Any]] = []
    end: Finished | None = None
    async for _, said in answers:
        if isinstance(said, Finished):
            end = said
            check_ended(said)
            continue
        for part in said.parts:
            if part.kind == "reasoning" and asked.omits_thinking:
                continue
            if not blocks or _kind(part) != blocks[-1]["type"] or part.kind == "tool_call":
                for text in _closed(blocks):
                    yield text
                blocks.append(_opened(part, head, len(blocks)))
                start = {"type": "content_block_start", "index": len(blocks) - 1, "content_block": blocks[-1]}
                yield event(start, "content_block_start")
            delta = {"type": "content_block_delta", "index": len(blocks) - 1, "delta": _delta(part)}
            yield event(delta, "content_block_delta")
    for text in _closed(blocks):
        yield text
    assert end is not None
    delta = {"stop_reason": _reason(end, blocks), "stop_sequence": _stop_text(end)}
    yield event({"type": "message_delta", "delta": delta, "usage": _usage(end)}, "message_delta")
    yield event({"type": "message_stop"}, "message_stop")


def failed(value: Any) -> str:
    """An error object as an event."""
    return event(value, "error")


def _closed(blocks: Sequence[Any]) -> list[str]:
    """The events that end the last block."""
    if not blocks:
        return []
    at, found = len(blocks) - 1, []
    if blocks[-1]["type"] == "thinking":
        signed = {"type": "signature_delta", "signature": ""}
        found.append(event({"type": "content_block_delta", "index": at, "delta": signed}, "content_block_delta"))
    return [*found, event({"type": "content_block_stop", "index": at}, "content_block_stop")]


def _kind(part: Part) -> str:
    return {"content": "text", "reasoning": "thinking", "tool_call": "tool_use"}[part.kind]


def _opened(part: Part, head: dict[str, Any], at: int) -> dict[str, Any]:
    """A block without what is in it."""
    if part.kind == "tool_call":
        return {"type": "tool_use", "id": f"toolu_{head['id'][4:]}_{at}", "name": part.name, "input": {}}
    return (
        {"type": "thinking", "thinking": "", "signature": ""}
        if part.kind == "reasoning"
        else {
            "type": "text",
            "text": "",
        }
    )


def _extend(block: dict[str, Any], part: Part) -> None:
    if part.kind == "tool_call":
        block["input"] = json.loads(part.text)
    else:
        block[block["type"]] += part.text


def _delta(part: Part) -> dict[str, Any]:
    if part.kind == "tool_call":
        return {"type": "input_json_delta", "partial_json": part.text}
    if part.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": part.text}
    return {"type": "text_delta", "text": part.text}


def _reason(end: Finished, blocks: Sequence[Any]) -> str:
    if any(block["type"] == "tool_use" for block in blocks) and end.reason == "stop":
        return "tool_use"
    if end.reason == "length":
        return "max_tokens"
    return "stop_sequence" if isinstance(end.stop, str) else "end_turn"


def _stop_text(end: Finished) -> str | None:
    return end.stop if isinstance(end.stop, str) else None


def _usage(end: Finished) -> dict[str, int]:
    return {
        "input_tokens": end.prompt_tokens - end.cached_tokens,
        "output_tokens": end.completion_tokens,
        "cache_read_input_tokens": end.cached_tokens,
        "cache_creation_input_tokens": 0,
    }
