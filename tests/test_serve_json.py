"""Answers that follow a JSON schema: what the packages of OpenAI and Anthropic get, and what is refused."""

from __future__ import annotations

import json
import re
import time
from typing import Any, Literal

import anthropic
import jsonschema_rs
import openai
import pytest
from pydantic import BaseModel

SAYS = [{"role": "user", "content": "Once upon a time"}]
PLACE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": 0, "maximum": 500},
        "kind": {"enum": ["town", "city"]},
    },
    "required": ["name", "size", "kind"],
    "additionalProperties": False,
}


class Leaf(BaseModel):
    """A part of a model."""

    kind: Literal["leaf"]
    is_green: bool


class Branch(BaseModel):
    """Another one, told apart by its kind."""

    kind: Literal["branch"]
    length: float


class Tree(BaseModel):
    """A model as clients write them."""

    parts: list[Leaf | Branch]
    age: int | None


def asked(client: openai.OpenAI, schema: Any = PLACE, **more: Any) -> Any:
    given = {"model": "demo", "messages": SAYS, "max_tokens": 200, "seed": 3, "reasoning_effort": "none"}
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    return client.chat.completions.create(**given | {"response_format": wanted} | more)


def refusal(client: openai.OpenAI, schema: Any) -> str:
    with pytest.raises(openai.BadRequestError) as caught:
        asked(client, schema)
    assert caught.value.param == "response_format"
    line: str = caught.value.body["message"]  # type: ignore[index, call-overload]
    assert "\n" not in line
    return line


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_follows_its_schema_streamed_and_whole(client: openai.OpenAI, temperature: float) -> None:
    whole = asked(client, temperature=temperature)
    assert whole.choices[0].finish_reason == "stop"
    jsonschema_rs.validate(PLACE, json.loads(whole.choices[0].message.content))
    found = list(asked(client, temperature=temperature, stream=True))
    assert "".join(one.choices[0].delta.content or "" for one in found) == whole.choices[0].message.content


def test_each_of_several_answers_follows_it(client: openai.OpenAI) -> None:
    found = asked(client, n=3, temperature=1).choices
    assert len({one.message.content for one in found}) > 1
    for one in found:
        jsonschema_rs.validate(PLACE, json.loads(one.message.content))


def test_pydantic_models_are_parsed(client: openai.OpenAI) -> None:
    found = client.chat.completions.parse(
        model="demo", messages=SAYS, max_tokens=300, seed=1, reasoning_effort="none", response_format=Tree
    )
    assert isinstance(found.choices[0].message.parsed, Tree)


MARKED = 'a</think>b <think>c</think> <tool_call>{"name": "look", "arguments": {}}</tool_call> <|im_end|>'


@pytest.mark.parametrize("effort", ["none", "medium"])
@pytest.mark.parametrize("has_tools", [False, True])
def test_marks_in_a_text_of_the_answer_stay_text(client: openai.OpenAI, effort: str, has_tools: bool) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    schema = {"type": "array", "prefixItems": [{"const": MARKED}, {"const": 1}], "items": False, "minItems": 2}
    more: dict[str, Any] = {"reasoning_effort": effort, "temperature": 0, "max_tokens": 300}
    more |= {"tools": tools} if has_tools else {}
    whole = asked(client, schema, **more).choices[0]
    assert json.loads(whole.message.content) == [MARKED, 1]
    assert (whole.finish_reason, whole.message.tool_calls) == ("stop", None)
    found = [one.choices[0].delta for one in asked(client, schema, stream=True, **more)]
    assert "".join(one.content or "" for one in found) == whole.message.content


def test_any_object(client: openai.OpenAI) -> None:
    found = asked(client, response_format={"type": "json_object"}, temperature=0, max_tokens=300).choices[0]
    assert found.message.content.startswith("{")
    if found.finish_reason == "stop":
        assert isinstance(json.loads(found.message.content), dict)


def test_an_answer_may_be_cut(client: openai.OpenAI) -> None:
    cut = asked(client, max_tokens=3).choices[0]
    assert cut.finish_reason == "length"
    assert cut.message.content.startswith("{")
    stopped = asked(client, stop='"size"').choices[0]
    assert stopped.finish_reason == "stop"
    assert "size" not in stopped.message.content


