"""What never reaches a route: foreign hosts and pages, wrong keys, bodies that are too large, too late or no JSON."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from moestro.errors import RequestError
from moestro.serve.guard import is_loopback
from moestro.serve.journal import requests_log
from moestro.serve.listen import bound
from moestro.serve.service import Loaded, Service
from serving import loaded, serving

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "A secret word"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def made() -> Loaded:
    return loaded()


@pytest.fixture(scope="module")
def address(made: Loaded) -> Iterator[str]:
    with serving(Service("demo", lambda: made, has_key=True), key="k3y", names=["moe.example"], body_bytes=4096) as at:
        yield at


def post(address: str, path: str = CHAT, **more: Any) -> Any:
    headers = {"Authorization": "Bearer k3y"} | more.pop("headers", {})
    return httpx2.post(f"{address}{path}", **{"json": BODY} | more, headers=headers)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:1", 200),
        ("localhost:8080", 200),
        ("[::1]:8080", 200),
        ("moe.example", 200),
        ("MOE.example:443", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("192.168.0.7", 403),
        ("", 403),
        ("[", 403),
    ],
)
def test_hosts(address: str, host: str, status: int) -> None:
    assert post(address, headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:80", 200),
        ("https://localhost:80", 200),
        ("http://localhost:81", 403),
        ("http://evil.example", 403),
        ("null", 403),
        ("", 403),
    ],
)
@pytest.mark.parametrize("method", ["POST", "OPTIONS", "GET"])
def test_origins(address: str, origin: str, status: int, method: str) -> None:
    headers = {"Host": "localhost:80", "Origin": origin, "Authorization": "Bearer k3y"}
    path = CHAT if method != "GET" else "/v1/models"
    answer = httpx2.request(method, f"{address}{path}", headers=headers, json=BODY if method == "POST" else None)
    assert answer.status_code == (405 if (method, status) == ("OPTIONS", 200) else status)
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer k3y"}, 200),
        ({"Authorization": "bearer k3y"}, 200),
        ({"x-api-key": "k3y"}, 200),
        ({"x-api-key": "wrong", "Authorization": "Bearer k3y"}, 200),
        ({}, 401),
        ({"Authorization": "k3y"}, 401),
        ({"Authorization": "Basic k3y"}, 401),
        ({"x-api-key": "K3Y"}, 401),
        ({"x-api-key": "k3yx"}, 401),
        ({"x-api-key": ""}, 401),
        ({"x-api-key": "ké"}, 401),
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/nothing"])
def test_keys(address: str, headers: dict[str, str], status: int, path: str) -> None:
    encoded = {name: value.encode() for name, value in headers.items()}
    answer = httpx2.get(f"{address}{path}", headers=encoded)
    assert (answer.status_code == 401) is (status == 401)
    if status == 401:
        assert answer.json()["error"]["code"] == "invalid_api_key"


def test_health_needs_no_key_and_says_nothing_secret(address: str) -> None:
    answer = httpx2.get(f"{address}/health")
    assert answer.status_code == 200
    assert answer.json()["status"] == "ready"
    assert answer.json()["batching"] == "batched"


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        (None, 415),
    ],
)
def test_only_json(address: str, kind: str | None, status: int) -> None:
    """A page of another site can send the others without asking the browser's leave."""
    headers = {} if kind is None else {"Content-Type": kind}
    assert post(address, json=None, content=json.dumps(BODY), headers=headers).status_code == status


