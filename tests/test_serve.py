"""The engine of a server: each request has the answer that it has alone, whatever joins, leaves or fails beside it."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from families import FAMILIES, Family, random_ids, save_model
from moestro import load, load_tokenizer
from moestro.errors import MoestroError, RequestError
from moestro.serve.engine import Engine
from moestro.serve.requests import Finished, Piece, QueueFull, Request, Sampling, TooLong
from moestro.serve.ticket import Ticket

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model() -> Any:
    return load("demo", dtype="float32", threads=1, device="cpu")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("demo")


@pytest.fixture
def engine(model: Any, tokenizer: Any) -> Iterator[Engine]:
    engine = Engine(model, tokenizer, max_requests=4, context=200)
    yield engine
    assert engine.close(finish=False, timeout_s=30)


def result(ticket: Ticket) -> tuple[list[int], str, Finished]:
    events = list(ticket)
    pieces = [event for event in events if isinstance(event, Piece)]
    assert isinstance(events[-1], Finished)
    return [t for piece in pieces for t in piece.token_ids], "".join(piece.text for piece in pieces), events[-1]


def asked(prompt: list[int], new: int = 8, sampling: Sampling = GREEDY, **more: Any) -> Request:
    return Request(prompt=prompt, max_new_tokens=new, sampling=sampling, **more)


def ids(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text).input_ids)


@pytest.mark.sample(12)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_ragged_requests_together_equal_each_alone(family: Family, tmp_path: Path, tokenizer: Any) -> None:
    save_model(family.name, tmp_path)
    model = load(str(tmp_path), dtype="float32", device="cpu", threads=1)
    prompts = [row[:length].tolist() for row, length in zip(random_ids(3, 12), (12, 3, 8), strict=True)]
    engine = Engine(model, tokenizer, max_requests=3, context=40, prefix_bytes=0)
    tickets = [engine.submit(asked(prompt, 6)) for prompt in prompts]
    found = [result(ticket) for ticket in tickets]
    assert engine.close(timeout_s=60)
    for prompt, (tokens, _, end) in zip(prompts, found, strict=True):
        assert end.error is None
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert tokens == alone[0, len(prompt) :].tolist(), engine.batching


PROMPTS = ("Once upon a time", "The king", "And so the fox went into the wood and", "Then", "She said to the bear that")


@pytest.fixture(scope="module")
def alone(model: Any, tokenizer: Any) -> dict[tuple[str, int | None], list[int]]:
    """Of each prompt the greedy answer, and one that is sampled with a seed, on a quiet engine."""
    engine = Engine(model, tokenizer, max_requests=1, context=60, prefix_bytes=0)
    found = {}
    for number, text in enumerate(PROMPTS):
        for sampling in (GREEDY, Sampling(temperature=0.9, seed=number)):
            found[text, sampling.seed] = result(engine.submit(asked(ids(text, tokenizer), 24, sampling)))[0]
    assert engine.close(timeout_s=30)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_joins_leaves_and_cancels_change_no_answer(seed: int, model: Any, tokenizer: Any, alone: Any) -> None:
    """Short contexts, so that rows run out of columns and are moved; answers of all lengths."""
    draw = random.Random(seed)
    engine = Engine(model, tokenizer, max_requests=3, context=40, prefix_bytes=draw.choice((0, 1 << 14, 1 << 26)))
    running: list[tuple[str, Sampling, int, Ticket]] = []
    for _ in range(14):
        number = draw.randrange(len(PROMPTS))
        sampling = draw.choice((GREEDY, Sampling(temperature=0.9, seed=number)))
        new = draw.randint(1, 24)
        ticket = engine.submit(asked(ids(PROMPTS[number], tokenizer), new, sampling))
        running.append((PROMPTS[number], sampling, new, ticket))
        if draw.random() < 0.3:
            ticket.next(timeout_s=5)
            ticket.cancel()
    for text, sampling, new, ticket in running:
        tokens, _, end = result(ticket)
        wanted = alone[text, sampling.seed][:new]
        if ticket.is_cancelled:
            assert tokens == wanted[len(wanted) - len(tokens) :] or tokens == wanted[1 : len(tokens) + 1]
        else:
            assert (tokens, end.reason) == (wanted, "length")
    assert engine.close(timeout_s=30)
    assert engine.progress().running == 0


def test_a_turn_reads_its_new_tokens_also_in_alternation(engine: Engine, tokenizer: Any, alone: Any) -> None:
    said = {text: ids(text, tokenizer) for text in PROMPTS[:2]}
    for turn in range(3):
        for text in said:
            tokens, _, end = result(engine.submit(asked(said[text], 8)))
            assert end.cached_tokens == (0 if turn == 0 else len(said[text]) - 3)
            said[text] = said[text] + tokens + [5, 6]
    again = asked(ids(PROMPTS[2], tokenizer), 24)
    first, second = (result(engine.submit(again)) for _ in range(2))
    assert first[0] == second[0] == alone[PROMPTS[2], None]
    assert second[2].cached_tokens == len(again.prompt) - 1
    both = [engine.submit(asked(ids(PROMPTS[3], tokenizer) * 5, 24)) for _ in range(2)]  # the other still answers
    (one, _, _), (other, _, end) = map(result, both)
    assert one == other
    assert end.cached_tokens == 5 * len(ids(PROMPTS[3], tokenizer)) - 1


def test_states_are_kept_whole_and_serve_the_same_prompt_and_the_next_turn(tmp_path: Path, tokenizer: Any) -> None:
    save_model("qwen3_next", tmp_path)
    model = load(str(tmp_path), dtype="float32", device="cpu", threads=1)
    engine = Engine(model, tokenizer, max_requests=3, context=60)
    assert engine.batching.startswith("one at a time: its cache has layers of the kind LinearAttentionLayer")
    prompt = random_ids(1, 9)[0].tolist()
    first, again = (result(engine.submit(asked(prompt, 6))) for _ in range(2))
    assert first[0] == again[0]
    assert (first[2].cached_tokens, again[2].cached_tokens) == (0, 8)
    longer = [*prompt, *first[0], 4, 5]
    third = result(engine.submit(asked(longer, 6)))
    assert third[2].cached_tokens == len(prompt) + 5
    assert third[0] == model.generate(torch.tensor([longer]), max_new_tokens=6, do_sample=False)[0, -6:].tolist()
    other = [*prompt[:5], 7, 8, 9]
    assert result(engine.submit(asked(other, 2)))[2].cached_tokens == 0
    assert engine.close(timeout_s=30)


def test_stops_and_logprobs(engine: Engine, tokenizer: Any, alone: Any) -> None:
    prompt = ids(PROMPTS[0], tokenizer)
    tokens, text, end = result(engine.submit(asked(prompt, 24)))
    assert tokens == alone[PROMPTS[0], None]
    word = text.split()[3]
    _, cut, end = result(engine.submit(asked(prompt, 24, stop=("never", word))))
    assert (cut, end.reason, end.stop) == (text[: text.index(word)], "stop", word)
    short, _, end = result(engine.submit(asked(prompt, 24, stop_token_ids={tokens[4]})))
    assert short == tokens[: tokens.index(tokens[4]) + 1]
    assert (end.reason, end.stop, end.completion_tokens) == ("stop", tokens[4], len(short))
    for event in engine.submit(asked(prompt, 3, logprobs=2)):
        if isinstance(event, Piece):
            assert event.logprobs is not None
            (one,) = event.logprobs
            assert one.top[0] == (one.token, one.logprob)  # greedy
            assert one.logprob > one.top[1][1]


def test_penalties_and_biases(engine: Engine, tokenizer: Any) -> None:
    prompt = ids(PROMPTS[0], tokenizer)
    (first, *_), _, _ = result(engine.submit(asked(prompt, 4)))
    (other, *_), _, _ = result(engine.submit(asked(prompt, 4, Sampling(temperature=0, logit_bias={first: -100}))))
    assert other != first
    same, _, _ = result(engine.submit(asked(prompt, 6, Sampling(temperature=0, logit_bias={first: 100}))))
    assert same == [first] * 6
    biased = Sampling(temperature=0, logit_bias={first: 30}, frequency_penalty=2, presence_penalty=2)
    varied, _, _ = result(engine.submit(asked(prompt, 40, biased)))
    assert varied[:10] == [first] * 10
    assert set(varied) != {first}


class Only:
    """Allows one token, then fails."""

    thinking = None

    def __init__(self, token: int) -> None:
        self.token, self.count = token, 0

    def mask(self, logits: torch.Tensor) -> None:
        if self.count == 3:
            raise ValueError("no way on")
        kept = logits[self.token].clone()
        logits.fill_(-torch.inf)
        logits[self.token] = kept

    def accept(self, token: int) -> None:
        assert token == self.token
        self.count += 1


def test_a_constraint_that_fails_ends_its_own_answer(engine: Engine, tokenizer: Any, alone: Any) -> None:
    beside = engine.submit(asked(ids(PROMPTS[1], tokenizer), 24))
    tokens, _, end = result(engine.submit(asked(ids(PROMPTS[0], tokenizer), 9, constraint=Only(7))))
    assert (tokens, end.reason, end.error) == ([7] * 3, "error", "ValueError: no way on")
    assert result(beside)[0] == alone[PROMPTS[1], None]


def test_what_cannot_be_served_is_refused_with_the_numbers(engine: Engine, model: Any, tokenizer: Any) -> None:
    with pytest.raises(TooLong, match="has 150 tokens and 60 new ones are wanted, but the context is 200"):
        engine.submit(asked([3] * 150, 60))
    with pytest.raises(RequestError, match="id 999999"):
        engine.submit(asked([999999]))
    with pytest.raises(RequestError, match="top_p is nan"):
        Sampling(top_p=float("nan"))
    full = Engine(model, tokenizer, max_requests=1, context=200, queue=0)
    running = full.submit(asked([3, 4], 150))
    assert running.next(timeout_s=20)
    with pytest.raises(QueueFull) as refused:
        full.submit(asked([3, 4], 100))
    assert refused.value.retry_s >= 1
    assert full.close(finish=False, timeout_s=30)
    assert result(running)[2].reason == "cancelled"
    with pytest.raises(RequestError, match="1 to 64 are possible"):
        Engine(model, tokenizer, max_requests=65)


def test_a_failed_step_ends_its_requests_and_a_dead_thread_all(
    model: Any, tokenizer: Any, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, tokenizer, max_requests=2, context=60)
    batch: Any = engine._steps._batch
    step = batch.step

    def fails(tokens: list[int]) -> Any:
        raise RuntimeError("the step failed\nwith more lines")

    monkeypatch.setattr(batch, "step", fails)
    end = result(engine.submit(asked(ids(PROMPTS[0], tokenizer), 5)))[2]
    assert (end.reason, end.error) == ("error", "RuntimeError: the step failed")
    monkeypatch.setattr(batch, "step", step)
    assert result(engine.submit(asked(ids(PROMPTS[0], tokenizer), 24)))[0] == alone[PROMPTS[0], None]

    def dies() -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(engine._steps, "decode", dies)
    ends = [result(ticket)[2] for ticket in [engine.submit(asked([3, 4], 5))]]
    assert [end.error for end in ends] == ["MemoryError: no memory"]
    assert engine.progress().state == "failed"
    with pytest.raises(MoestroError, match="takes no requests: MemoryError: no memory"):
        engine.submit(asked([3, 4], 5))


def test_closing_finishes_what_runs_and_wakes_callers(model: Any, tokenizer: Any) -> None:
    engine, woken = Engine(model, tokenizer, max_requests=1, context=60), threading.Event()
    running = engine.submit(asked([3, 4], 30), wake=woken.set)
    assert woken.wait(20)
    waiting = engine.submit(asked([3, 4], 30))
    assert engine.close(timeout_s=30)
    assert (result(running)[2].reason, result(waiting)[2].reason) == ("length", "cancelled")
    assert engine.progress().finished == {"length": 1, "cancelled": 1}
