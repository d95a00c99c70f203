"""What OpenAI's own package, and editors that read the same protocol, get from the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from moestro.serve.service import Service
from serving import ScriptedEngine

ASKED = {"model": "demo", "messages": [{"role": "user", "content": "Once upon a time"}], "temperature": 0}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Oslo"}}\n</tool_call>'


def chunks(client: openai.OpenAI, **asked: Any) -> list[Any]:
    return list(client.chat.completions.create(**ASKED | {"stream": True} | asked))


def streamed_text(found: list[Any]) -> str:
    return "".join(choice.delta.content or "" for chunk in found for choice in chunk.choices)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")


def test_a_stream_equals_the_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**ASKED, max_tokens=12)
    found = chunks(client, max_tokens=12, stream_options={"include_usage": True})
    assert whole.choices[0].message.content == streamed_text(found)
    assert whole.choices[0].message.role == found[0].choices[0].delta.role == "assistant"
    assert whole.choices[0].finish_reason == found[-2].choices[0].finish_reason == "length"
    assert found[-1].choices == []
    assert found[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    assert found[-1].usage.total_tokens == found[-1].usage.prompt_tokens + 12
    assert all(chunk.usage is None for chunk in found[:-1])
    assert len({chunk.id for chunk in found}) == 1
    assert {chunk.object for chunk in found} == {"chat.completion.chunk"}


def test_usage_is_sent_only_where_it_is_asked_for(client: openai.OpenAI) -> None:
    """An editor that reads `choices[0]` of every chunk must not meet a chunk without choices."""
    found = chunks(client, max_tokens=2)
    assert all(len(chunk.choices) == 1 for chunk in found)


def test_the_stream_ends_with_done(address: str) -> None:
    body = ASKED | {"stream": True, "max_tokens": 2}
    lines = httpx2.post(f"{address}/v1/chat/completions", json=body).text.splitlines()
    data = [line for line in lines if line]
    assert all(line.startswith("data: ") for line in data)
    assert data[-1] == "data: [DONE]"


def test_a_turn_is_told_what_was_not_read_again(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(**ASKED, max_tokens=4)
    again = client.chat.completions.create(**ASKED, max_tokens=4)
    assert again.choices[0].message.content == first.choices[0].message.content
    assert again.usage.prompt_tokens_details.cached_tokens == first.usage.prompt_tokens - 1


def test_several_answers_have_seeds_of_their_own(client: openai.OpenAI) -> None:
    asked = ASKED | {"temperature": 1.0, "max_tokens": 8, "seed": 5}
    found = [client.chat.completions.create(**asked, n=3) for _ in range(2)]
    texts = [[choice.message.content for choice in one.choices] for one in found]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1
    assert [choice.index for choice in found[0].choices] == [0, 1, 2]


def test_logprobs(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**ASKED, max_tokens=3, logprobs=True, top_logprobs=2)
    logprobs = whole.choices[0].logprobs.content
    assert len(logprobs) == 3
    for one in logprobs:
        assert one.logprob == one.top_logprobs[0].logprob  # greedy
        assert bytes(one.bytes).decode() == one.token
    found = chunks(client, max_tokens=3, logprobs=True, top_logprobs=2)
    streamed = [one for chunk in found for c in chunk.choices if c.logprobs for one in c.logprobs.content]
    assert [one.token for one in streamed] == [one.token for one in logprobs]


def test_a_stop_text_ends_the_answer_and_is_not_in_it(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**ASKED, max_tokens=12)
    word = whole.choices[0].message.content.split()[2]
    cut = client.chat.completions.create(**ASKED, max_tokens=12, stop=word)
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].message.content == whole.choices[0].message.content.split(word)[0]


def test_reasoning_is_told_apart(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.script = "<think>\nLet me see.\n</think>\n\nIt is blue."
    message = client.chat.completions.create(**ASKED).choices[0].message
    assert (message.content, message.reasoning_content) == ("It is blue.", "Let me see.")
    found = chunks(client, stream_options={"include_usage": True})
    assert streamed_text(found) == "It is blue."
    deltas = [choice.delta for chunk in found for choice in chunk.choices]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Let me see."
    assert found[-1].usage.completion_tokens_details.reasoning_tokens > 0


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"foo": 1}, "foo", "not supported"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, None, "messages"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens", "differ"),
        ({"n": 5}, None, "at most 4"),
        ({"n": 100}, "n", "less than or equal"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"store": True}, "store", "False"),
        ({"logit_bias": {"a": 1}}, None, "number of a token"),
        ({"logit_bias": {"999999": 1}}, None, "999999"),
        ({"stop": ""}, "stop.0", "at least 1 character"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "'x'"),
        ({"chat_template_kwargs": {"foo": 1}}, "chat_template_kwargs.foo", "does not read"),
        ({"reasoning_effort": "high", "chat_template_kwargs": {"foo": 1}}, "chat_template_kwargs.foo", "not read"),
        ({"max_tokens": 5000}, None, "the context is 512"),
        ({"verbosity": "low"}, "verbosity", "'medium'"),
        ({"modalities": ["audio"]}, "modalities", "'text'"),
        ({"functions": []}, "functions", "not supported"),
    ],
)
def test_what_is_not_done_is_refused(client: openai.OpenAI, changes: dict[str, Any], param: Any, says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=says) as caught:
        client.chat.completions.create(**{"extra_body": changes} | ASKED)
    assert "\n" not in str(caught.value.message)
    if param is not None:
        assert caught.value.param == param


def test_every_field_of_openai_is_either_followed_or_refused(client: openai.OpenAI) -> None:
    """Fields that OpenAI's package knows and this server's description does not would be refused by name."""
    import inspect

    from moestro.serve.chat import ChatRequest

    theirs = set(inspect.signature(client.chat.completions.create).parameters)
    theirs -= {"extra_headers", "extra_query", "extra_body", "timeout"}
    refused = {"audio", "function_call", "functions", "moderation", "prediction", "web_search_options"}
    assert theirs - set(ChatRequest.model_fields) == refused


def test_too_long_is_a_code_of_openai(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ASKED | {"messages": [{"role": "user", "content": "word " * 600}]})
    assert caught.value.code == "context_length_exceeded"


def test_any_model_name_is_answered_and_echoed(client: openai.OpenAI, service: Service) -> None:
    assert client.chat.completions.create(**ASKED | {"model": "gpt-5", "max_tokens": 1}).model == "gpt-5"
    service.is_strict = True
    try:
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(**ASKED | {"model": "gpt-5", "max_tokens": 1})
        assert caught.value.code == "model_not_found"
    finally:
        service.is_strict = False


def test_completions(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(prompt=["Once upon a time", "The old man"], logprobs=1, **asked)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.choices[0].logprobs.tokens
    assert "".join(whole.choices[0].logprobs.tokens) == whole.choices[0].text
    found = list(client.completions.create(prompt="Once upon a time", stream=True, echo=True, **asked))
    assert "".join(chunk.choices[0].text for chunk in found) == "Once upon a time" + whole.choices[0].text
    ids = httpx2.post(str(client.base_url).replace("/v1/", "/tokenize"), json={"prompt": "Once upon a time"}).json()
    by_ids = client.completions.create(prompt=ids["tokens"], **asked)
    assert by_ids.choices[0].text == whole.choices[0].text
    assert ids["count"] == len(ids["tokens"])


def test_a_full_queue_says_when_to_come_again(service: Service, address: str) -> None:
    engine = service.engine
    assert engine is not None
    before, engine.queue = engine.queue, 0
    try:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            running = [iter(chunks_of(client)) for _ in range(4)]
            for one in running:
                next(one)
            with pytest.raises(openai.RateLimitError, match="wait already") as caught:
                client.chat.completions.create(**ASKED, max_tokens=4)
            assert int(caught.value.response.headers["Retry-After"]) >= 1
            for one in running:
                one.close()
    finally:
        engine.queue = before


def chunks_of(client: openai.OpenAI) -> Iterator[Any]:
    with client.chat.completions.create(**ASKED, max_tokens=400, stream=True) as stream:
        yield from stream


def test_a_failed_answer_is_an_object_in_the_stream(address: str, engine: ScriptedEngine) -> None:
    engine.script = "Some"
    body = ASKED | {"stream": True, "max_tokens": 8}
    broken = engine._steps._forward.__class__.__call__

    def fails(*given: Any, **more: Any) -> Any:
        raise RuntimeError("no more memory")

    engine._steps._forward.__class__.__call__ = fails
    try:
        text = httpx2.post(f"{address}/v1/chat/completions", json=body).text
        whole = httpx2.post(f"{address}/v1/chat/completions", json=ASKED)
    finally:
        engine._steps._forward.__class__.__call__ = broken
    last = json.loads(text.strip().splitlines()[-1].removeprefix("data: "))
    assert last["error"]["message"] == "RuntimeError: no more memory"
    assert last["error"]["type"] == "server_error"
    assert whole.status_code == 500
    assert whole.json()["error"]["message"] == "RuntimeError: no more memory"
    assert httpx2.post(f"{address}/v1/chat/completions", json=ASKED | {"max_tokens": 1}).status_code == 200
