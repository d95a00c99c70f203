"""A grammar that forces a call takes what the family's template writes, and nothing that is no such call."""

from __future__ import annotations

import functools
from typing import Any

import llguidance
import llguidance.hf
import pytest

from call_templates import CALL_TEMPLATES
from moestro.text.forced import forced_call
from test_tool_calls import THINKING, TOOLS, calls_in, read, responses_of, written

ARGUMENTS = {"text": 'The "sea"\nis deep.', "count": 3, "is_on": True, "items": ["a", "b"]}


@functools.cache
def tokenizer_of(family: str) -> Any:
    return llguidance.hf.from_tokenizer(responses_of(family).tokenizer)


def accepts(family: str, grammar: str, text: str) -> bool:
    """Whether an answer and its end follow a grammar."""
    tokenizer = responses_of(family).tokenizer
    matcher = llguidance.LLMatcher(tokenizer_of(family), grammar)
    assert not matcher.get_error(), matcher.get_error()
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        if not matcher.consume_token(token):
            return False
    return bool(matcher.is_accepting())


def compact(family: str, text: str) -> str:
    """The call as the server forces it: without what a template adds."""
    if family == "mistral":
        text = text.replace(', "id": "000000000"', "")
    elif family == "gpt-oss":
        text = text.removeprefix("<|start|>assistant")
        return text.replace(
            " to=functions.look_up<|channel|>commentary json",
            "<|channel|>commentary to=functions.look_up <|constrain|>json",
        )
    elif family == "kimi":
        text = text.replace("weather-2:1", "weather-2:0")
    return text


@pytest.mark.parametrize("family", CALL_TEMPLATES)
def test_a_grammar_takes_a_written_call_and_no_other(family: str) -> None:
    _, text = written(family, [("look_up", ARGUMENTS)])
    text = compact(family, text).strip()
    if family == "gpt-oss":
        text += "" if text.endswith("<|call|>") else "<|call|>"
    responses = responses_of(family)
    for name in ("look_up", None):
        grammar = forced_call(responses, TOOLS, name)
        assert grammar is not None
        assert accepts(family, grammar, text), (grammar, text)
        assert not accepts(family, grammar, "The sea is deep.")
        assert not accepts(family, grammar, text.replace("look_up", "look_at"))
        assert not accepts(family, grammar, text.replace("3", "three"))
    other = forced_call(responses, TOOLS, "weather-2")
    assert other is not None
    assert not accepts(family, other, text)
    assert calls_in(read(family, [text])) == [("look_up", ARGUMENTS)]


@pytest.mark.parametrize("family", [name for name in THINKING if name != "gpt-oss"])
def test_thinking_comes_before_a_forced_call(family: str) -> None:
    _, text = written(family, [("look_up", ARGUMENTS)])
    text = compact(family, text).strip()
    responses = responses_of(family)
    grammar = forced_call(responses, TOOLS, None)
    assert grammar is not None
    assert accepts(family, grammar, f"<think>\nLet me see.\n</think>\n\n{text}")
    begun = responses.tokenizer("<|assistant|><think>\n", add_special_tokens=False).input_ids
    grammar = forced_call(responses, TOOLS, None, begun)
    assert grammar is not None
    assert accepts(family, grammar, f"Let me see.\n</think>\n\n{text}")


def test_no_tools_no_grammar() -> None:
    assert forced_call(None, TOOLS, None) is None
