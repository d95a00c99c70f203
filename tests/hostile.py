"""Requests that a server must survive, and what it answers to each: bytes as they go over the wire."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from typing import Any

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
_PLAIN = '"model":"demo","messages":[{"role":"user","content":"hi"}],"max_tokens":2'
HEAD = "Host: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"


def chat(**more: Any) -> bytes:
    """A chat's body."""
    return json.dumps({"model": "demo", "messages": MESSAGES, "max_tokens": 2} | more).encode()


def request(body: bytes, path: str = CHAT, method: str = "POST", head: str = HEAD) -> bytes:
    """A whole request."""
    return f"{method} {path} HTTP/1.1\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def exchange(port: int, sent: bytes, timeout_s: float = 30.0) -> bytes:
    """All that the server sends until it closes the connection, also where it closes before it has read all."""
    found = b""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as one:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            one.sendall(sent)
        with contextlib.suppress(ConnectionResetError):  # what came before the reset is read first
            while piece := one.recv(65536):
                found += piece
    return found


def statuses(answer: bytes) -> list[int]:
    """The status of each answer on a connection."""
    return [int(one) for one in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer) if one != b"100"]


def _with(more: str) -> bytes:
    return f"{{{_PLAIN},{more}}}".encode()


def _deep(depth: int, name: str = "prompt_cache_options") -> bytes:
    return _with(f'"{name}":{{"a":{"[" * depth}{"]" * depth}}}')


_OPTIONAL = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "stop_token_ids",
    "n",
    "stop",
    "stream",
    "stream_options",
    "logprobs",
    "top_logprobs",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "user",
    "reasoning_effort",
    "chat_template_kwargs",
    "store",
    "service_tier",
    "modalities",
    "verbosity",
    "metadata",
]
_TOOL = '"tools":[{"type":"function","function":{"name":"a","parameters":{"a":%s}}}]'
_EMOJI = "\\ud83d\\ude00"

# Bodies of a chat: name -> body, status.
BODIES: dict[str, tuple[bytes, int]] = {
    "half of a pair as model": (chat(model="\ud800"), 400),
    "half of a pair as text": (chat(messages=[{"role": "user", "content": "\udfff"}]), 400),
    "half of a pair as field": (chat(**{"\ud800": 1}), 400),
    "half of a pair in metadata": (chat(metadata={"\ud800": "a"}), 400),
    "half of a pair in template values": (chat(chat_template_kwargs={"\ud800": 1}), 400),
    "a whole pair": (_with(f'"user":"{_EMOJI}"'), 200),
    "control characters": (chat(model="\0\r\n\u2028"), 200),
    "NaN": (_with('"temperature":NaN'), 400),
    "NaN in a schema": (_with(_TOOL % "NaN"), 400),
    "-Infinity": (_with('"prompt_cache_options":{"a":-Infinity}'), 400),
    "beyond float64": (_with('"temperature":1e999'), 400),
    "400 digits": (_with(f'"seed":{"9" * 400}'), 400),
    "400 digits for a float": (_with(f'"temperature":{"9" * 400}'), 400),
    "5000 digits": (_with(f'"seed":{"9" * 5000}'), 400),
    "a field twice": (_with('"max_tokens":3'), 400),
    "100 deep": (_deep(100), 200),
    "400 deep": (_deep(400), 400),
    "100000 deep": (b"[" * 100_000, 400),
    "100000 objects deep": (b'{"a":' * 100_000, 400),
    "a million wrong messages": (b'{"model":"demo","messages":[' + b"0," * 1_000_000 + b"0]}", 400),
    "a million lists": (_with('"prompt_cache_options":{"a":[' + "[]," * 1_000_000 + "0]}"), 400),
    "a million objects": (_with('"prompt_cache_options":{"a":[' + "{}," * 1_000_000 + "0]}"), 400),
    "100000 fields": (_with(",".join(f'"{at:x}":0' for at in range(100_000))), 400),
    "10000 messages": (chat(messages=MESSAGES * 10_000), 400),
    "a megabyte of text": (chat(messages=[{"role": "user", "content": "word " * 200_000}]), 400),
    "a megabyte of one word": (chat(messages=[{"role": "user", "content": "a" * 1_000_000}]), 400),
    "a megabyte of special tokens": (chat(messages=[{"role": "user", "content": "</s>" * 250_000}]), 400),
    "as many special tokens as may be": (chat(messages=[{"role": "user", "content": "</s>" * 1000}]), 400),
    "no model": (b'{"messages":[]}', 400),
    "a long model": (chat(model="m" * 10_000), 400),
    "a long extra field": (chat(**{"x" * 100_000: 1}), 400),
    "n": (chat(n=10**30), 400),
    "n beyond the rows": (chat(n=16), 400),
    "max_tokens": (chat(max_tokens=2**31), 400),
    "max_tokens of 64 bits": (chat(max_tokens=2**64), 400),
    "true as a number": (chat(max_tokens=True), 400),
    "a text as a number": (chat(max_tokens="2"), 400),
    "smallest temperature": (chat(temperature=5e-324), 200),
    "largest temperature": (chat(temperature=100), 200),
    "smallest top_p": (chat(temperature=1, top_p=5e-324), 200),
    "largest min_p": (chat(temperature=1, min_p=1), 200),
    "largest top_k": (chat(temperature=1, top_k=2**31), 200),
    "smallest penalty": (chat(temperature=0.0002, repetition_penalty=0.01, max_tokens=8), 200),
    "a penalty that has no floats": (chat(temperature=1, repetition_penalty=1e-300, max_tokens=8), 400),
    "largest penalty": (chat(temperature=1, repetition_penalty=100, max_tokens=8), 200),
    "all biases": (chat(temperature=1, logit_bias={str(at): -100 for at in range(4096)}), 200),
    "a bias of no token": (chat(logit_bias={"99999": 1}), 400),
    "a bias of a word": (chat(logit_bias={"\u0661": 1}), 400),
    "nothing for each field that may be left out": (chat(**dict.fromkeys(_OPTIONAL)), 200),
    "17 stops": (chat(stop=["a"] * 17), 400),
    "a long stop": (chat(stop="a" * 1001), 400),
    "no schema": (chat(response_format={"type": "json_schema"}), 400),
    "no tools": (chat(tool_choice="required"), 400),
    "UTF-16": (chat().decode().encode("utf-16"), 400),
    "Latin-1": (b'{"model":"\xe9"}', 400),
    "a byte order mark": (b"\xef\xbb\xbf" + chat(), 400),
    "two values": (chat() + chat(), 400),
    "null": (b"null", 400),
    "a list": (b"[]", 400),
    "nothing": (b"", 400),
}

