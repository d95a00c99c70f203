"""A server of the demo model on loopback, in a thread of the test's process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moestro import load, load_tokenizer
from moestro.serve.engine import Engine
from moestro.serve.listen import bound, server_for
from moestro.serve.service import Loaded, Service


def loaded(*, max_requests: int = 4, context: int = 256, queue: int = 8, **more: Any) -> Loaded:
    """The demo model with an engine."""
    model, tokenizer = load("demo", dtype="float32", threads=1, device="cpu"), load_tokenizer("demo")
    return Loaded(
        model, tokenizer, Engine(model, tokenizer, max_requests=max_requests, context=context, queue=queue, **more)
    )


@contextmanager
def serving(service: Service, **more: Any) -> Iterator[str]:
    """The address of a running server.

    Args:
        more: arguments of `server_for`.
    """
    at = bound("127.0.0.1", 0)
    server = server_for(service, host="127.0.0.1", **more)
    thread = threading.Thread(target=server.run, args=([at],), daemon=True)
    thread.start()
    try:
        end = time.monotonic() + 60
        while not server.started or service.state == "loading":
            assert time.monotonic() < end
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{at.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server has not ended"
