"""Grammars that answers follow, what is thought before them, and budgets of it, without a server."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from moestro.errors import RequestError
from moestro.serve.behind import BehindThinking
from moestro.serve.constraints import _ReasoningBudget
from moestro.serve.grammar import GrammarConstraint, Grammars
from moestro.serve.thinking import Thinking
from toy_tokenizers import KINDS, chatting

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
        (Thinking([PAIR]), "<think>so</think>\n\n", "so"),
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


READ = ("llama", "byte_level", "metaspace_first", "metaspace_always", "metaspace_never", "fuse", "fuse_cleaned")


def may_come(constraint: Any, size: int) -> list[int]:
    """The tokens that may come next."""
    logits = torch.zeros(size)
    constraint.mask(logits)
    return logits.isfinite().nonzero()[:, 0].tolist()


@pytest.mark.parametrize("kind", READ)
def test_answers_of_each_tokenizer_that_is_read(kind: str) -> None:
    tokenizer = KINDS[kind]()
    size = len(tokenizer) + 3  # rows of the embedding
    end = tokenizer.eos_token_id
    matcher = Grammars(tokenizer, size, [end]).matcher('start: "once" " "? "upon"')
    constraint = GrammarConstraint(matcher)
    found: list[int] = []
    while (able := may_come(constraint, size)) != [end]:
        assert max(able) < len(tokenizer)
        assert end not in able
        found.append(able[0])
        constraint.accept(able[0])
        assert len(found) < 20
    assert tokenizer.decode(found).replace(" ", "") == "onceupon"
    constraint.accept(end)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(READ)))
def test_other_tokenizers_are_refused(kind: str) -> None:
    tokenizer = KINDS[kind]()
    with pytest.raises(RequestError, match="llguidance does not read this model's tokenizer"):
        Grammars(tokenizer, len(tokenizer), [1]).matcher('start: "a"')


def test_without_llguidance_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    tokenizer = KINDS["llama"]()
    with pytest.raises(RequestError, match=r"pip install 'moestro\[json\]'"):
        Grammars(tokenizer, len(tokenizer), [2]).matcher('start: "a"')


def test_without_a_token_that_ends_an_answer_it_is_refused() -> None:
    tokenizer = KINDS["llama"]()
    with pytest.raises(RequestError, match="names no token that ends it"):
        Grammars(tokenizer, len(tokenizer), []).matcher('start: "a"')


def budgeted(how: str, opened: str, tokens: int, texts: Sequence[str]) -> str:
    """What an answer becomes of texts that a model would write, letter by letter, where its thinking has a budget."""
    tokenizer = chatting(PAIR, how)
    size = len(tokenizer)
    budget = _ReasoningBudget(tokenizer, [PAIR], opened, tokens)
    wanted = [token for text in texts for token in tokenizer(text, add_special_tokens=False).input_ids]
    found: list[int] = []
    while wanted or len(may_come(budget, size)) == 1:
        able = may_come(budget, size)
        token = wanted.pop(0) if len(able) == size else able[0]
        budget.accept(token)
        found.append(token)
    return str(tokenizer.decode(found, skip_special_tokens=False))


@pytest.mark.parametrize("how", ["special", "added", "spelled"])
def test_thinking_ends_after_its_budget(how: str) -> None:
    assert budgeted(how, "<think>", 3, ["abcdef"]) == "abc</think>def"
    assert budgeted(how, "<think>", 0, ["abc"]) == "</think>abc"
    assert budgeted(how, "", 3, ["abcdef"]) == "abcdef"
    assert budgeted(how, "", 2, ["<think>", "abcd"]) == "<think>ab</think>cd"
    assert budgeted(how, "", 0, ["<think>", "abcd"]) == "<think></think>abcd"
    assert budgeted(how, "<think>", 30, ["ab</think>", "cd"]) == "ab</think>cd"


@pytest.mark.parametrize("how", ["special", "added"])
def test_several_thoughts_share_a_budget(how: str) -> None:
    assert budgeted(how, "", 5, ["<think>", "ab</think>", "x<think>", "cdef"]) == (
        "<think>ab</think>x<think>cd</think>ef"
    )


@pytest.mark.parametrize("how", ["special", "added", "spelled"])
@pytest.mark.parametrize("gap", ["", "\n", "\n\n"])
@pytest.mark.parametrize("opened", ["", "<think>"])
def test_a_grammar_begins_behind_the_thinking(how: str, gap: str, opened: str) -> None:
    tokenizer = chatting(PAIR, how)
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    grammars = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    tokens = {mark: number for mark, number in grammars.special_tokens().items() if mark in PAIR}
    thinking = Thinking([PAIR], tokens, opened=opened)
    begun = "" if opened else "<think>"
    for text, is_right in (
        (f'{begun}so it is</think>{gap}{{"a": 1}}', True),
        (f'{begun}so</think>{gap}{{"a": "1"}}', False),
        (f"{begun}so</think>{gap}well", False),
        (f"{begun}so</think>\n\n\nwell", False),
        ('{"a": 1}', not opened),
    ):
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
        matcher = grammars.matcher(thinking.before(), {"answer": schema})
        ids = tokenizer(text, add_special_tokens=False).input_ids
        is_whole = matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
        assert is_whole is is_right, text
