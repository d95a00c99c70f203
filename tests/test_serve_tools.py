"""Tool calls as OpenAI's and Anthropic's own packages get them, and the turn after, with a tool's result."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import openai
import pytest

from chat_templates import TEMPLATES
from moestro.serve.service import Service
from serving import ScriptedEngine

SCHEMA = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": SCHEMA}}
TOOL_OF_ANTHROPIC = {"name": "weather", "description": "The weather.", "input_schema": SCHEMA}
SAYS: list[Any] = [{"role": "user", "content": "How is the weather?"}]
ASKED: dict[str, Any] = {"model": "demo", "messages": SAYS, "temperature": 0, "tools": [TOOL]}


def call(place: str) -> str:
    written = json.dumps({"name": "weather", "arguments": {"place": place}}, ensure_ascii=False)
    return f"<tool_call>\n{written}\n</tool_call>"


TWO = f"Let me look.\n{call('Oslo')}\n{call('Bergen')}"
BROKEN = '<tool_call>\n{"name": weather}\n</tool_call>'


def streamed(client: openai.OpenAI, **asked: Any) -> tuple[str, list[Any], str]:
    """The text, the deltas of calls and the reason of a stream's end."""
    chunks = list(client.chat.completions.create(**ASKED | asked, stream=True))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    text = "".join(delta.content or "" for delta in deltas)
    return text, [one for delta in deltas for one in delta.tool_calls or ()], chunks[-1].choices[0].finish_reason


def test_calls_whole_and_streamed(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.script = TWO
    choice = client.chat.completions.create(**ASKED).choices[0]
    text, deltas, reason = streamed(client)
    assert choice.finish_reason == reason == "tool_calls"
    assert choice.message.content == text == "Let me look."
    calls = choice.message.tool_calls
    assert [json.loads(one.function.arguments) for one in calls] == [{"place": "Oslo"}, {"place": "Bergen"}]
    assert [one.index for one in deltas] == [0, 1]
    assert len({one.id for one in [*calls, *deltas]}) == 4
    assert {one.type for one in [*calls, *deltas]} == {"function"}
    assert [one.function for one in deltas] == [type(deltas[0].function)(**one.function.model_dump()) for one in calls]


def test_one_call_ends_the_answer_where_only_one_is_wanted(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.script = TWO + " and so on, for a long time"
    choice = client.chat.completions.create(**ASKED, parallel_tool_calls=False).choices[0]
    _, deltas, reason = streamed(client, parallel_tool_calls=False)
    assert choice.finish_reason == reason == "tool_calls"
    assert len(choice.message.tool_calls) == len(deltas) == 1


def test_reasoning_stands_beside_calls(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.script = f"<think>\nIs it <tool_call> that I need?\n</think>\n\n{call('Oslo')}"
    message = client.chat.completions.create(**ASKED).choices[0].message
    assert message.reasoning_content == "Is it <tool_call> that I need?"
    assert message.content is None
    assert message.tool_calls[0].function.name == "weather"


@pytest.mark.parametrize("script", [BROKEN, "<tool_call>", call("Oslo")[:-15], "a <b> {c}"])
def test_what_is_no_call_is_text(client: openai.OpenAI, engine: ScriptedEngine, script: str) -> None:
    engine.script = script
    choice = client.chat.completions.create(**ASKED).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (script, None, "stop")
    assert streamed(client) == (script, [], "stop")


def test_no_call_where_none_is_wanted(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    """The template is not given the tools then, so that the prompt is shorter too."""
    engine.script = call("Oslo")
    without = client.chat.completions.create(**ASKED | {"tools": openai.omit})
    none = client.chat.completions.create(**ASKED, tool_choice="none")
    assert none.choices[0].message.tool_calls is None
    assert none.choices[0].message.content == call("Oslo")
    assert none.usage.prompt_tokens == without.usage.prompt_tokens


def test_the_next_turn_has_the_call_and_its_result(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.script = TWO
    message = client.chat.completions.create(**ASKED).choices[0].message
    results = [{"role": "tool", "tool_call_id": one.id, "content": "rain"} for one in message.tool_calls]
    engine.script = "It rains."
    turns = [*SAYS, message.model_dump(exclude_none=True), *results]
    assert client.chat.completions.create(**ASKED | {"messages": turns}).choices[0].message.content == "It rains."


def test_calls_by_anthropic(claude: anthropic.Anthropic, engine: ScriptedEngine) -> None:
    engine.script = f"<think>\nHm.\n</think>\n\n{TWO}"
    asked: dict[str, Any] = {
        "model": "demo",
        "max_tokens": 120,
        "messages": SAYS,
        "extra_body": {"temperature": 0},
        "tools": [TOOL_OF_ANTHROPIC],
    }
    whole = claude.messages.create(**asked)
    with claude.messages.stream(**asked) as stream:
        kinds, final = [event.type for event in stream], stream.get_final_message()
    for message in (whole, final):
        assert message.stop_reason == "tool_use"
        assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
        assert [block.input for block in message.content[2:]] == [{"place": "Oslo"}, {"place": "Bergen"}]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 4
    one = claude.messages.create(**asked, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [block.type for block in one.content] == ["thinking", "text", "tool_use"]
    engine.script = "It rains."
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "rain"}
        for block in whole.content
        if block.type == "tool_use"
    ]
    turns = [*SAYS, {"role": "assistant", "content": whole.content}, {"role": "user", "content": results}]
    after = claude.messages.create(**asked | {"messages": turns})
    assert [block.text for block in after.content] == ["It rains."]


def test_a_model_without_tools_says_so(service: Service, client: openai.OpenAI) -> None:
    ready = service.ready()
    before = ready.tokenizer.chat_template, service.ready().responses
    from dataclasses import replace

    from moestro.serve.constraints import check_tools
    from moestro.serve.faults import Refused
    from moestro.text.responses import find_responses

    for template in (TEMPLATES["chatml"], TEMPLATES["mixtral"], None):
        ready.tokenizer.chat_template = template
        try:
            with pytest.raises(Refused, match="no tools that are known"):
                check_tools(replace(ready, responses=find_responses(ready.tokenizer)), [TOOL])
        finally:
            ready.tokenizer.chat_template = before[0]


@pytest.mark.parametrize(
    ("arguments", "says"), [("{place", "not JSON"), ("[1]", "not an object"), ('"Oslo"', "not an object")]
)
def test_arguments_of_earlier_calls_must_be_an_object(client: openai.OpenAI, arguments: str, says: str) -> None:
    made = [{"id": "a", "type": "function", "function": {"name": "weather", "arguments": arguments}}]
    turns = [*SAYS, {"role": "assistant", "content": None, "tool_calls": made}]
    with pytest.raises(openai.BadRequestError, match=says):
        client.chat.completions.create(**ASKED | {"messages": turns})


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_is_made_where_it_is_wanted(client: openai.OpenAI, engine: ScriptedEngine, choice: Any) -> None:
    """By the model itself, which would tell a fairy tale."""
    schema = SCHEMA | {"properties": {"place": {"enum": ["Oslo", "Bergen"]}}, "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": schema}}]
    values = {"chat_template_kwargs": {"enable_thinking": False}}
    asked = ASKED | {"tools": tools, "tool_choice": choice, "max_tokens": 120, "extra_body": values}
    answer = client.chat.completions.create(**asked).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert [one.function.name for one in answer.message.tool_calls] == ["weather"]
    assert json.loads(answer.message.tool_calls[0].function.arguments)["place"] in ("Oslo", "Bergen")
