"""Prompts that are read in one forward: which, and that each answer is the one that it has alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from families import FAMILIES, Family, save_model
from moestro import load, load_tokenizer
from moestro.serve import steps
from moestro.serve import together as reading
from moestro.serve.caches import Caches, Forward
from moestro.serve.engine import Engine
from moestro.serve.requests import Finished, Piece, Request, Sampling
from moestro.serve.together import read_together, readable_together


def prompts_of(*lengths: int, vocabulary: int = 90, seed: int = 5) -> list[list[int]]:
    """Random tokens; the first ones differ."""
    draw = random.Random(seed)
    return [[at + 3, *draw.choices(range(3, vocabulary), k=length - 1)] for at, length in enumerate(lengths)]


def answers(engine: Engine, prompts: list[list[int]], cancelled: int | None = None) -> list[tuple[list[int], Finished]]:
    """Greedy answers to prompts that come all at once."""
    with engine._changed:  # so that the engine finds all of them
        tickets = [
            engine.submit(Request(prompt=one, max_new_tokens=6, sampling=Sampling(temperature=0))) for one in prompts
        ]
        if cancelled is not None:
            tickets[cancelled].is_cancelled = True
    found = []
    for ticket in tickets:
        *pieces, end = list(ticket)
        assert isinstance(end, Finished)
        found.append(([token for one in pieces if isinstance(one, Piece) for token in one.token_ids], end))
    return found


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each forward of several had."""
    seen: list[int] = []

    def read(forward: Any, caches: Any, prompts: Any) -> Any:
        seen.append(len(prompts))
        return read_together(forward, caches, prompts)

    monkeypatch.setattr(steps, "read_together", read)
    return seen


@pytest.mark.sample(8)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_each_answer_is_the_one_that_it_has_alone(
    family: Family, tmp_path: Path, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the toys' short contexts, where all are steps."""
    monkeypatch.setattr(reading, "MOST_TOKENS", 8)
    save_model(family.name, tmp_path)
    model, tokenizer = load(str(tmp_path), dtype="float32", device="cpu", threads=1), load_tokenizer("demo")
    prompts = prompts_of(16, 14, 12, vocabulary=model.config.get_text_config(decoder=True).vocab_size)
    engine = Engine(model, tokenizer, max_requests=3, context=40, prefix_bytes=0)
    found = answers(engine, prompts)
    assert engine.close(timeout_s=60)
    assert together == ([3] if engine.batching == "batched" else [])
    for prompt, (tokens, end) in zip(prompts, found, strict=True):
        assert (end.error, end.cached_tokens) == (None, 0)
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert tokens == alone[0, len(prompt) :].tolist()


def test_those_that_share_a_beginning_are_read_behind_each_other(together: list[int]) -> None:
    model, tokenizer = load("demo", dtype="float32", threads=1, device="cpu"), load_tokenizer("demo")
    engine = Engine(model, tokenizer, max_requests=4, context=120)
    one, other = prompts_of(90, 80)
    found = answers(engine, [one, other, one, one])
    assert [end.cached_tokens for _, end in found] == [0, 0, 89, 89]
    assert found[0][0] == found[2][0] == found[3][0]
    assert together == [2]
    lone = answers(engine, prompts_of(70, 71, seed=7), cancelled=0)
    assert [end.reason for _, end in lone] == ["cancelled", "length"]
    again = answers(engine, prompts_of(70, 71, 72, seed=6), cancelled=1)
    assert [end.reason for _, end in again] == ["length", "cancelled", "length"]
    assert together == [2, 2]
    assert engine.close(timeout_s=30)


def test_a_forward_that_fails_ends_those_that_were_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no more memory")

    model, tokenizer = load("demo", dtype="float32", threads=1, device="cpu"), load_tokenizer("demo")
    engine = Engine(model, tokenizer, max_requests=4, context=120)
    monkeypatch.setattr(steps, "read_together", fail)
    found = answers(engine, prompts_of(90, 80))
    assert [(end.reason, end.error) for _, end in found] == [("error", "RuntimeError: no more memory")] * 2
    assert answers(engine, prompts_of(90))[0][1].reason == "length"
    assert engine.close(timeout_s=30)


def test_a_turn_is_one_forward_also_across_a_multiple_of_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "CHUNK", 32)
    model, tokenizer = load("demo", dtype="float32", threads=1, device="cpu"), load_tokenizer("demo")
    engine = Engine(model, tokenizer, max_requests=2, context=120)
    sizes: list[int] = []
    forward = engine._steps._forward

    def count(ids: Any, *given: Any) -> Any:
        sizes.append(ids.shape[1])
        return forward(ids, *given)

    monkeypatch.setattr(engine._steps, "_forward", count)
    (first,) = prompts_of(70)
    ((said, _),) = answers(engine, [first])
    assert sizes == [32, 32, 6]
    ((_, end),) = answers(engine, [first + said + first[:24]])
    assert (end.cached_tokens, sizes[3:]) == (75, [25])
    assert engine.close(timeout_s=30)


@pytest.mark.parametrize(
    ("lengths", "known", "count"),
    [
        ((128, 128, 128, 128, 128), 0, 4),
        ((500, 500), 0, 1),
        ((128, 64), 0, 1),
        ((64, 64, 64), 0, 1),
        ((128, 100, 90), 0, 2),
        ((90, 128), 0, 1),
        ((128, 128), 64, 1),
        ((128, 128), 1, 2),
        ((7,), 0, 1),
    ],
)
def test_which_are_read_together(lengths: tuple[int, ...], known: int, count: int) -> None:
    prompts = [torch.tensor(one) for one in prompts_of(*lengths)]
    assert readable_together(prompts, 512, lambda prompt: known) == count


def test_caches_are_those_of_each_alone() -> None:
    model = load("demo", dtype="float32", threads=1, device="cpu")
    forward = Forward(model)
    caches = Caches(model, forward)
    prompts = [torch.tensor(one) for one in prompts_of(70, 80)]
    logits, found = read_together(forward, caches, prompts)
    for row, prompt in enumerate(prompts):
        alone, cache = forward(prompt[None], caches.new(len(prompt)), torch.arange(len(prompt))[None])
        torch.testing.assert_close(logits[row], alone[0], rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(found[row].layers, cache.layers, strict=True):
            torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-4)
