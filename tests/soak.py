"""A server in a process of its own, and clients that use and abuse it at random."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hostile import BODIES, CHAT, HEAD, REQUESTS, chat, exchange, request, statuses

SECRET = "xyzzy"  # a word of each prompt, which the log must not have
TEXTS = [
    f"{SECRET} Once upon a time there was a {one}" for one in ("king", "fox", "mill", "tree", "crow", "hat", "cat")
]
GREEDY = 24  # tokens of each
COMPLETIONS, ANTHROPIC = "/v1/completions", "/v1/messages"


@dataclass
class Server:
    """A process that serves the demo model."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def ask(self, path: str, body: Any = None) -> Any:
        """The JSON of an answer."""
        one = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        one.request("GET" if body is None else "POST", path, _json(body), _TYPE)
        found = json.loads(one.getresponse().read())
        one.close()
        return found

    def size(self) -> tuple[int, int, int]:
        """Bytes of resident memory, threads and open files."""
        at = Path(f"/proc/{self.process.pid}")
        status = (at / "status").read_text()
        numbers = [int(re.search(rf"^{name}:\s+(\d+)", status, re.M)[1]) for name in ("VmRSS", "Threads")]  # type: ignore[index]
        return numbers[0] << 10, numbers[1], len(os.listdir(at / "fd"))

    def wait_idle(self, seconds: float = 15.0) -> None:
        """Until no row is taken and nothing waits, nor is prepared for clients that have left."""
        self.ask("/tokenize", {"prompt": "a"})
        end_s = time.monotonic() + seconds
        while (now := self.ask("/health"))["running"] or now["waiting"]:
            assert time.monotonic() < end_s, f"rows are not freed: {now}"
            time.sleep(0.05)


_TYPE = {"Content-Type": "application/json"}


def _json(body: Any) -> bytes | None:
    return body if body is None or isinstance(body, bytes) else json.dumps(body).encode()


