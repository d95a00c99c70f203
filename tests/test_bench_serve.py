"""`moestro bench serve` at toy size: the engine itself, a server over loopback, and conversations."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from moestro.bench.serve_load import Answered, decoding_rate, figures_of, medians_of, random_prompts
from moestro.bench.serve_turns import TURNS
from moestro.cli.main import main as cli
from moestro.compute.cpu import levels

needs_kernels = pytest.mark.skipif(not levels(), reason="built without the kernels: no compiler was there")
TOY = ["--clients", "1,3", "--rounds", "1", "--requests", "1", "--prompt-tokens", "12", "--answer-tokens", "5"]


def _printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["moestro", "bench", "serve", *more, *TOY, "-t", "1", "--json"])
    with pytest.raises(SystemExit) as end:
        cli()
    assert not end.value.code
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


@needs_kernels
@pytest.mark.parametrize("way", ["engine", "http"])
def test_loads_together_and_one_at_a_time(
    way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = _printed(monkeypatch, capsys, *(["demo", "--http"] if way == "http" else ["demo"]))
    assert (printed["through"], printed["batching"], printed["turns"]) == (way, "batched", [])
    assert [(one["clients"], one["at_a_time"]) for one in printed["loads"]] == [(1, 3), (3, 3), (3, 1)]
    for one in printed["loads"]:
        assert one["total_tok_s"] == pytest.approx(one["answer_tok_s"] * 17 / 5)
        assert 0 < one["first_s"][0] <= one["first_s"][1]
        assert 0 < one["between_s"][0] <= one["between_s"][1]
        assert (one["ratio"] is None) == (one["clients"] == 1)


@needs_kernels
def test_turns_find_what_was_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    printed = _printed(monkeypatch, capsys, "--shape", "tiny", "--layers", "2", "--bits", "8", "--turns")
    assert [(one["agents"], one["turn"]) for one in printed["turns"]] == [
        (agents, turn) for agents in (1, 2) for turn in range(2, TURNS + 1)
    ]
    assert {one["new_tokens"] for one in printed["turns"]} == {129}
    assert all(one["cached_tokens"] + one["new_tokens"] == one["prompt_tokens"] for one in printed["turns"])


def _seen(client: int, submitted_s: float, *times_s: float) -> Answered:
    return Answered(client, submitted_s, times_s, 10, 0, len(times_s))


def test_figures_of_what_clients_saw() -> None:
    found = [_seen(0, 0.0, 1.0, 2.0, 3.0, 4.0), _seen(1, 0.0, 2.0, 3.0, 4.0, 5.0)]
    assert decoding_rate(found, 2) == pytest.approx(4 / 2)  # from 2 to 4 s both decode
    assert decoding_rate(found, 1) == pytest.approx(7 / 4)
    assert decoding_rate(found, 3) is None
    assert decoding_rate([_seen(0, 0.0, 1.0, 3.0), _seen(0, 3.0, 5.0, 7.0)], 1) == pytest.approx(0.5)
    figures = figures_of(found, 2, 2)
    assert figures.total_tok_s == pytest.approx(28 / 5)
    assert figures.answer_tok_s == pytest.approx(8 / 5)
    assert figures.first_s[0] == pytest.approx(1.5)
    assert figures.between_s == (1.0, 1.0)
    alone = figures_of([_seen(0, 0.0, 1.0, 2.0)], 1, 2)
    first, second = medians_of([[alone], [figures]])
    assert (first.ratio, first.decoding_ratio) == (None, None)
    assert second.ratio == pytest.approx(28 / 5 / 6)
    assert second.decoding_ratio == pytest.approx(2.0)


def test_random_prompts_do_not_begin_alike() -> None:
    prompts = [
        tuple(one[:3])
        for of_client in random_prompts(clients=16, requests=9, tokens=8, vocabulary=50_000, seed=1)
        for one in of_client
    ]
    assert len({*prompts}) == 16 * 9


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["demo", "--clients", "0"], "--clients 0: '0' is no number from 1 on"),
        (["demo", "--layers", "2"], "--layers cuts a random model of a --shape; leave it out with MODEL"),
        ([], "name one model"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    typed: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["moestro", "bench", "serve", *typed])
    with pytest.raises(SystemExit) as end:
        cli()
    assert end.value.code == 2
    assert line in capsys.readouterr().err
