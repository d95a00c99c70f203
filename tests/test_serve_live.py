"""The stream of what the server does: its events, what they count, and that nothing goes on without clients."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import numpy as np
import pytest

from moestro import load, load_tokenizer
from moestro.engine.counters import RoutingCounts
from moestro.planning.contract import Phase, Step
from moestro.serve.engine import Engine
from moestro.serve.live import MOST_STREAMS
from moestro.serve.requests import Piece, Request, Sampling
from moestro.serve.scene import ARRIVING, DISK, GPU, RAM, Scene
from moestro.serve.service import Loaded, Service
from serving import loaded, serving

KEY = {"Authorization": "Bearer k3y"}


@contextmanager
def live(address: str, headers: dict[str, str] = KEY) -> Iterator[Iterator[tuple[str, Any]]]:
    with httpx2.stream("GET", f"{address}/live", headers=headers, timeout=20) as answer:
        assert answer.status_code == 200, answer.read()
        yield events(answer)


def events(answer: Any) -> Iterator[tuple[str, Any]]:
    name = ""
    for line in answer.iter_lines():
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield name, json.loads(line[6:])


def until(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def made() -> Loaded:
    return loaded(max_requests=4)


@pytest.fixture(scope="module")
def address(made: Loaded) -> Iterator[str]:
    with serving(Service("demo", lambda: made, has_key=True), key="k3y") as at:
        yield at


@pytest.fixture(scope="module")
def on_gpu() -> Iterator[Loaded]:
    """Twenty-odd of the demo's 48 experts fit on a pretended GPU."""
    options = {"device": "emulated", "gpu_memory": "20MiB", "context": 448, "threads": 1}
    model, tokenizer = load("demo", dtype="float32", **options), load_tokenizer("demo")
    engine = Engine(model, tokenizer, max_requests=1, context=448)
    yield Loaded(model, tokenizer, engine)
    engine.close(finish=False)


def answered(engine: Engine, tokens: int = 24) -> list[int]:
    request = Request(prompt=[5, 6, 7, 8], max_new_tokens=tokens, sampling=Sampling(temperature=0.0))
    return [token for event in engine.submit(request) if isinstance(event, Piece) for token in event.token_ids]


def test_events_come_in_order(address: str) -> None:
    with live(address) as found:
        first = [next(found) for _ in range(4)]
    assert [name for name, _ in first] == ["state", "model", "cells", "now"]
    state, model, cells, now = (value for _, value in first)
    assert state == {"state": "ready", "model": "demo"}
    assert model["shape"] == {"layers": 6, "experts": [8] * 6, "top_k": 2}
    assert model["machine"]["gpu"] is None
    assert [model["lanes"][lane]["is_there"] for lane in ("gpu", "link", "cpu")] == [False, False, True]
    assert "no GPU" in model["lanes"]["gpu"]["what"]
    assert model["plan"][0] == "All 48 experts lie in RAM, and the CPU computes every layer."
    (ram,) = model["memory"]
    assert ram["tier"] == "ram"
    assert {part["name"] for part in ram["parts"]} == {"experts", "dense weights", "keys and values"}
    assert len(base64.b64decode(cells["cells"])) == 48
    assert now["places"] == {"disk": 0, "ram": 48, "gpu": 0, "arriving": 0}
    assert now["lanes"]["gpu"] is now["lanes"]["link"] is now["hit_rate"] is None


def test_a_stream_shows_an_answer(address: str, made: Loaded) -> None:
    with live(address) as found:
        begin = next(value for name, value in found if name == "now")
        answered(made.engine, 40)
        seen, cells = [], ""
        for name, value in found:
            cells = value["cells"] if name == "cells" else cells
            seen += [value] if name == "now" else []
            if seen and seen[-1]["tokens"]["answer"] >= begin["tokens"]["answer"] + 39:
                break
    assert max(one["tok_s"]["answer"] for one in seen) > 0
    assert max(one["lanes"]["cpu"] for one in seen) > 0
    assert any(byte & 63 for byte in base64.b64decode(cells))


def test_updates_come_at_most_twice_a_second(address: str) -> None:
    with live(address) as found:
        times = [next(value["time_s"] for name, value in found if name == "now") for _ in range(4)]
    assert min(np.diff(times)) > 0.4


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer k3"}])
def test_the_stream_needs_the_key(address: str, headers: dict[str, str]) -> None:
    assert httpx2.get(f"{address}/live", headers=headers).status_code == 401


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}])
def test_other_sites_cannot_read_the_stream(address: str, headers: dict[str, str]) -> None:
    assert httpx2.get(f"{address}/live", headers=KEY | headers).status_code == 403


def test_there_are_so_many_streams_and_none_is_left(address: str, made: Loaded) -> None:
    accounts = made.model.moestro.accounts
    until(lambda: accounts.routing is None)
    answers, ready = [], threading.Barrier(MOST_STREAMS + 1)

    def look() -> None:
        with live(address) as found:
            answers.append(next(found))
            ready.wait(20)
            ready.wait(20)

    threads = [threading.Thread(target=look) for _ in range(MOST_STREAMS)]
    for thread in threads:
        thread.start()
    ready.wait(20)
    until(lambda: accounts.routing is not None)
    refused = httpx2.get(f"{address}/live", headers=KEY)
    assert refused.status_code == 429
    assert "streams of /live are open" in refused.json()["error"]["message"]
    ready.wait(20)
    for thread in threads:
        thread.join(20)
    until(lambda: accounts.routing is None)
    with live(address) as found:  # and there is place again
        assert next(found)[0] == "state"