@contextmanager
def started(log: Path, *options: str) -> Iterator[Server]:
    """A server of the demo model; ends by SIGTERM, with status 0."""
    typed = ["serve", "demo", "--port", "0", "--dtype", "float32", "-t", "1", "--device", "cpu", *options]
    with log.open("wb") as written:
        process = subprocess.Popen([sys.executable, "-m", "moestro", *typed], stdout=written, stderr=written)
    try:
        end_s = time.monotonic() + 120
        while (found := re.search(r"http://127\.0\.0\.1:(\d+) listens", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end_s
            time.sleep(0.05)
        server = Server(process, int(found[1]), log)
        while server.ask("/health")["status"] != "ready":
            assert time.monotonic() < end_s
            time.sleep(0.1)
        yield server
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


@dataclass
class Clients:
    """Random requests to a server, all of a seed.

    answers: text -> what a quiet server says after it. counts: of what was done and the status that came.
    wrong: what should not have come.
    """

    server: Server
    seed: int
    answers: dict[str, str] = field(default_factory=dict)
    counts: Counter[tuple[str, int]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def learn(self) -> dict[str, str]:
        """Ask the quiet server for its answers."""
        said = {text: self.server.ask(COMPLETIONS, _greedy(text))["choices"][0]["text"] for text in TEXTS}
        self.answers = self.answers or said
        return said

    def run(self, seconds: float, round_: int, threads: int = 8) -> None:
        """Clients in so many threads, for so long."""
        end_s = time.monotonic() + seconds

        def one(at: int) -> None:
            rng = random.Random(f"{self.seed} {round_} {at}")
            while time.monotonic() < end_s:
                act = rng.choices(ACTS, WEIGHTS)[0]
                try:
                    act(self, rng)
                except Exception as error:
                    self.wrong.append(f"{act.__name__}: {type(error).__name__}: {error}")

        running = [threading.Thread(target=one, args=(at,)) for at in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()

    def note(self, name: str, status: int, expected: set[int], answer: bytes = b"", retry: str | None = None) -> bool:
        """Count an answer; says whether it is one of those expected and not a refusal of one too many."""
        self.counts[name, status] += 1
        if status in (429, 503):
            if status == 429 and not (retry or b"retry-after: " in answer.lower()):
                self.wrong.append(f"{name}: 429 without Retry-After")
            return False
        if status not in expected:
            self.wrong.append(f"{name}: {status}, not {expected}: {answer[-300:]!r}")
        return status == 200

    def post(self, name: str, path: str, body: Any, expected: set[int]) -> bytes | None:
        """The whole answer; None where it is a refusal."""
        one = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=120)
        try:
            one.request("POST", path, _json(body), _TYPE)
            answer = one.getresponse()
            found = answer.read()
            is_there = self.note(name, answer.status, expected, found, answer.headers["Retry-After"])
            return found if is_there else None
        finally:
            one.close()


def _greedy(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "demo", "prompt": text, "max_tokens": GREEDY, "temperature": 0} | more


def _events(answer: bytes) -> list[Any]:
    lines = [line[6:] for line in answer.decode().splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def greedy(to: Clients, rng: random.Random) -> None:
    """An answer that must be the quiet server's, by any API, streamed or whole."""
    text, stream = rng.choice(TEXTS), rng.random() < 0.5
    kind = rng.choice(["completions", "chat", "messages"])
    messages = [{"role": "user", "content": text}]
    asked = _greedy(text) if kind == "completions" else _greedy(text) | {"messages": messages}
    if kind != "completions":
        del asked["prompt"]
    path = {"completions": COMPLETIONS, "chat": CHAT, "messages": ANTHROPIC}[kind]
    answer = to.post(f"greedy {kind}", path, asked | {"stream": stream}, {200})
    if answer is None:
        return
    said = _said(kind, _events(answer) if stream else [json.loads(answer)])
    if said != to.answers[text]:
        to.wrong.append(f"greedy {kind}, stream {stream}: {said!r} instead of {to.answers[text]!r}")


def _said(kind: str, values: list[Any]) -> str:
    if kind == "messages":
        whole = [
            block["text"] for value in values if isinstance(value.get("content"), list) for block in value["content"]
        ]
        return "".join(whole + [value["delta"].get("text", "") for value in values if "delta" in value])
    choices = [value["choices"][0] for value in values if value.get("choices")]
    if kind == "completions":
        return "".join(one["text"] for one in choices)
    return "".join((one.get("message") or one.get("delta") or {}).get("content") or "" for one in choices)


def sampled(to: Clients, rng: random.Random) -> None:
    """Parameters at random, also impossible ones."""
    values: dict[str, list[Any]] = {
        "temperature": [0, 1e-9, 0.7, 1, 100, 101, -1, "1", None],
        "top_p": [1e-12, 0.5, 1, 0, 2],
        "top_k": [-1, 0, 1, 50, 2**31, 2**40, -2],
        "min_p": [0, 0.1, 1, 1.5],
        "repetition_penalty": [0.01, 1.2, 100, 0, -1, 1e300],
        "presence_penalty": [-2, 2, 3],
        "frequency_penalty": [-2, 2, -3],
        "seed": [0, -1, 2**63, 2**64, 2**100],
        "n": [1, 2, 3, 0, 17],
        "stop": [["a"], "the", [], ["x" * 1001], [""]],
        "logprobs": [True, False, 3],
        "logit_bias": [{"5": 100, "6": -100}, {"-1": 1}, {"99999": 1}, {}],
        "max_tokens": [1, 8, 30, 0, 2**31, -1, 1.5],
        "stream": [True, False, "yes"],
        "unknown": [1],
    }
    names = rng.sample([*values], rng.randint(0, 5))
    body = {"max_tokens": 8} | {name: rng.choice(values[name]) for name in names}
    to.post("sampled", CHAT, {"model": "demo", "messages": [{"role": "user", "content": SECRET}]} | body, {200, 400})


def looks(to: Clients, rng: random.Random) -> None:
    """Everything that asks for no answer."""
    path = rng.choice(
        ["/health", "/metrics", "/v1/models", "/v1/models/demo", "/openapi.json", "/nothing", "/v1/models/x"]
    )
    one = http.client.HTTPConnection("127.0.0.1", to.server.port, timeout=120)
    try:
        for _ in range(rng.randint(1, 4)):  # on one connection
            one.request(rng.choice(["GET", "GET", "GET", "DELETE"]), path)
            answer = one.getresponse()
            to.note(f"GET {path}", answer.status, {200, 404, 405}, answer.read())
    finally:
        one.close()


def counts_tokens(to: Clients, rng: random.Random) -> None:
    """/tokenize and count_tokens, also of long texts."""
    text = f"{SECRET} " * rng.choice([1, 10, 1000, 20_000])
    if rng.random() < 0.5:
        to.post("tokenize", "/tokenize", {"prompt": text}, {200, 400})
    else:
        messages = [{"role": "user", "content": text}]
        to.post("count_tokens", f"{ANTHROPIC}/count_tokens", {"model": "demo", "messages": messages}, {200, 400})


def hostile_body(to: Clients, rng: random.Random) -> None:
    """A body of the table, to any API."""
    name = rng.choice([*BODIES])
    path = rng.choice([CHAT, CHAT, COMPLETIONS, ANTHROPIC, f"{ANTHROPIC}/count_tokens", "/tokenize"])
    body, status = BODIES[name]
    answer = exchange(to.server.port, request(body, path), timeout_s=120)
    to.note(f"hostile {name}", statuses(answer)[0], {status} if path == CHAT else {200, 400}, answer)


def hostile_request(to: Clients, rng: random.Random) -> None:
    """A request of the table."""
    name = rng.choice([*REQUESTS])
    sent, expected = REQUESTS[name]
    answer = exchange(to.server.port, sent, timeout_s=120)
    found = statuses(answer)
    if 429 not in found and found != expected:
        to.wrong.append(f"{name}: {found}, not {expected}")
    to.counts["hostile requests", found[0]] += 1


def noise(to: Clients, rng: random.Random) -> None:
    """A valid request of which some bytes are others, or which is cut."""
    sent = bytearray(request(chat(max_tokens=4)))
    for _ in range(rng.randint(1, 6)):
        sent[rng.randrange(len(sent))] = rng.randrange(256)
    with socket.create_connection(("127.0.0.1", to.server.port), timeout=120) as one:
        one.sendall(sent[: rng.choice([len(sent), rng.randrange(len(sent))])])
        one.shutdown(socket.SHUT_WR)  # what is cut would be waited for
        try:
            found = one.recv(65536)
        except ConnectionResetError:
            found = b""
    for status in statuses(found):
        to.note("noise", status, {*range(200, 500)}, found)


def leaves(to: Clients, rng: random.Random) -> None:
    """A client that leaves: in its headers, its body, before its answer or in its midst."""
    body = chat(messages=[{"role": "user", "content": rng.choice(TEXTS)}], max_tokens=300, stream=rng.random() < 0.7)
    sent = request(body)
    with socket.create_connection(("127.0.0.1", to.server.port), timeout=120) as one:
        if rng.random() < 0.3:
            one.sendall(sent[: rng.randrange(1, len(sent))])
            time.sleep(rng.random() / 5)
        else:
            one.sendall(sent)
            time.sleep(rng.random() / 2)
            if rng.random() < 0.5:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # with a reset
    to.counts["leaves", 0] += 1


def slow(to: Clients, rng: random.Random) -> None:
    """Headers and body that come in pieces."""
    sent = request(chat(max_tokens=2))
    with socket.create_connection(("127.0.0.1", to.server.port), timeout=120) as one:
        for at in range(0, len(sent), 40):
            one.sendall(sent[at : at + 40])
            time.sleep(0.02)
        found = b"".join(iter(lambda: one.recv(65536), b""))
    to.note("slow", statuses(found)[0], {200}, found)


def large(to: Clients, rng: random.Random) -> None:
    """A megabyte of text, or a body beyond the limit, with and without its length."""
    kind = rng.choice(["text", "length", "chunks"])
    text = f"{SECRET} word " * 100_000
    if kind == "text":
        to.post("a megabyte", rng.choice([CHAT]), chat(messages=[{"role": "user", "content": text}]), {400})
        return
    body = chat(user="x" * (9 << 20))
    if kind == "chunks":
        head = f"POST {CHAT} HTTP/1.1\r\n{HEAD}Transfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n"
        sent = head.encode() + body + b"\r\n0\r\n\r\n"
    else:
        sent = request(body)
    answer = exchange(to.server.port, sent, timeout_s=120)
    for status in statuses(answer):  # none where the connection was reset before it could be read
        to.note(f"9 MiB, {kind}", status, {413}, answer)


ACTS: list[Callable[[Clients, random.Random], None]] = [
    greedy,
    sampled,
    looks,
    counts_tokens,
    hostile_body,
    hostile_request,
    noise,
    leaves,
    slow,
    large,
]
WEIGHTS = [30, 15, 10, 5, 8, 8, 8, 10, 3, 2]
