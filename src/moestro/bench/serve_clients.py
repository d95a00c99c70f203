"""Clients of a server over HTTP, in a process of their own, as those of a real server are.

    python -m moestro.bench.serve_clients URL

The server runs in this process, uvicorn's event loop in a thread of its own. Each client streams /v1/completions with
prompts of token ids. An answer's tokens come in as many pieces as the server sends.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from time import perf_counter
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..errors import RequestError
from .serve_load import Answered, Prompts
from .worker import Worker, serve

if TYPE_CHECKING:
    from ..serve.service import Loaded

START_S = 60.0
_END = b"[DONE]"


@contextmanager
def asking(loaded: Loaded, answer_tokens: int) -> Iterator[Callable[[Prompts], list[Answered]]]:
    """Inside the block, a server on loopback: what is yielded has clients ask it for answers of so many tokens.

    Raises:
        RequestError: the packages of a server are missing, or it does not start.
    """
    try:
        from ..serve.listen import bound, server_for
        from ..serve.service import Service
    except ImportError as error:
        raise RequestError(f"--http needs {error.name}; pip install 'moestro[serve]'") from error
    from ..serve.sampling import ends_of

    service, at = Service("bench", lambda: loaded), bound("127.0.0.1", 0)
    server = server_for(service, host="127.0.0.1")
    thread = Thread(target=server.run, args=([at],), daemon=True)
    thread.start()
    try:
        _wait(lambda: bool(server.started) and service.state == "ready", lambda: service.error)
        ends = ends_of(loaded.model.generation_config)
        with Worker("moestro.bench.serve_clients", [f"http://127.0.0.1:{at.getsockname()[1]}"]) as clients:

            def ask(prompts: Prompts) -> list[Answered]:
                found = clients.ask("run", prompts=prompts, answer_tokens=answer_tokens, ends=ends)
                return [Answered(one[0], one[1], tuple(one[2]), *one[3:]) for one in found]

            yield ask
    finally:
        server.should_exit = True
        thread.join(START_S)


def _wait(holds: Callable[[], bool], error: Callable[[], str | None]) -> None:
    end_s = time.monotonic() + START_S
    while not holds():
        if (found := error()) is not None or time.monotonic() > end_s:
            raise RequestError(f"the server does not answer: {found or f'nothing came in {START_S:.0f} s'}")
        time.sleep(0.01)


# ---- the clients' process ----


class _Clients:
    def __init__(self, url: str) -> None:
        self._at = urlsplit(url)

    def run(self, prompts: Prompts, answer_tokens: int, ends: list[int]) -> list[tuple[Any, ...]]:
        """All answers to all prompts of all clients, as the fields of `Answered` without the tokens."""
        found: list[tuple[Any, ...]] = []
        failed: list[Exception] = []

        def ask(client: int) -> None:
            connection = http.client.HTTPConnection(str(self._at.hostname), self._at.port)
            try:
                found.extend(
                    (client, *_answered(connection, prompt, answer_tokens, ends)) for prompt in prompts[client]
                )
            except Exception as error:
                failed.append(error)
            finally:
                connection.close()

        threads = [Thread(target=ask, args=(client,)) for client in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
        return found


def _answered(
    connection: http.client.HTTPConnection, prompt: list[int], tokens: int, ends: list[int]
) -> tuple[float, list[float], int, int, int]:
    body = {"model": "bench", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}, "logit_bias": {str(end): -100 for end in ends}}
    submitted_s, times_s = perf_counter(), []
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RequestError(f"the server answers {response.status}: {response.read()[:300].decode(errors='replace')}")
    usage: dict[str, Any] = {}
    for line in response:
        if not line.startswith(b"data: ") or line[6:].strip() == _END:
            continue
        now_s, event = perf_counter(), json.loads(line[6:])
        if "error" in event:
            raise RequestError(f"an answer failed: {event['error']}")
        usage = event.get("usage") or usage
        if event["choices"] and event["choices"][0]["text"]:
            times_s.append(now_s)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return submitted_s, times_s, usage["prompt_tokens"], cached, usage["completion_tokens"]


def main() -> None:
    """Answer the parent's questions."""
    clients = _Clients(sys.argv[1])
    serve(lambda: ({}, {"run": clients.run}))


if __name__ == "__main__":
    main()
