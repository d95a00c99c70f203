"""Grammars that answers follow, what is thought before them, and budgets of it, without a server."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from moestro.serve.behind import BehindThinking
from moestro.serve.thinking import Thinking

PAIR = ("<think>", "</think>")
HARMONY = {"<|channel|>": 1, "<|message|>": 2, "<|end|>": 3, "<|start|>": 4, "<|constrain|>": 5}
VALUE = '{"a": "</think> <think> <|end|> [THINK] <|channel|>final<|message|>"}'


def pieces(text: str, tokens: dict[str, int]) -> list[tuple[str, int]]:
    """A text as single characters, and as special tokens where they stand between two NULs."""
    found: list[tuple[str, int]] = []
    for at, part in enumerate(text.split("\0")):
        found += [(part, tokens[part])] if at % 2 else [(letter, 1000) for letter in part]
    return found


def told(thinking: Thinking, came: Sequence[tuple[str, int]]) -> tuple[str, str]:
    """What was thought, and the content."""
    reader = BehindThinking(thinking)
    parts = [part for text, token in came for part in reader.feed(text, (token,))] + reader.end()
    kinds = [part.kind for part in parts]
    assert kinds == sorted(kinds, reverse=True)  # reasoning, then content
    return tuple("".join(part.text for part in parts if part.kind == kind) for kind in ("reasoning", "content"))  # type: ignore[return-value]


SPECIAL = {"<think>": 7, "</think>": 8}


@pytest.mark.parametrize(
    ("thinking", "text", "thought"),
    [
        (Thinking(), "", ""),
        (Thinking([PAIR]), "", ""),
        (Thinking([PAIR]), "<think>\n so \n</think>", "so"),
        (Thinking([PAIR]), "<think></think>", ""),
        (Thinking([PAIR], is_wanted=False), "", ""),
        (Thinking([PAIR], opened="<think>"), "one < two </thin\n</think>", "one < two </thin"),
        (Thinking([PAIR], SPECIAL), "\0<think>\0a </think> b\0</think>\0", "a </think> b"),
        (Thinking([PAIR], SPECIAL, opened="<think>"), "a <think> b\0</think>\0", "a <think> b"),
        (Thinking([("[THINK]", "[/THINK]"), PAIR]), "<think>a [/THINK] b</think>", "a [/THINK] b"),
        (Thinking([("<|channel>thought\n", "<channel|>")]), "<|channel>thought\nwell<channel|>", "well"),
        (
            Thinking(tokens=HARMONY, is_harmony=True),
            "\0<|channel|>\0final\0<|message|>\0",
            "",
        ),
        (
            Thinking(tokens=HARMONY, is_harmony=True),
            "\0<|channel|>\0analysis\0<|message|>\0a <|end|> b\0<|end|>\0\0<|start|>\0assistant"
            "\0<|channel|>\0commentary\0<|message|>\0c\0<|end|>\0\0<|start|>\0assistant"
            "\0<|channel|>\0final \0<|constrain|>\0json\0<|message|>\0",
            "a <|end|> b\nc",
        ),
    ],
    ids=lambda value: "" if isinstance(value, Thinking) else repr(value)[:40],
)
def test_what_is_behind_the_thinking_is_content(thinking: Thinking, text: str, thought: str) -> None:
    for value in (VALUE, "[1]", '"<think>"', "-1"):
        assert told(thinking, pieces(text, dict(thinking.tokens)) + pieces(value, {})) == (thought, value)
    whole = text.replace("\0", "")
    if not thinking.tokens:  # in one piece
        assert told(thinking, [(whole + VALUE, 1000)]) == (thought, VALUE)


def test_an_answer_that_is_cut_in_its_thinking_has_no_content() -> None:
    assert told(Thinking([PAIR]), pieces("<think>so </th", {})) == ("so </th", "")
    assert told(Thinking([PAIR], opened="<think>"), pieces("", {})) == ("", "")
    harmony = Thinking(tokens=HARMONY, is_harmony=True)
    assert told(harmony, pieces("\0<|channel|>\0analysis\0<|message|>\0so", HARMONY)) == ("so", "")
    assert told(harmony, pieces("\0<|channel|>\0fin", HARMONY)) == ("", "")
