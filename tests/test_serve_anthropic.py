"""What Anthropic's own package, and Claude Code, get from the server."""

from __future__ import annotations

import inspect
from typing import Any

import anthropic
import httpx2
import pytest

from moestro.serve.messages import CountRequest, MessagesRequest
from moestro.serve.service import Service
from serving import ScriptedEngine

SAYS = [{"role": "user", "content": "Once upon a time"}]
GREEDY = {"temperature": 0}
TOOL = {
    "name": "weather",
    "description": "The weather of a place.",
    "input_schema": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
}


def asked(claude: anthropic.Anthropic, **more: Any) -> Any:
    given: dict[str, Any] = {"model": "demo", "max_tokens": 32, "messages": SAYS, "extra_body": GREEDY}
    return claude.messages.create(**given | more)


def streamed(claude: anthropic.Anthropic, **more: Any) -> tuple[list[Any], Any]:
    given: dict[str, Any] = {"model": "demo", "max_tokens": 32, "messages": SAYS, "extra_body": GREEDY}
    with claude.messages.stream(**given | more) as stream:
        return list(stream), stream.get_final_message()


def test_a_stream_equals_the_whole(claude: anthropic.Anthropic) -> None:
    whole = asked(claude)
    events, final = streamed(claude)
    assert [block.type for block in whole.content] == ["text"]
    assert final.content[0].text == whole.content[0].text
    assert whole.stop_reason == final.stop_reason == "max_tokens"
    assert whole.usage.output_tokens == final.usage.output_tokens == 32
    kinds = [event.type for event in events]
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 1


def test_raw_events_have_names_and_a_ping(claude: anthropic.Anthropic) -> None:
    body = {"model": "demo", "max_tokens": 2, "messages": SAYS, "stream": True}
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "some-beta", "x-api-key": "none"}
    lines = httpx2.post(
        f"{str(claude.base_url).rstrip('/')}/v1/messages?beta=true", json=body, headers=headers
    ).text.splitlines()
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert names[:2] == ["message_start", "ping"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_a_turn_is_told_what_was_not_read_again(claude: anthropic.Anthropic) -> None:
    long = [{"role": "user", "content": "There was once a king who had three sons"}]
    first, again = asked(claude, messages=long), asked(claude, messages=long)
    assert again.usage.cache_read_input_tokens > 0
    assert again.usage.input_tokens == 1
    assert first.usage.input_tokens + first.usage.cache_read_input_tokens == again.usage.cache_read_input_tokens + 1


def test_thinking_is_a_block_with_a_signature(claude: anthropic.Anthropic, engine: ScriptedEngine) -> None:
    engine.script = "<think>\nLet me see.\n</think>\n\nIt is blue."
    whole = asked(claude)
    assert [(block.type, getattr(block, block.type)) for block in whole.content] == [
        ("thinking", "Let me see."),
        ("text", "It is blue."),
    ]
    assert whole.content[0].signature == ""
    assert whole.stop_reason == "end_turn"
    _, final = streamed(claude)
    assert [block.type for block in final.content] == ["thinking", "text"]
    omitted = asked(claude, thinking={"type": "adaptive", "display": "omitted"})
    assert [block.type for block in omitted.content] == ["text"]


def test_thinking_goes_back_to_a_template_that_reads_it(claude: anthropic.Anthropic) -> None:
    before = [
        *SAYS,
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "Hm.", "signature": ""}, {"type": "text", "text": "Yes."}],
        },
        {"role": "user", "content": [{"type": "text", "text": "Why?", "cache_control": {"type": "ephemeral"}}]},
    ]
    with_it = claude.messages.count_tokens(model="demo", messages=before)
    without = claude.messages.count_tokens(
        model="demo", messages=[before[0], {"role": "assistant", "content": "Yes."}, before[2]]
    )
    assert with_it.input_tokens > without.input_tokens


def test_a_stop_sequence_is_named(claude: anthropic.Anthropic) -> None:
    word = asked(claude).content[0].text.split()[2]
    cut = asked(claude, stop_sequences=[word])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", word)


def test_system_may_be_blocks(claude: anthropic.Anthropic) -> None:
    text = "You tell fairy tales."
    blocks = [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}]
    counts = [claude.messages.count_tokens(model="demo", messages=SAYS, system=one) for one in (text, blocks)]
    assert counts[0].input_tokens == counts[1].input_tokens
    assert counts[0].input_tokens > claude.messages.count_tokens(model="demo", messages=SAYS).input_tokens


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"container": "x"}, "container: is not supported"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "the context is 512"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "4"}]}]}, "needs tool_use_id"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"tool_choice": {"type": "any"}}, "no tools"),
        ({"tools": [TOOL | {"defer_loading": True}]}, "defer_loading"),
        ({"output_config": {"effort": "high"}}, "knows no effort"),
        ({"stop_sequences": [""]}, "at least 1 character"),
    ],
)
def test_what_is_not_done_is_refused(claude: anthropic.Anthropic, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match=says) as caught:
        asked(claude, extra_body=changes)
    body: Any = caught.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert "\n" not in body["error"]["message"]


def test_every_field_of_anthropic_is_either_followed_or_refused(claude: anthropic.Anthropic) -> None:
    theirs = set(inspect.signature(claude.messages.create).parameters)
    theirs -= {"extra_headers", "extra_query", "extra_body", "timeout"}
    refused = {"container", "diagnostics", "inference_geo", "user_profile_id", "workspace_id"}
    assert theirs - set(MessagesRequest.model_fields) == refused
    counts = set(inspect.signature(claude.messages.count_tokens).parameters)
    counts -= {"extra_headers", "extra_query", "extra_body", "timeout"}
    assert counts - set(CountRequest.model_fields) <= refused | {"speed", "output_format"}


def test_a_wrong_name_is_not_found_where_that_is_wanted(claude: anthropic.Anthropic, service: Service) -> None:
    assert asked(claude, model="claude-x", max_tokens=1).model == "claude-x"
    service.is_strict = True
    try:
        with pytest.raises(anthropic.NotFoundError, match="no model 'claude-x'"):
            asked(claude, model="claude-x", max_tokens=1)
    finally:
        service.is_strict = False
