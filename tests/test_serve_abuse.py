"""What an attacker sends: each gets its answer in one line, in time, and the server goes on."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest

from hostile import BODIES, CHAT, HEAD, REQUESTS, chat, exchange, request, statuses
from moestro.serve.service import Loaded, Service
from serving import loaded, serving


@pytest.fixture(scope="module")
def made() -> Loaded:
    return loaded()


@pytest.fixture(scope="module")
def port(made: Loaded) -> Iterator[int]:
    with serving(Service("demo", lambda: made)) as address:
        yield int(address.rpartition(":")[2])


def _value(answer: bytes) -> dict[str, object]:
    found: dict[str, object] = json.loads(answer.partition(b"\r\n\r\n")[2])
    return found


@pytest.mark.parametrize("name", BODIES)
def test_bodies(port: int, name: str) -> None:
    body, status = BODIES[name]
    begun_s = time.monotonic()
    answer = exchange(port, request(body))
    assert time.monotonic() - begun_s < 15
    assert statuses(answer) == [status]
    if status != 200:
        error = _value(answer)["error"]
        assert isinstance(error, dict)
        assert 0 < len(error["message"]) < 1100
        assert "\n" not in error["message"]
        assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("name", REQUESTS)
def test_requests(port: int, name: str) -> None:
    sent, expected = REQUESTS[name]
    answer = exchange(port, sent)
    assert statuses(answer) == expected
    assert len(answer) < 5000


def test_what_is_as_deep_as_may_be_goes_through_all_apis(port: int) -> None:
    deep: object = 1
    for _ in range(100):
        deep = [deep]
    block = {"type": "tool_use", "id": "1", "name": "f", "input": {"a": deep}}
    asked = {"model": "demo", "messages": [{"role": "assistant", "content": [block]}]}
    answers = [exchange(port, request(json.dumps(asked).encode(), "/v1/messages/count_tokens"))]
    answers.append(exchange(port, request(json.dumps(asked | {"max_tokens": 1}).encode(), "/v1/messages")))
    assert all(statuses(answer) in ([200], [400]) for answer in answers)


def _until(holds: object, seconds: float = 10.0) -> bool:
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        if holds():  # type: ignore[operator]
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("wait_s", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("more", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"], ids=["alone", "pipelined"])
def test_a_client_that_leaves_frees_its_place(
    made: Loaded, port: int, stream: bool, wait_s: float, more: bytes
) -> None:
    """Before its prompt is written, in the midst of its answer, with another request sent behind."""
    before = made.engine.progress()
    with socket.create_connection(("127.0.0.1", port)) as one:
        one.sendall(
            request(chat(max_tokens=500, stream=stream, temperature=0)).replace(b"Connection: close\r\n", b"") + more
        )
        time.sleep(wait_s)
    assert _until(lambda: made.engine.progress().running == made.engine.progress().waiting == 0)
    now = made.engine.progress()
    assert now.completion_tokens - before.completion_tokens < 400
    assert now.finished.get("length", 0) == before.finished.get("length", 0)


def test_requests_that_are_sent_ahead_have_a_size(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as one:
        one.sendall(request(chat(max_tokens=500, stream=True)).replace(b"Connection: close\r\n", b""))
        ahead = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1_000_000
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            one.sendall(ahead)


def test_a_client_that_does_not_read_is_left(made: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moestro.serve.listen.UNREAD_S", 0.5)
    fresh = Loaded(made.model, made.tokenizer, loaded(context=512).engine)
    with serving(Service("demo", lambda: fresh)) as address, socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.settimeout(20)
        one.connect(("127.0.0.1", int(address.rpartition(":")[2])))
        # Each token tells 20 others: some megabytes in all, more than the kernel keeps.
        one.sendall(request(chat(n=4, max_tokens=500, stream=True, logprobs=True, top_logprobs=20)))
        assert _until(lambda: fresh.engine.progress().running > 0)
        assert _until(lambda: fresh.engine.progress().running == 0, 60)
        time.sleep(1)
        found = b"".join(iter(lambda: one.recv(65536), b""))
        assert b"data: " in found
        assert b"[DONE]" not in found


def test_more_than_may_wait_are_told_when_to_ask_again(made: Loaded) -> None:
    """Also those whose prompts are long, which wait before the engine's own queue."""
    small = Loaded(made.model, made.tokenizer, loaded(max_requests=1, queue=1).engine)
    service = Service("demo", lambda: small)
    with serving(service) as address:
        port = int(address.rpartition(":")[2])
        long = chat(messages=[{"role": "user", "content": "word " * 100_000}])
        opened = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(6)]
        for one in opened:
            one.sendall(request(long))
        found = sorted(b"".join(iter(lambda one=one: one.recv(65536), b"")) for one in opened)  # type: ignore[misc]
        for one in opened:
            one.close()
    codes = [code for answer in found for code in statuses(answer)]
    assert codes.count(400) >= 2
    assert codes.count(400) + codes.count(429) == 6
    assert 429 in codes
    assert all((b"\r\nretry-after: " in answer.lower()) == (b" 429 " in answer) for answer in found)


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
def test_the_end_under_load_is_told(made: Loaded, path: str) -> None:
    """Running answers are whole; those that wait, for a place or for their prompts, are a 503."""
    small = Loaded(made.model, made.tokenizer, loaded(max_requests=1, queue=8).engine)
    service = Service("demo", lambda: small)
    opened = []
    with serving(service) as address:
        port = int(address.rpartition(":")[2])
        for at in range(6):
            content = "hi" if at < 4 else "word " * 60_000
            opened.append(socket.create_connection(("127.0.0.1", port), timeout=30))
            opened[-1].sendall(request(chat(max_tokens=100, messages=[{"role": "user", "content": content}]), path))
        assert _until(lambda: small.engine.progress().running > 0)
        service.close()
        service.close()
    answers = [b"".join(iter(lambda one=one: one.recv(65536), b"")) for one in opened]  # type: ignore[misc]
    for one in opened:
        one.close()
    codes = [code for answer in answers for code in statuses(answer)]
    assert len(codes) == 6
    assert set(codes) <= {200, 400, 503}
    assert 200 in codes
    assert 503 in codes


def test_a_path_without_a_key_leads_nowhere_else(made: Loaded) -> None:
    with serving(Service("demo", lambda: made, has_key=True), key="ké€") as address:
        port = int(address.rpartition(":")[2])
        for path in ("/page/../v1/models", "//v1/models", "/health/../v1/models", "/page/%2e%2e/v1/models"):
            answer = exchange(port, f"GET {path} HTTP/1.1\r\n{HEAD}\r\n".encode())
            assert statuses(answer)[0] in (401, 404)
        key = "Authorization: Bearer ké€\r\n".encode()
        answer = exchange(port, b"GET /v1/models HTTP/1.1\r\n" + HEAD.encode() + key + b"\r\n")
        assert statuses(answer) == [200]
