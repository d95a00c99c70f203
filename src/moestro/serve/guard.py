"""What a request must be before a route sees it: from an allowed host and origin, with the key, small, in time, JSON.

Why each: a name that an attacker's DNS points at this machine (Host), a page of another site in the user's browser
(Origin, and JSON, which no form can send), a client that holds a connection by sending slowly (time), memory (size).
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
from collections.abc import Collection
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..planning.spelling import spelled
from .faults import Refused, error_answer

_LOOPBACK_NAMES = ("localhost", "ip6-localhost")
_OPEN_PATHS = ("/", "/health")  # without a key; and what the page consists of
OPEN_FOLDER = "/page/"
# A name or address and perhaps a port. urlsplit alone would read more: localhost of "evil@localhost/path".
_HOST = re.compile(r"(?P<name>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")


class Guard:
    """Refuses what must not reach the routes.

    Args:
        host: that the server listens at. names: under which it may be reached besides.
        key: that requests carry; None for none.
        body_bytes, body_s: at most, of a request's body and until all of it is there.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str = "127.0.0.1",
        names: Collection[str] = (),
        key: str | None = None,
        body_bytes: int = 8 << 20,
        body_s: float = 30.0,
    ) -> None:
        self._app, self._key, self._body_bytes, self._body_s = app, key, body_bytes, body_s
        self._is_loopback = is_loopback(host)
        self._names = {name.lower() for name in (*names, host, *_LOOPBACK_NAMES)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
            body = _Body(receive, self._body_bytes, self._body_s)
            await self._app(scope, body, send)
        except Refused as refused:
            await error_answer(scope["path"], refused)(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if len(headers.getlist("host")) != 1:
            raise Refused(400, "the request needs one Host header")
        host = headers["host"]
        if not self._is_known(host):
            raise Refused(403, f"the host {host!r} is not one of this server's names; {spelled('allow_host')} adds one")
        origin = headers.get("origin")
        if origin is not None and _host_of(origin) != host.lower():
            raise Refused(403, f"a page of {origin!r} may not use this server; pages of its own may")
        path = scope["path"]
        is_open = path in _OPEN_PATHS or path.startswith(OPEN_FOLDER)
        if self._key is not None and not is_open and not self._has_key(headers):
            line = "the key is missing or wrong; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
            raise Refused(401, line, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        self._check_body(scope["method"], headers)

    def _check_body(self, method: str, headers: Headers) -> None:
        length = headers.get("content-length")
        if length is not None and "transfer-encoding" in headers:  # a proxy may see another end of the body
            line = "the request has both Content-Length and Transfer-Encoding; send one of them"
            raise Refused(400, line, headers={"Connection": "close"})
        if length is not None and length.isdigit() and int(length) > self._body_bytes:
            raise _too_large(self._body_bytes)
        encoding = headers.get("content-encoding", "identity")
        if encoding.strip().lower() not in ("identity", ""):
            raise Refused(415, f"the body is encoded as {encoding!r}; it must be sent as it is")
        if method == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise Refused(415, f"the body is {kind or 'of no type'}; it must be application/json")

    def _is_known(self, host: str) -> bool:
        parts = _HOST.fullmatch(host)
        if parts is None:
            return False
        name = parts["name"].strip("[]").lower()
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback if self._is_loopback else True  # an address is no name that could point elsewhere

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = [headers.get("x-api-key", ""), bearer.strip() if scheme.lower() == "bearer" else ""]
        wanted = (self._key or "").encode()
        equal = [hmac.compare_digest(one.encode("latin-1"), wanted) for one in given]  # both, in equal time
        return any(equal)


class _Body:
    """Receives a body of at most so many bytes within so many seconds; afterwards waits as long as it takes."""

    def __init__(self, receive: Receive, n_bytes: int, seconds: float) -> None:
        self._receive, self._left_bytes, self._limit_bytes = receive, n_bytes, n_bytes
        self._end_s, self._seconds, self._is_whole = monotonic() + seconds, seconds, False

    async def __call__(self) -> Message:
        if self._is_whole:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._end_s - monotonic()))
        except TimeoutError:
            line = f"the body was not there after {self._seconds:.0f} s"
            raise Refused(408, line, headers={"Connection": "close"}) from None
        if message["type"] == "http.request":
            self._left_bytes -= len(message.get("body", b""))
            if self._left_bytes < 0:
                raise _too_large(self._limit_bytes)
            self._is_whole = not message.get("more_body", False)
        return message


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() in _LOOPBACK_NAMES


def _host_of(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _too_large(n_bytes: int) -> Refused:
    return Refused(413, f"the body is larger than {n_bytes} bytes; send less", headers={"Connection": "close"})


def protocol(header_s: float, unread_s: float = 60.0, ahead_bytes: int = 64 << 10) -> Any:
    """uvicorn's HTTP protocol, which closes connections of clients that are too slow.

    Args:
        header_s: seconds until request line and headers must be there.
        unread_s: seconds for which a client may read nothing of what is there for it.
        ahead_bytes: at most, of requests that are sent before an answer is there.
    """
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class TimedProtocol(H11Protocol):
        """Counts from the connection's begin; between two requests uvicorn's own limit holds."""

        def connection_made(self, transport: Any) -> None:
            """As uvicorn's; the time begins."""
            super().connection_made(transport)
            self._stuck: asyncio.TimerHandle | None = None
            self._late = self.loop.call_later(header_s, self._close_if_late)

        def connection_lost(self, exc: Exception | None) -> None:
            """As uvicorn's; there is nothing to close any more."""
            self._late.cancel()
            self.resume_writing()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            """As uvicorn's; the time ends with the headers, and begins again with those of the next request."""
            was_between = self.cycle is None or self.cycle.response_complete
            super().data_received(data)
            self._read_on()
            is_between = self.cycle is None or self.cycle.response_complete
            if was_between and not is_between:
                self._late.cancel()
            elif is_between and self._late.cancelled():  # the begin of the next request's headers
                self._late = self.loop.call_later(header_s, self._close_if_late)

        def pause_writing(self) -> None:
            """As uvicorn's; a client that reads nothing for so long is left."""
            self._stuck = self._stuck or self.loop.call_later(unread_s, self.transport.abort)
            super().pause_writing()

        def resume_writing(self) -> None:
            """As uvicorn's; the client reads."""
            if self._stuck is not None:
                self._stuck.cancel()
                self._stuck = None
            super().resume_writing()

        def _read_on(self) -> None:
            """Read while a request is answered, or the end of the connection would not be seen behind another one."""
            if self.cycle is None or self.cycle.response_complete or self.conn.their_state is not h11.DONE:
                return
            if len(self.conn.trailing_data[0]) > ahead_bytes:
                self.transport.abort()
            else:
                self.flow.resume_reading()

        def _close_if_late(self) -> None:
            if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
                self.transport.close()
            self._late.cancel()

    return TimedProtocol
