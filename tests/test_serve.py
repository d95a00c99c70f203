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
from moestro.errors import RequestError
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