def test_a_stream_tells_of_loading_and_ends_with_the_server(made: Loaded) -> None:
    goes_on, engine = threading.Event(), Engine(made.model, made.tokenizer, max_requests=1, context=64)

    def loads() -> Loaded:
        from moestro.progress import Bar

        with Bar("packing experts", 4) as bar:
            bar.advance(1)
            assert goes_on.wait(20)
        return Loaded(made.model, made.tokenizer, engine)

    told: list[tuple[str, Any]] = []

    def look(address: str) -> None:
        with live(address, {}) as found:
            for name, value in found:
                told.append((name, value))
                goes_on.set()

    service = Service("demo", loads)
    thread = None

    def begin() -> None:
        nonlocal thread
        until(lambda: at)
        thread = threading.Thread(target=look, args=(at[0],))
        thread.start()

    at: list[str] = []
    starter = threading.Thread(target=begin)
    starter.start()
    with serving(service, on_bound=at.append) as address:
        starter.join(20)
        until(lambda: any(name == "now" for name, _ in told))
        assert address == at[0]
    assert thread is not None
    thread.join(20)
    assert not thread.is_alive()
    states = [value for name, value in told if name == "state"]
    assert states[0] == {"state": "loading", "model": "demo", "what": "packing experts", "share": 0.25}
    assert [one["state"] for one in states[-2:]] == ["ready", "closing"]


def test_a_load_that_fails_is_told() -> None:
    def loads() -> Loaded:
        time.sleep(0.5)
        raise ValueError("no such weights")

    service, at, told = Service("demo", loads), [], []

    def look() -> None:
        until(lambda: at)
        with live(at[0], {}) as found:
            told.extend(found)

    thread = threading.Thread(target=look)
    thread.start()
    with serving(service, on_bound=at.append):
        thread.join(20)
    assert told[-1][1]["state"] == "failed"
    assert "no such weights" in told[-1][1]["error"]


def test_places_lanes_and_hits_of_a_gpu(on_gpu: Loaded) -> None:
    scene = Scene("demo", on_gpu.model, on_gpu.engine)
    try:
        opening = scene.opening()
        scene.now()
        answered(on_gpu.engine)
        now, cells = scene.now()
    finally:
        scene.close()
    kinds = np.frombuffer(base64.b64decode(cells), np.uint8) >> 6
    slots = len(on_gpu.model.moestro.slots)
    assert 0 < (kinds == GPU).sum() <= slots
    assert (kinds == RAM).sum() >= 48 - slots
    counted = {"disk": DISK, "ram": RAM, "gpu": GPU, "arriving": ARRIVING}
    assert now["places"] == {name: (kinds == kind).sum() for name, kind in counted.items()}
    assert 0 <= now["hit_rate"] <= 1
    assert sum(now["hits"].values()) > 0
    assert 0 < now["lanes"]["gpu"] <= 1
    assert 0 < now["lanes"]["link"] <= 1
    assert now["link_gbps"] > 0
    assert [tier["tier"] for tier in opening["memory"]] == ["gpu", "ram"]
    gpu = opening["memory"][0]
    assert gpu["limit_bytes"] == 20 * 2**20
    assert sum(part["bytes"] for part in gpu["parts"]) <= gpu["limit_bytes"]
    assert all(opening["lanes"][lane]["is_there"] for lane in ("gpu", "link", "cpu"))


def test_what_is_looked_at_answers_the_same(made: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that are shown layer by layer compute what the others do."""
    quiet = answered(made.engine, 60)
    monkeypatch.setattr(RoutingCounts, "is_due", lambda self, key: True)
    scene = Scene("demo", made.model, made.engine)
    try:
        assert answered(made.engine, 60) == quiet
        assert len(quiet) == 60
        assert sum(scene._counts.tokens) >= 6 * 2 * 59  # the last token is not read; the prompt was kept
    finally:
        scene.close()


def test_heat_is_the_share_of_a_layer(made: Loaded) -> None:
    scene = Scene("demo", made.model, made.engine)
    try:
        scene._counts.add(Step(1, Phase.DECODE, {0: 12, 3: 4}, {}))
        _, cells = scene.now()
    finally:
        scene.close()
    found = np.frombuffer(base64.b64decode(cells), np.uint8).reshape(6, 8) & 63
    shares = np.where(found > 0, 2.0 ** ((found - 63.0) / 5), 0.0)
    assert shares[1, 0] == pytest.approx(0.75, rel=0.08)
    assert shares[1, 3] == pytest.approx(0.25, rel=0.08)
    assert np.count_nonzero(found) == 2


def test_layers_are_shown_in_one_of_40_steps() -> None:
    counts = RoutingCounts([2, 2])
    found = [(counts.is_due(0), counts.is_due(1)) for _ in range(81)]
    assert [step for step, due in enumerate(found) if any(due)] == [0, 40, 80]
    assert all(a == b for a, b in found)
