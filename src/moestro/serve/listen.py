"""A socket and uvicorn around the app, from the first connection to a graceful end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Collection
from types import FrameType
from typing import Any

import uvicorn

from ..errors import RequestError
from ..planning.spelling import spelled
from .app import make_app
from .guard import protocol
from .journal import requests_log
from .service import Service

HEADER_S, BODY_S = 15.0, 60.0  # for the headers of a request, and for its body, to be there
UNREAD_S = 60.0  # for which a client may read nothing
_HEADER_BYTES = 64 << 10
_KEEP_ALIVE_S = 75


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; 0 for any free port.

    Raises:
        RequestError: the port is taken, or there is no such address.
    """
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise RequestError(
            f"{spelled('host', host)}: no such address ({error.strerror}); name one of this machine"
        ) from error
    made = socket.socket(kind, socket.SOCK_STREAM)
    if os.name == "posix":
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
        made.listen(128)
    except OSError as error:
        made.close()
        raise RequestError(
            f"{spelled('port', port)}: {host} does not give it ({error.strerror}); name another"
        ) from error
    return made


def server_for(
    service: Service, *, host: str, names: Collection[str] = (), key: str | None = None, body_bytes: int = 8 << 20
) -> Server:
    """A server that is not running yet; arguments as `Guard` has them."""

    def leave() -> None:
        server.should_exit = True

    app = make_app(service, host=host, names=names, key=key, body_bytes=body_bytes, body_s=BODY_S, on_failed=leave)
    config = uvicorn.Config(
        app,
        http=protocol(HEADER_S, UNREAD_S),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        h11_max_incomplete_event_size=_HEADER_BYTES,
        limit_concurrency=1024,
    )
    logging.getLogger("uvicorn.access").disabled = True  # it writes down paths as clients name them
    server = Server(config, service)
    return server


class Server(uvicorn.Server):
    """Serves until SIGINT or SIGTERM, or until the model could not be loaded; running answers are finished first.

    A second signal cuts them.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note a signal: the first one ends, the second one at once. It is not raised again afterwards."""
        self.force_exit |= self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, finish running answers, close what is open."""
        finishing = asyncio.create_task(asyncio.to_thread(self._service.close))
        await super().shutdown(sockets)
        if self.force_exit:
            await asyncio.to_thread(self._service.close, finish=False)
        await finishing


def leave_process(status: int) -> Any:
    """End now, also where a thread still loads a model, which must not outlive the interpreter."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def log_requests() -> None:
    """Write a line of JSON for each request to standard error."""
    if not requests_log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        requests_log.addHandler(handler)
    requests_log.propagate = False
    requests_log.setLevel(logging.INFO)
