"""Text, token by token, is what the tokenizer makes of the whole sequence, whatever its decoder does."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.errors import CheckpointError
from moestro.text.stream import TextStream, decode, shared_length
from toy_tokenizers import KINDS, strips_ends


@functools.cache
def tokenizer_of(kind: str) -> Any:
    return KINDS[kind]()


def whole_text(tokenizer: Any, prompt: Sequence[int], answer: Sequence[int]) -> str:
    """The definition: decode all, and cut off what the decoded prompt begins with."""
    before = tokenizer.decode(list(prompt), skip_special_tokens=True)
    everything = tokenizer.decode([*prompt, *answer], skip_special_tokens=True)
    return everything[shared_length(before, everything) :]


def cut(ids: Sequence[int], at: Sequence[int]) -> list[Sequence[int]]:
    """Cut ids into pieces, as assisted decoding hands them over."""
    edges = [0, *sorted({edge % (len(ids) + 1) for edge in at}), len(ids)]
    return [ids[begin:end] for begin, end in pairwise(edges)]


@st.composite
def token_ids(draw: Any, tokenizer: Any, longest: int) -> list[int]:
    """Ids that often come in runs of a few kinds: bytes after bytes, spaces after spaces, special tokens between."""
    size = len(tokenizer)
    ids: list[int] = []
    for _ in range(draw(st.integers(0, longest))):
        kind = draw(st.integers(0, 5))
        if kind == 0:
            ids.append(draw(st.integers(1, 3)))  # a special token
        elif kind == 1 and ids:
            ids.append(ids[-1])
        else:
            ids.append(draw(st.integers(0, size - 1) if kind < 4 else st.integers(0, min(size, 60) - 1)))
    return ids


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_pieces_add_up_to_the_whole_text(kind: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(kind)
    prompt, answer = (data.draw(token_ids(tokenizer, longest)) for longest in (12, 24))
    pieces = cut(answer, data.draw(st.lists(st.integers(0, 24), max_size=24)))
    stream = TextStream(tokenizer, prompt)
    got = [*(stream.put(ids) for ids in pieces), stream.flush()]
    assert "".join(got) == whole_text(tokenizer, prompt, answer)


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_are_decoded_through_a_window(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = tokenizer_of(kind)
    random = Random(request.config.getoption("--seed"))
    for few, bounded in ((24, True), (60, False), (10_000, False)):  # words alone; spaces too; bytes too
        ids = [random.randrange(min(len(tokenizer), few)) for _ in range(600)]
        stream, longest, pieces = TextStream(tokenizer, ids[:100]), 0, []
        for token in ids[100:]:
            pieces.append(stream.put([token]))
            longest = max(longest, len(stream._ids))
        assert "".join([*pieces, stream.flush()]) == whole_text(tokenizer, ids[:100], ids[100:])
        comes_at_the_end = kind in ("slow", "joining", "byt5")  # Python, which may rewrite all it has written
        assert longest < 200 or not bounded or comes_at_the_end


def test_a_decoder_that_panics_alone_but_not_on_the_whole() -> None:
    """Transformers decodes the whole sequence, where there is enough to strip."""
    tokenizer = strips_ends()
    ids = [tokenizer.convert_tokens_to_ids(word) for word in ("once", " ", "upon", "  ", "a", "time", "  ", "  ")]
    stream = TextStream(tokenizer, ids[:3])
    text = "".join([stream.put([token]) for token in ids[3:]]) + stream.flush()
    assert text == tokenizer.decode(ids)[len(tokenizer.decode(ids[:3])) :]


def test_a_panic_is_one_line() -> None:
    with pytest.raises(CheckpointError, match="cannot decode"):
        decode(strips_ends(), [strips_ends().convert_tokens_to_ids(" ")])
    assert decode(strips_ends(), []) == ""
