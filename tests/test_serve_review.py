"""What a fresh reader of the server found: lengths that change positions, stops before an answer, odd schemas."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import anthropic
import httpx2
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moestro import load_tokenizer
from moestro.engine.chunks import can_be_chunked, follows_length
from moestro.errors import RequestError
from moestro.serve.messages import CountRequest, prompt_for
from moestro.serve.service import Service
from moestro.text.calls import MalformedError, call_of
from moestro.text.marked_calls import Python
from moestro.text.typed import typed_value
from serving import TEMPLATE, ScriptedEngine

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 32,
        "factor": 2.0,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_positions_that_follow_the_length_are_found_by_what_they_do(kind: str) -> None:
    """Cosines of a short row are compared alone and beside a long one."""
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        head_dim=8,
        max_position_embeddings=64,
        rope_parameters=ROPES[kind] | {"rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        sliding_window=None,
    )
    model = MixtralForCausalLM(config)
    short, long = torch.arange(8)[None], torch.arange(100)[None]
    x = torch.zeros(1, 1)
    alone = model.model.rotary_emb(x, short)[0]
    beside = model.model.rotary_emb(x, long)[0][:, :8]
    assert follows_length(model.config) is not bool(torch.equal(alone, beside))
    assert can_be_chunked(model) is not follows_length(model.config)


def test_a_stop_that_begins_in_the_prompt_is_none_of_the_answer(engine: ScriptedEngine, address: str) -> None:
    engine.script = "\nhi"
    asked = {"model": "demo", "prompt": "Once upon\n", "stop": "\n\n", "max_tokens": 8}
    choice = httpx2.post(f"{address}/v1/completions", json=asked).json()["choices"][0]
    assert choice["text"] == "\nhi"
    engine.script = "\n\nhi"
    choice = httpx2.post(f"{address}/v1/completions", json=asked).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")


def test_an_answer_that_is_begun_is_refused(claude: anthropic.Anthropic) -> None:
    messages: Any = [{"role": "user", "content": "JSON, please"}, {"role": "assistant", "content": "{"}]
    with pytest.raises(anthropic.BadRequestError, match="cannot be continued here"):
        claude.messages.create(model="demo", max_tokens=4, messages=messages)


def test_a_block_that_changes_with_each_request_is_no_part_of_the_prompt(service: Service, address: str) -> None:
    def prompt(number: int) -> list[int]:
        header = {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2; cch={number};"}
        system = [header, {"type": "text", "text": "Be brief."}]
        asked = {"model": "demo", "system": system, "messages": [{"role": "user", "content": "Hello"}]}
        return prompt_for(service.ready(), CountRequest.model_validate(asked))

    assert prompt(1) == prompt(2)


@pytest.mark.parametrize("arguments", ['{"x": 1e999}', '{"x": NaN}', '{"x": [-Infinity]}', {"x": float("inf")}])
def test_a_number_that_json_has_not_makes_no_call(arguments: Any) -> None:
    with pytest.raises(MalformedError):
        call_of("f", arguments)


@pytest.mark.parametrize(
    "schema",
    [{"type": ["string", {}]}, {"enum": 5}, {"anyOf": 3}, {"type": 7}, [], "text", None, {"$ref": 4}, {"oneOf": [1]}],
)
def test_a_schema_that_is_none_never_fails_an_answer(schema: Any) -> None:
    assert typed_value("word", {"properties": {"a": schema}}, "a") == "word"


@pytest.mark.parametrize(
    "schema", [{"properties": {"a": {"enum": 5}}}, {"required": True}, {"properties": 3}, {"type": 5}]
)
def test_an_odd_schema_of_a_forced_call_is_a_400(address: str, schema: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    asked = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "tools": [tool], "max_tokens": 2}
    for choice in ("auto", "required"):
        got = httpx2.post(f"{address}/v1/chat/completions", json=asked | {"tool_choice": choice})
        assert got.status_code in (200, 400), got.text


def test_many_brackets_do_not_take_long() -> None:
    text, begin_s = '[f(a="' + "]" * 1500, time.perf_counter()
    for end in range(1, len(text), 2):
        Python("").read(None, text[:end], {"f": {}}, False)
    assert time.perf_counter() - begin_s < 5


def test_a_conversation_of_many_messages_is_written_in_time() -> None:
    from moestro.text.conversation import prompt_of

    tokenizer = load_tokenizer("demo")
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "a"}] * 6000
    begin_s = time.perf_counter()
    with suppress(RequestError):
        prompt_of(tokenizer, messages)
    assert time.perf_counter() - begin_s < 20
