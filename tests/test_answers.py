"""An answer's text, stop strings and channels: the same however its tokens come."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, PreTrainedTokenizerFast

from moestro import load
from moestro.errors import CheckpointError
from moestro.text.answer import AnswerStream, StopText
from moestro.text.channels import find_channels
from moestro.text.generation import generate_text
from moestro.text.options import TextOptions
from test_text_stream import cut, token_ids, tokenizer_of, whole_text
from toy_tokenizers import KINDS, chatting

WORDS = ["a", " ", "\n", "th", " t", ".", "'", "upon", "a time", "ea", "é", "日", "the ", ". ,", "<|mid|>", "@"]


def answer_of(tokenizer: Any, prompt: Sequence[int], pieces: Sequence[Sequence[int]], **options: Any) -> AnswerStream:
    """What comes of tokens that arrive in such pieces; what was streamed is what is there."""
    said: list[str] = []
    thought: list[str] = []
    stream = AnswerStream(tokenizer, prompt, on_text=said.append, on_reasoning=thought.append, **options)
    stream.put(torch.tensor([list(prompt)]))
    for ids in pieces:
        stream.put(torch.tensor(list(ids), dtype=torch.long))
    stream.end()
    assert "".join(said) == stream.text
    assert "".join(thought) == (stream.reasoning or "")
    return stream


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_text_ends_at_the_first_stop_string(kind: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(kind)
    prompt, answer = (data.draw(token_ids(tokenizer, longest)) for longest in (8, 20))
    whole = whole_text(tokenizer, prompt, answer)
    begin = data.draw(st.integers(0, len(whole)))
    some = whole[begin : begin + data.draw(st.integers(0, 5))]
    words = [*data.draw(st.lists(st.sampled_from(WORDS), max_size=3)), some]
    found = [at for word in words if word and (at := whole.find(word)) >= 0]
    pieces = cut(answer, data.draw(st.lists(st.integers(0, 20), max_size=20)))
    stream = answer_of(tokenizer, prompt, pieces, stop=words)
    assert stream.text == whole[: min(found, default=None)]
    assert stream.is_stopped == bool(found)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_generation_ends_with_the_first_stop_string(kind: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(kind)
    prompt, answer = (data.draw(token_ids(tokenizer, longest)) for longest in (8, 20))
    words = data.draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=3))
    ends = StopText(tokenizer, words, len(prompt))
    for at in range(1, len(answer) + 1):
        sequence = [*prompt, *answer[:at]]
        is_over = bool(ends(torch.tensor([sequence]), None)[0])
        text = whole_text(tokenizer, prompt, answer[:at])
        assert is_over or not any(word in text for word in words)
        if is_over:
            both = [tokenizer.decode(sequence, skip_special_tokens=skips) for skips in (True, False)]
            assert any(word in each for word in words for each in both)
            break


@functools.cache
def random_model(device: str) -> Any:
    return load(shape="tiny", device=device, dtype="float32", threads=1)


@pytest.mark.sample(5)
@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("kind", ["llama", "byte_level", "metaspace_always", "word_piece_cleaned", "slow"])
def test_streamed_returned_and_beam_text_are_the_whole_text(kind: str, device: str) -> None:
    model, tokenizer = random_model(device), tokenizer_of(kind)
    known = len(tokenizer)
    model.generation_config = GenerationConfig(suppress_tokens=list(range(known, 512)), prompt_lookup_num_tokens=None)
    prompt = torch.tensor([5, 9, 17, 12, 30, 6])
    for options in (
        TextOptions(max_new_tokens=24, temperature=1.0, top_k=0, top_p=1.0, seed=1),
        TextOptions(max_new_tokens=24, temperature=0, num_beams=3),
        TextOptions(max_new_tokens=24, temperature=1.0, top_k=0, top_p=1.0, stop=["a", "é"]),
    ):
        said: list[str] = []
        result = generate_text(model, tokenizer, prompt, options, on_text=said.append)
        right = whole_text(tokenizer, prompt.tolist(), result.sequence[len(prompt) :].tolist())
        ends = [at for word in options.stop if (at := right.find(word)) >= 0]
        assert "".join(said) == result.text == result.to_json()["text"] == right[: min(ends, default=None)]
        assert result.new_tokens == 24 or ends


THINKING = [
    ("<think>", "</think>", "special"),
    ("<think>", "</think>", "added"),
    ("<think>", "</think>", "spelled"),
    ("[THINK]", "[/THINK]", "special"),
    ("<seed:think>", "</seed:think>", "added"),
    ("<|START_THINKING|>", "<|END_THINKING|>", "special"),
    ("<thought>", "</thought>", "spelled"),
    ("<|think|>", "<|/think|>", "added"),
    ("<|begin_of_thought|>", "<|end_of_thought|>", "special"),
    ("<|think_start|>", "<|think_end|>", "spelled"),
    ("◁think▷", "◁/think▷", "added"),
    ("<|channel>thought\n", "<channel|>", "added"),
]


@pytest.mark.parametrize(("begin", "end", "how"), THINKING)
@pytest.mark.parametrize(
    ("prompt", "answer", "text", "reasoning"),
    [
        ("Hi", "{}Hm, so.\n{}\n\nHello there!\n", "Hello there!", "Hm, so."),
        ("Hi", "\n{}\n\nHm\n\nwell \n{}Hello", "Hello", "Hm\n\nwell"),
        ("Hi{}\n", "Hm.{}Hello", "Hello", "Hm."),
        ("Hi", "{}Hm, so", "", "Hm, so"),
        ("Hi{}\n", "Hm, so", "", "Hm, so"),
        ("Hi{}\n\n{}\n\n", "Hello", "Hello", None),
        ("Hi", "{}{}Hello", "Hello", ""),
        ("Hi", "  Hello \n there \n", "  Hello \n there \n", None),
        ("Hi", "Well. {}Hm{} Hello", "Well.\nHello", "Hm"),
        ("Hi", "{}a{}b{}c{}d", "b\nd", "a\nc"),
    ],
)
def test_thinking_aloud_is_told_apart(
    begin: str, end: str, how: str, prompt: str, answer: str, text: str, reasoning: str | None
) -> None:
    tokenizer = chatting((begin, end), how)
    marks = [begin, end] * 3
    asked = tokenizer(prompt.format(*marks)).input_ids
    said = tokenizer(answer.format(*marks[prompt.count("{}") :])).input_ids
    channels = find_channels(tokenizer)
    for pieces in ([[token] for token in said], [said]):
        stream = answer_of(tokenizer, asked, pieces, channels=channels)
        assert (stream.text, stream.reasoning) == (text, reasoning)
    assert answer_of(tokenizer, asked, [said]).reasoning is None


HARMONY = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>"]


@pytest.mark.parametrize("how", ["special", "added", "spelled"])
@pytest.mark.parametrize(
    ("answer", "text", "reasoning"),
    [
        (
            "<|channel|>analysis<|message|>They greet.<|end|>"
            "<|start|>assistant<|channel|>final<|message|>Hello!<|return|>",
            "Hello!",
            "They greet.",
        ),
        (
            "<|channel|>analysis<|message|>One.<|end|><|start|>assistant<|channel|>commentary<|message|>Two."
            "<|end|><|start|>assistant<|channel|>final<|message|>Hello!",
            "Hello!",
            "One.\nTwo.",
        ),
        ("<|channel|>analysis<|message|>They gre", "", "They gre"),
        ("<|channel|>final<|message|>Hello!<|return|>", "Hello!", None),
        ("<|message|>Hello!<|end|>", "Hello!", None),
        ("Hello, no channel", "Hello, no channel", None),
        (
            "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{1}<|call|>",
            "",
            "{1}",
        ),
        (
            "<|channel|>analysis<|message|>Hm.<|start|>assistant<|channel|>final <|constrain|>json<|message|>{}",
            "{}",
            "Hm.",
        ),
    ],
)
def test_harmony_channels(how: str, answer: str, text: str, reasoning: str | None) -> None:
    tokenizer = chatting(HARMONY, how)
    prompt = tokenizer("<|start|>user<|message|>Hi<|end|><|start|>assistant").input_ids
    ids = tokenizer(answer).input_ids
    if how == "spelled":
        assert find_channels(tokenizer) is None  # nothing says that these are marks
        return
    for pieces in ([[token] for token in ids], [ids]):
        stream = answer_of(tokenizer, prompt, pieces, channels=find_channels(tokenizer))
        assert (stream.text, stream.reasoning) == (text, reasoning)


def serving_templates() -> list[Any]:
    """The response templates that Transformers itself has for families whose tokenizers bring none."""
    from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS

    return list(_RESPONSE_TEMPLATE_FALLBACKS.values())


@pytest.mark.parametrize("template", serving_templates(), ids=str)
def test_a_tokenizers_own_response_template_is_followed(template: dict[str, Any]) -> None:
    is_gemma = "<|turn>model\n" in template["start_anchor"]
    begin, end, over = (
        ("<|channel>thought\n", "<channel|>", "<turn|>") if is_gemma else ("<think>", "</think>", "<|im_end|>")
    )
    anchor = "<|turn>model\n" if is_gemma else "<|im_start|>assistant\n"
    tokenizer = chatting([mark.strip() for mark in (begin, end, over, "<|im_start|>")], "added")
    tokenizer.response_template = template
    channels = find_channels(tokenizer)
    for opening, answer in (
        ("", f"{begin}Hm.\n{end}\n\nHello, you!{over}"),
        (begin, f"Hm, so\n{end}Hello{over}"),
        ("", f"Hello{over}"),
        ("", f"{begin}Hm"),
    ):
        prompt, ids = tokenizer(f"Hi{anchor}{opening}").input_ids, tokenizer(answer).input_ids
        right = tokenizer.parse_response(answer, prefix=f"Hi{anchor}{opening}")
        for pieces in ([[token] for token in ids], [ids]):
            stream = answer_of(tokenizer, prompt, pieces, channels=channels)
            assert stream.text == right.get("content", "")
            assert stream.reasoning == right.get("reasoning_content")


def test_a_tool_call_stays_in_the_answer_as_it_is_written() -> None:
    tokenizer = chatting(["<think>", "</think>", "<tool_call>", "</tool_call>"], "added")
    tokenizer.response_template = serving_templates()[0]
    ids = tokenizer("<think>Hm</think>Now: <tool_call>{no JSON</tool_call>").input_ids
    for pieces in ([[token] for token in ids], [ids]):
        stream = answer_of(tokenizer, [8], pieces, channels=find_channels(tokenizer))
        assert (stream.text, stream.reasoning) == ("Now:\n{no JSON", "Hm")


def test_an_answer_that_no_region_claims_is_not_lost() -> None:
    tokenizer = chatting(["<|channel|>", "<|message|>"], "special")
    final = {"open": "<|channel|>final<|message|>"}
    tokenizer.response_template = {"start_anchor": "<|start|>", "fields": {"content": final, "role": {"open": "@"}}}
    for answer, text in (("Hello, you", "Hello, you"), ("Well.<|channel|>final<|message|>Hi!", "Hi!"), ("", "")):
        ids = tokenizer(answer).input_ids
        stream = answer_of(tokenizer, [8], [[token] for token in ids], channels=find_channels(tokenizer))
        assert (stream.text, stream.reasoning) == (text, None)


@pytest.mark.parametrize("template", [3, {}, {"fields": {"content": {"open": 3}}}, {"start_anchor": "x", "fields": []}])
def test_a_response_template_that_is_none_is_one_line(template: Any) -> None:
    tokenizer = chatting(["<think>"], "added")
    tokenizer.response_template = template
    with pytest.raises(CheckpointError, match="response_template") as found:
        find_channels(tokenizer)
    assert "\n" not in str(found.value)


def test_ordinary_tokenizers_have_no_channels() -> None:
    for kind in KINDS:
        assert find_channels(tokenizer_of(kind)) is None


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_channels_do_not_depend_on_how_tokens_come(data: st.DataObject) -> None:
    tokenizer: PreTrainedTokenizerFast = thinking()
    ids = data.draw(st.lists(st.one_of(st.integers(0, len(tokenizer) - 1), st.integers(0, 3)), max_size=30))
    channels = find_channels(tokenizer)
    pieces = cut(ids, data.draw(st.lists(st.integers(0, 30), max_size=30)))
    one, other = (answer_of(tokenizer, [8], each, channels=channels) for each in (pieces, [ids]))
    assert (one.text, one.reasoning) == (other.text, other.reasoning)
    if one.reasoning is None and not tokenizer.decode(ids).count("</think>"):
        assert one.text == whole_text(tokenizer, [8], ids)


@functools.cache
def thinking() -> Any:
    return chatting(["<think>", "</think>"], "added")
