"""A call that a family's template writes is read back; whatever the answer, its pieces make no difference and stay."""

from __future__ import annotations

import functools
import json
import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from call_templates import CALL_TEMPLATES, CALL_TOKENS
from moestro import load_tokenizer
from moestro.text.forced import forced_call
from moestro.text.responses import Part, ResponseReader, find_responses

SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "share": {"type": "number"},
        "is_on": {"type": "boolean"},
        "items": {"type": "array", "items": {"type": "string"}},
        "more": {"type": "object"},
        "other": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    },
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "Does it.", "parameters": SCHEMA}}
    for name in ("look_up", "weather-2")
]
# Values may hold anything but the marks themselves, which a family without quotes cannot write.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=12) | st.sampled_from(
    ['"', "'", "\n", "\\", '{"a": 1}', "[1]", "</b>", "true", "12", "", " x ", "日本 🙂", "a\nb\n"]
)
FLAT = TEXTS | st.integers(-(10**9), 10**9) | st.booleans() | st.floats(-1e6, 1e6).map(lambda one: round(one, 3))
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "text": TEXTS,
        "count": st.integers(-(10**12), 10**12),
        "share": st.floats(-1e6, 1e6).map(lambda one: round(one, 3)),
        "is_on": st.booleans(),
        "items": st.lists(TEXTS, max_size=3),
        "more": st.dictionaries(
            st.from_regex("[a-z]{1,4}", fullmatch=True), FLAT | st.lists(FLAT, max_size=2), max_size=3
        ),
        "other": st.none() | st.integers(0, 9),
    },
)
CALLS = st.lists(st.tuples(st.sampled_from(["look_up", "weather-2"]), ARGUMENTS), min_size=1, max_size=3)
MARKUP = ("<", ">", "|")  # texts with these may hold a mark, which families without quotes cannot write


@functools.cache
def responses_of(family: str) -> Any:
    tokenizer = load_tokenizer("demo")
    tokenizer.chat_template = CALL_TEMPLATES[family]
    if family in CALL_TOKENS:
        tokenizer.add_special_tokens({"additional_special_tokens": CALL_TOKENS[family]})
    found = find_responses(tokenizer)
    assert found is not None
    return found


def written(family: str, calls: list[Any], content: str = "", reasoning: str = "") -> tuple[str, str]:
    """The prompt, and the answer that the family's template writes."""
    tokenizer = responses_of(family).tokenizer
    shape = [{"role": "user", "content": "Do it."}]
    prompt = tokenizer.apply_chat_template(shape, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    as_text = family in ("deepseek-v3", "deepseek-v3.1")
    made = [
        {
            "id": f"functions.{name}:{at}" if family == "kimi" else f"{at:09d}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(one, ensure_ascii=False) if as_text else one},
        }
        for at, (name, one) in enumerate(calls)
    ]
    answer = {"role": "assistant", "content": content, "tool_calls": made}
    if reasoning:
        answer |= {"reasoning_content": reasoning, "thinking": reasoning}
    text = tokenizer.apply_chat_template([*shape, answer], tools=TOOLS, tokenize=False, add_generation_prompt=True)
    begin = text.index("Do it.")
    assert text[: begin + 6] == prompt[: begin + 6]
    answer_text = text[begin:].removeprefix(prompt[begin:])
    end = {"gpt-oss": "<|start|>assistant"}.get(family, "<|end|><|assistant|>")
    return prompt, answer_text.removesuffix(end)


def read(family: str, pieces: list[str], tools: Any = TOOLS, prompt: str = "") -> list[Part]:
    responses = responses_of(family)
    ids = responses.tokenizer(prompt or "<|assistant|>", add_special_tokens=False).input_ids
    reader = ResponseReader(responses, ids, tools)
    parts = [part for piece in pieces for part in reader.feed(piece)] + reader.end()
    found: list[Part] = []
    for part in parts:
        if found and part.kind == found[-1].kind != "tool_call":
            found[-1] = Part(part.kind, found[-1].text + part.text)
        else:
            found.append(part)
    return found


def calls_in(parts: list[Part]) -> list[Any]:
    return [(part.name, json.loads(part.text)) for part in parts if part.kind == "tool_call"]


def is_writable(family: str, value: Any) -> bool:
    """Whether the family's notation has a form for a value."""
    if isinstance(value, dict):
        return all(is_writable(family, one) for one in value.values())
    if isinstance(value, list):
        return all(is_writable(family, one) for one in value)
    return not (isinstance(value, str) and any(mark in value for mark in MARKUP))


def atoms(family: str, text: str) -> list[str]:
    """Letters, and special tokens, which come whole."""
    marks = [re.escape(mark) for mark in responses_of(family).marks.values()]
    return re.findall("|".join([*marks, "."]), text, re.DOTALL)


def cut(family: str, text: str, places: list[int]) -> list[str]:
    found = atoms(family, text)
    at = sorted({place % (len(found) + 1) for place in places})
    return ["".join(found[a:b]) for a, b in zip([0, *at], [*at, len(found)], strict=True)]


@pytest.mark.parametrize("family", CALL_TEMPLATES)
@given(calls=CALLS, places=st.lists(st.integers(0, 10**6), max_size=20), content=st.sampled_from(["", "Let me see."]))
@settings(max_examples=20, deadline=None)
def test_a_written_call_is_read_back(family: str, calls: list[Any], places: list[int], content: str) -> None:
    if not is_writable(family, [arguments for _, arguments in calls]):
        return
    if family == "lfm2":  # names are Python's
        calls = [(name.replace("-", "_"), arguments) for name, arguments in calls]
    if family in ("llama", "gpt-oss"):
        content = ""  # bare calls begin the answer; Harmony's text beside a call is what is thought
    prompt, text = written(family, calls, content)
    parts = read(family, cut(family, text, places), prompt=prompt)
    assert calls_in(parts) == [(name, arguments) for name, arguments in calls]
    assert "".join(part.text for part in parts if part.kind == "content").strip() == content
    assert parts == read(family, [text], prompt=prompt)


THINKING = [name for name, text in CALL_TEMPLATES.items() if "<think>" in text or name == "gpt-oss"]


@pytest.mark.parametrize("family", THINKING)
def test_reasoning_comes_before_calls(family: str) -> None:
    prompt, text = written(family, [("look_up", {"text": "sea"})], reasoning="I need <tool_call> and {this}.")
    for pieces in ([text], atoms(family, text)):
        parts = read(family, pieces, prompt=prompt)
        assert [part.kind for part in parts] == ["reasoning", "tool_call"]
        assert parts[0].text == "I need <tool_call> and {this}."
        assert calls_in(parts) == [("look_up", {"text": "sea"})]


@pytest.mark.parametrize("family", CALL_TEMPLATES)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_pieces_make_no_difference_and_nothing_is_lost(family: str, data: st.DataObject) -> None:
    """Answers that are damaged at some places: cut, doubled, with other text between."""
    _, text = written(family, [("look_up", {"text": "a", "count": 3}), ("weather-2", {})], "Well.")
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(text)))
        length = data.draw(st.integers(0, 12))
        text = (
            text[:at]
            + data.draw(st.sampled_from(["", "x", "{", '"', "<", "\n", text[at : at + 9]]))
            + text[at + length :]
        )
    whole = read(family, [text])
    assert read(family, atoms(family, text)) == whole
    assert read(family, cut(family, text, data.draw(st.lists(st.integers(0, 10**6), max_size=12)))) == whole
    for part in whole:
        if part.kind == "tool_call":
            json.loads(part.text)
        else:
            assert part.text
    if not any(part.kind == "tool_call" for part in whole) and family not in ("gpt-oss",):
        marks = list(responses_of(family).channels.tokens.values()) if responses_of(family).channels else []
        said, wanted = "".join(part.text for part in whole), text
        for mark in [*marks, "<think>", "</think>"]:
            said, wanted = said.replace(mark, ""), wanted.replace(mark, "")
        assert "".join(said.split()) == "".join(wanted.split())