_BODY = chat().decode()
_CHUNKED = f"{len(_BODY):x}\r\n{_BODY}\r\n0\r\n\r\n"


def _get(more: str = "", path: str = "/health", host: str = "localhost") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{more}\r\n".encode("latin-1")


def _post(more: str, body: str = _BODY) -> bytes:
    return f"POST {CHAT} HTTP/1.1\r\n{HEAD}{more}\r\n\r\n{body}".encode("latin-1")


# Whole requests: name -> bytes, the status of each answer.
REQUESTS: dict[str, tuple[bytes, list[int]]] = {
    "a user in the host": (_get(host="evil@localhost"), [403]),
    "a path in the host": (_get(host="localhost/evil"), [403]),
    "a fragment in the host": (_get(host="localhost#"), [403]),
    "no port in the host": (_get(host="localhost:abc"), [403]),
    "half an address as host": (_get(host="["), [403]),
    "a host that is no text": (_get(host="\xff"), [403]),
    "two hosts": (_get("Host: localhost\r\n"), [400]),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", [400]),
    "no host in HTTP/1.0": (b"GET /health HTTP/1.0\r\n\r\n", [400]),
    "half an address as origin": (_get("Origin: http://[\r\n"), [403]),
    "another site": (_get("Origin: http://evil.example\r\n"), [403]),
    "two ends of a body": (_post(f"Content-Length: {len(_BODY)}\r\nTransfer-Encoding: chunked", _CHUNKED), [400]),
    "two lengths": (_post(f"Content-Length: {len(_BODY)}\r\nContent-Length: 3"), [400]),
    "a negative length": (_post("Content-Length: -1"), [400]),
    "a length beyond 64 bits": (_post(f"Content-Length: {10**30}"), [400]),
    "a length that is too large": (_post(f"Content-Length: {1 << 30}", ""), [413]),
    "another transfer encoding": (_post("Transfer-Encoding: gzip, chunked", _CHUNKED), [400]),
    "a chunk without a size": (_post("Transfer-Encoding: chunked", "zz\r\n"), [400]),
    "a chunk of a negative size": (_post("Transfer-Encoding: chunked", "-5\r\nabc"), [400]),
    "chunks": (_post("Transfer-Encoding: chunked", _CHUNKED), [200]),
    "a trailer": (_post("Transfer-Encoding: chunked", _CHUNKED[:-2] + "Host: evil\r\n\r\n"), [200]),
    "an encoded body": (_post(f"Content-Encoding: gzip\r\nContent-Length: {len(_BODY)}"), [415]),
    "a body that says that it is plain": (_post(f"Content-Encoding: identity\r\nContent-Length: {len(_BODY)}"), [200]),
    "a body that is announced": (_post(f"Expect: 100-continue\r\nContent-Length: {len(_BODY)}"), [200]),
    "a form": (request(b"a=1", head="Host: localhost\r\nContent-Type: text/plain\r\nConnection: close\r\n"), [415]),
    "another method": (request(chat(), method="PUT"), [405]),
    "a long method": (f"{'A' * 60_000} /health HTTP/1.1\r\n{HEAD}\r\n".encode(), [405]),
    "CONNECT": (b"CONNECT evil:1 HTTP/1.1\r\n" + HEAD.encode() + b"\r\n", [404]),
    "OPTIONS *": (b"OPTIONS * HTTP/1.1\r\n" + HEAD.encode() + b"\r\n", [404]),
    "a whole address as path": (_get(path="http://evil.example/health"), [404]),
    "a way out of the page": (_get(path="/page/../v1/models"), [404]),
    "an encoded way out of the page": (_get(path="/page/%2e%2e%2f%2e%2e%2fpasswd"), [404]),
    "a path that is no text": (_get(path="/v1/models/%ff%fe%00"), [404]),
    "a path of raw bytes": (_get(path="/v1/models/\xe9"), [400]),
    "a long path": (_get(path="/v1/models/" + "a" * 60_000), [404]),
    "a header of raw bytes": (_get("X: a\0b\r\n"), [400]),
    "a header with a space": (_get("X : a\r\n"), [400]),
    "megabytes of headers": (_get("X: a\r\n" * 500_000), [400]),
    "HTTP/0.9": (b"GET /\r\n\r\n", [400]),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400, 400]),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 500, [400]),
    "zeros": (b"\0" * 1000, [400]),
    "five at once, then garbage": (
        _get().replace(b"Connection: close\r\n", b"") * 5 + b"garbage\r\n\r\n",
        [200] * 5 + [400],
    ),
}
