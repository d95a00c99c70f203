"""A conversation with tools is written by the family's template, whole, and a client's text never becomes a mark."""

from __future__ import annotations

import functools
import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import toy_tokenizers
from call_templates import CALL_TEMPLATES, CALL_TOKENS
from chat_templates import TEMPLATES
from moestro import load_tokenizer
from moestro.errors import RequestError
from moestro.text.conversation import prompt_of
from moestro.text.stream import decode
from test_tool_calls import TOOLS

PLAIN = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
TOKENIZERS: dict[str, Any] = {
    "llama": toy_tokenizers.llama,
    "byte-level": toy_tokenizers.byte_level,
    "metaspace-always": functools.partial(toy_tokenizers.metaspace, "always"),
    "metaspace-first": functools.partial(toy_tokenizers.metaspace, "first"),
    "word-piece": functools.partial(toy_tokenizers.word_piece, False),
    "bpe": toy_tokenizers.bpe,
    "demo": lambda: load_tokenizer("demo"),
}
ARGUMENTS = {"text": 'the "sea" <|end|>', "count": 3, "more": {"a": ["b"]}}


@functools.cache
def tokenizer_of(name: str) -> Any:
    tokenizer = TOKENIZERS[name]()
    more = {"additional_special_tokens": ["<|im_end|>", "[INST]", "<s>", "</s>"]}
    tokenizer.add_special_tokens(more)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer.chat_template = PLAIN
    return tokenizer


def marks_of(tokenizer: Any) -> dict[int, str]:
    return {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if len(token.content) > 1}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_special_tokens_in_a_text_stay_text(name: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(name)
    marks = marks_of(tokenizer)
    piece = st.sampled_from([*marks.values(), "a time", " ", "<", "|", ">", "<|im_", "end|>", "once"])
    role = st.sampled_from(["user", "assistant", "system", "tool"])
    texts = data.draw(st.lists(st.tuples(role, st.lists(piece, max_size=5).map("".join)), min_size=1, max_size=3))
    said = [{"role": role, "content": text} for role, text in texts]
    harmless = [{"role": role, "content": "a time"} for role, text in texts]
    ids, plain = prompt_of(tokenizer, said), prompt_of(tokenizer, harmless)
    kept = [index for index in marks if index != tokenizer.unk_token_id]
    assert Counter(one for one in ids if one in kept) == Counter(one for one in plain if one in kept)


def test_the_text_is_kept() -> None:
    tokenizer = tokenizer_of("demo")
    said = "once </s> upon <|im_end|> a [INST] time<tool_call>"
    ids = prompt_of(tokenizer, [{"role": "user", "content": said}])
    assert decode(tokenizer, ids, skip_special_tokens=False) == f"<s>user: {said}</s>"


def conversation(arguments: Any = ARGUMENTS) -> list[dict[str, Any]]:
    function = {"name": "look_up", "arguments": json.dumps(arguments)}
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "How deep"}, {"type": "text", "text": "is it?"}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "I look it up.",
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "very"},
        {"role": "assistant", "content": "Very."},
        {"role": "user", "content": "Thanks."},
    ]


@pytest.mark.parametrize("family", CALL_TEMPLATES)
def test_a_conversation_with_tools_is_written_whole(family: str) -> None:
    tokenizer = load_tokenizer("demo")
    tokenizer.chat_template = CALL_TEMPLATES[family]
    tokenizer.add_special_tokens({"additional_special_tokens": CALL_TOKENS.get(family, [])})
    text = decode(tokenizer, prompt_of(tokenizer, conversation(), tools=TOOLS), skip_special_tokens=False)
    for said in ("Be brief.", "How deep", "is it?", "look_up", "weather-2", "very", "Very.", "Thanks.", "count", "3"):
        assert said in text
    assert '\\\\"' not in text
    assert "'count'" not in text
    assert ("functions.look_up:0" in text) == (family == "kimi")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (TEMPLATES["chatml"], "leaves out the tools"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "leaves out the tools"),
        ("{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}", "leaves out a call of a tool"),
        ("{{ tools | tojson }}{% for m in messages if m.role != 'system' %}{{ m }}{% endfor %}", "the system prompt"),
        ("{{ tools | tojson }}{% for m in messages if m.role != 'tool' %}{{ m }}{% endfor %}", "a tool's result"),
        (TEMPLATES["gemma"], "System role not supported"),
        (None, "knows no tools"),
    ],
)
def test_what_a_template_leaves_out_is_refused(template: str | None, says: str) -> None:
    tokenizer = load_tokenizer("demo")
    tokenizer.chat_template = template
    with pytest.raises(RequestError, match=says) as caught:
        prompt_of(tokenizer, conversation(), tools=TOOLS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["tools", "messages", "chat_template", "tokenize", "add_generation_prompt", "eos_token"]
)
def test_a_client_sets_no_variable_of_the_request_itself(name: str) -> None:
    tokenizer = load_tokenizer("demo")
    tokenizer.chat_template = TEMPLATES["chatml"]
    with pytest.raises(RequestError, match=name):
        prompt_of(tokenizer, [{"role": "user", "content": "Hi"}], template_values={name: "x"})


def test_values_reach_the_template() -> None:
    tokenizer = load_tokenizer("demo")
    tokenizer.chat_template = TEMPLATES["qwen3"]
    said = [{"role": "user", "content": "Hi"}]
    short, long = (len(prompt_of(tokenizer, said, template_values={"enable_thinking": one})) for one in (True, False))
    assert long > short


def test_a_developer_is_the_system_where_a_template_knows_none() -> None:
    tokenizer = load_tokenizer("demo")
    tokenizer.chat_template = TEMPLATES["phimoe"]
    said = [{"role": role, "content": "Be brief."} for role in ("developer", "system")]
    user = {"role": "user", "content": "Hi"}
    assert prompt_of(tokenizer, [said[0], user]) == prompt_of(tokenizer, [said[1], user])