@pytest.mark.parametrize(
    "content", [b"{", b"", b"\xff\xfe", b'{"model": NaN}', b"[]", b"1" * 4000, b"[" * 4000, b"null"]
)
def test_what_is_no_request_is_one_line(address: str, content: bytes) -> None:
    answer = post(address, json=None, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message
    assert "\n" not in message


def test_bodies_have_a_size(address: str) -> None:
    large = BODY | {"user": "x" * 5000}
    assert post(address, json=large).status_code == 413

    def pieces() -> Iterator[bytes]:
        yield from (json.dumps(large).encode()[at : at + 500] for at in range(0, 5000, 500))

    answer = post(address, json=None, content=pieces(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert "larger than 4096 bytes" in answer.json()["error"]["message"]


def test_headers_and_bodies_have_a_time(made: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moestro.serve.listen.HEADER_S", 0.3)
    monkeypatch.setattr("moestro.serve.listen.BODY_S", 0.3)
    slow = Loaded(made.model, made.tokenizer, loaded().engine)
    with serving(Service("demo", lambda: slow)) as address:
        at = ("127.0.0.1", int(address.rpartition(":")[2]))
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        for sent, answered in ((b"", b""), (head, b""), (head + b"Content-Length: 9\r\n\r\n{", b"HTTP/1.1 408")):
            with socket.create_connection(at, timeout=5) as one:
                one.sendall(sent)
                begun_s = time.monotonic()
                found = one.recv(4096)
                assert found.startswith(answered)
                assert bool(found) is bool(answered)
                assert time.monotonic() - begun_s < 3


def test_the_log_has_no_texts(address: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests_log, "handlers", [caplog.handler])  # a command may have set up its parent otherwise
    monkeypatch.setattr(requests_log, "propagate", False)
    with caplog.at_level(logging.INFO), caplog.at_level(logging.INFO, logger=requests_log.name):
        assert post(address).status_code == 200
        assert post(address, "/a/path/with/a/secret").status_code == 404
        time.sleep(0.05)
    lines = [json.loads(record.message) for record in caplog.records if record.name == "moestro.requests"]
    assert [line["path"] for line in lines] == [CHAT, "other"]
    assert lines[0]["answers"][0]["completion_tokens"] == 2
    said = "\n".join(record.getMessage() for record in caplog.records if not record.name.startswith("httpx"))
    assert "secret" not in said
    assert "k3y" not in said


def test_figures(address: str) -> None:
    post(address)
    text = httpx2.get(f"{address}/metrics", headers={"x-api-key": "k3y"}).text
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(figures["moestro_ready"]) == 1
    assert float(figures["moestro_completion_tokens_total"]) >= 2
    assert float(figures["moestro_first_token_seconds_count"]) >= 1
    assert float(figures[f'moestro_http_requests_total{{path="{CHAT}",status="200"}}']) >= 1


def test_health_while_loading_and_after_a_failure(made: Loaded) -> None:
    import threading

    goes_on = threading.Event()

    def fails() -> Loaded:
        from moestro.progress import Bar

        with Bar("reading experts", 4.0) as bar:
            bar.advance(1)
            assert goes_on.wait(20)
        raise RequestError("no such model")

    service = Service("demo", fails)
    service.start()
    while service.load_progress != ("reading experts", 0.25):
        time.sleep(0.01)
    from fastapi.testclient import TestClient

    from moestro.serve.app import make_app

    client = TestClient(make_app(service), base_url="http://localhost")  # without its lifespan, which starts to load
    answer = client.get("/health")
    assert answer.status_code == 503
    assert answer.json()["loading"] == {"what": "reading experts", "share": 0.25}
    answer = client.post(CHAT, json=BODY)
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "5"
    assert "reading experts, 25% done" in answer.json()["error"]["message"]
    goes_on.set()
    while service.state == "loading":
        time.sleep(0.01)
    assert client.get("/health").json() == {"status": "failed", "model": "demo", "error": "no such model"}
    assert service.is_fault is False


def test_a_taken_port_is_one_line() -> None:
    with bound("127.0.0.1", 0) as first, pytest.raises(RequestError, match="name another"):
        bound("127.0.0.1", first.getsockname()[1])
    with pytest.raises(RequestError, match="no such address"):
        bound("no-such-host.invalid", 0)


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "::1", "localhost", "127.8.8.8")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "example.org")))


def test_the_routes_are_there_before_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import moestro.serve.listen, sys; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