def test_what_cannot_be_chosen_otherwise_is_chosen(client: openai.OpenAI) -> None:
    bias = {str(token): -100 for token in range(300)}
    more = {"top_k": 1, "min_p": 1.0, "repetition_penalty": 50}
    found = asked(client, logit_bias=bias, top_p=0.01, extra_body=more).choices[0]
    jsonschema_rs.validate(PLACE, json.loads(found.message.content))


def test_anthropic_answers_follow_a_schema(address: str) -> None:
    with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as client:
        given: dict[str, Any] = {
            "model": "demo",
            "max_tokens": 200,
            "messages": SAYS,
            "thinking": {"type": "disabled"},
            "output_config": {"format": {"type": "json_schema", "schema": PLACE}},
            "extra_body": {"temperature": 0},
        }
        whole = client.messages.create(**given)
        with client.messages.stream(**given) as stream:
            final = stream.get_final_message()
        assert whole.content[-1].text == final.content[-1].text
        jsonschema_rs.validate(PLACE, json.loads(whole.content[-1].text))
        schema = {"type": "object", "uniqueItems": True}
        with pytest.raises(anthropic.BadRequestError, match="uniqueItems"):
            client.messages.create(**given | {"output_config": {"format": {"type": "json_schema", "schema": schema}}})


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "strin"}, "Invalid type: strin"),
        ({"type": "object", "required": "a"}, "required"),
        ({"not": {"type": "string"}}, "not"),
        ({"if": {"type": "string"}, "then": {"minLength": 2}}, "then"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {}}, "contains"),
        ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"type": "string", "nullable": True}, "'nullable', which is not supported"),
        ({"type": "object", "properties": {"a": {"anyOf": [{"propertys": {}}]}}}, "propertys"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "x-guidance"),
        ({"type": "string", "format": "frobnicate"}, "Unknown format: frobnicate"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf.*use anyOf"),
        ({"$ref": "https://example.org/schema.json"}, r"\$ref to another document"),
        ({"$ref": "file:///etc/passwd"}, r"\$ref to another document"),
        ({"$ref": "#/$defs/none"}, r"/\$defs/none"),
        ({"$ref": "#"}, "no answer follows it"),
        ({"type": "integer", "minimum": 5, "maximum": 2}, "minimum"),
        ({"type": "string", "pattern": "(?=a)b"}, "pattern cannot be read: look-around"),
        ({"type": "string", "pattern": "(("}, "pattern cannot be read: unclosed group"),
        (nested(61), "levels deep"),
        ({"enum": [f"{at:09}" for at in range(90_000)]}, "1170010 characters.*at most"),
        ({"enum": ["x" * 1_000_000]}, "characters"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_followed_is_refused_at_once(client: openai.OpenAI, schema: Any, says: str) -> None:
    begun_s = time.monotonic()
    assert re.search(says, refusal(client, schema))
    assert time.monotonic() - begun_s < 5


def test_a_very_deep_schema_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        asked(client, nested(150))


def test_formats_that_contradict_themselves_are_refused(client: openai.OpenAI) -> None:
    for wanted in ({"type": "json_schema"}, {"type": "json_object", "json_schema": {"schema": PLACE}}):
        with pytest.raises(openai.BadRequestError, match="json_schema"):
            asked(client, response_format=wanted)


def test_a_grammar_that_outgrows_its_limits_ends_its_answer_alone(client: openai.OpenAI) -> None:
    inner = {"type": "array", "items": {"type": "integer"}}
    alike = [{"type": "array", "items": {"anyOf": [{"type": "integer"}, inner | {"maxItems": n}]}} for n in range(430)]
    schema = {"type": "object", "properties": {"a": {"anyOf": alike}}, "required": ["a"]}
    with pytest.raises(openai.InternalServerError, match="became too large in the middle of the answer"):
        asked(client, schema)
    with pytest.raises(openai.APIError, match="became too large in the middle of the answer"):
        list(asked(client, schema, stream=True))
    assert json.loads(asked(client).choices[0].message.content)