@pytest.mark.parametrize("family", CALL_TEMPLATES)
def test_without_tools_nothing_is_a_call(family: str) -> None:
    _, text = written(family, [("look_up", {"text": "a"})])
    assert not calls_in(read(family, [text], tools=()))


OWN = {
    "start_anchor": "<|assistant|>",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
            "close_pattern": r"</function>\s*</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>]+)>\n(?P<value>.*?)\n</parameter>"},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close_pattern": r"\s*<\|end\|>"},
    },
}
JSON_FIELD = {
    "open": "<tool_call>",
    "close": "</tool_call>",
    "repeats": True,
    "content": "json",
    "transform": {"type": "function", "function": "{content}"},
}


@pytest.mark.parametrize("family", ["qwen3-coder", "hermes"])
def test_a_tokenizer_with_a_response_template_of_its_own(family: str) -> None:
    tokenizer = load_tokenizer("demo")
    tokenizer.chat_template = CALL_TEMPLATES[family]
    fields = OWN["fields"] if family == "qwen3-coder" else OWN["fields"] | {"tool_calls": JSON_FIELD}
    tokenizer.response_template = OWN | {"fields": fields}
    responses = find_responses(tokenizer)
    assert responses is not None
    wanted = {"text": "12 </tool_call>" if family == "hermes" else "12", "count": 12, "items": ["a"]}
    _, text = written(family, [("look_up", wanted), ("look_up", {"is_on": True})], "Well.", "Hm.")
    prompt = tokenizer("<|assistant|>", add_special_tokens=False).input_ids
    found = []
    for pieces in ([text], list(text)):
        reader = ResponseReader(responses, prompt, TOOLS)
        parts = [part for piece in pieces for part in reader.feed(piece)] + reader.end()
        assert calls_in(parts) == [("look_up", wanted), ("look_up", {"is_on": True})]
        found.append(
            {kind: "".join(one.text for one in parts if one.kind == kind) for kind in ("reasoning", "content")}
        )
    assert found == [{"reasoning": "Hm.", "content": "Well."}] * 2
    assert forced_call(responses, TOOLS, None, prompt) is not None
    reader = ResponseReader(responses, prompt, TOOLS)
    broken = "Well.\n<tool_call>\n<function=look_up>\n<nothing>"
    assert "".join(part.text for part in reader.feed(broken) + reader.end()) == broken


@pytest.mark.parametrize("family", CALL_TEMPLATES)
def test_a_long_call_is_read_in_time(family: str) -> None:
    wanted = {"text": "some line of a file, and another word\n" * 1500}
    _, text = written(family, [("look_up", wanted)])
    begin = time.monotonic()
    assert calls_in(read(family, [text[at : at + 4] for at in range(0, len(text), 4)])) == [("look_up", wanted)]
    assert time.monotonic() - begin < 10  # 15,000 pieces of 60,000 characters
