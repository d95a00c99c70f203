"""A hub for tests on a port of this machine, with the answers of the real one that huggingface_hub relies on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from time import sleep
from typing import Any

PAGE = b"<html>Please log in to this network</html>"


@dataclass
class Repo:
    """A repository and how it misbehaves.

    says: status and X-Error-Code of every answer; resolve_says: of files alone.
    sizes: what the listing says instead of a file's true size.
    gives: at most so many bytes a request of a file's contents, then the connection is cut; None for all.
    """

    files: dict[str, bytes]
    revision: str = "main"
    says: tuple[int, str] | None = None
    resolve_says: tuple[int, str] | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    gives: int | None = None
    listing: bytes | None = None
    contents: bytes | None = None
    ranges: bool = True
    silent: bool = False

    @property
    def commit(self) -> str:
        """A hash of all contents."""
        of_all = hashlib.sha1()
        for path, data in sorted(self.files.items()):
            of_all.update(f"{path} {len(data)} ".encode() + data)
        return of_all.hexdigest()

    def info(self, name: str) -> str:
        """What the hub's listing says."""
        files = [
            {
                "rfilename": path,
                "size": self.sizes.get(path, len(data)),
                "blobId": hashlib.sha1(data).hexdigest(),
                "lfs": {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130},
            }
            for path, data in self.files.items()
        ]
        return json.dumps({"id": name, "modelId": name, "sha": self.commit, "siblings": files, "tags": []})


@dataclass
class Hub:
    """Repositories by their names, and the requests that came: (method, path, range), and (path, authorization)."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    tokens: list[tuple[str, str]] = field(default_factory=list)

    def fetched(self) -> list[str]:
        """Names of the contents that were asked for."""
        return [path for method, path, _ in self.requests if method == "GET" and path.startswith("/cdn/")]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.split("?")[0]
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        self.hub.tokens.append((path, self.headers.get("Authorization", "")))
        if listing := re.fullmatch(r"/api/models/(.+)/revision/([^/]+)", path):
            repo = self.hub.repos.get(listing[1])
            if repo is not None and repo.silent:
                sleep(5)
            elif repo is None:
                self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
            elif repo.says is not None:
                self._send(repo.says[0], b"", {"X-Error-Code": repo.says[1]})
            elif listing[2] not in (repo.revision, repo.commit):
                self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            else:
                self._send(200, repo.listing or repo.info(listing[1]).encode(), {"Content-Type": "application/json"})
        elif file := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo = self.hub.repos[file[1]]
            data = repo.files.get(file[3])
            if repo.resolve_says is not None:
                self._send(repo.resolve_says[0], b"", {"X-Error-Code": repo.resolve_says[1]})
            elif data is None:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.commit})
            else:
                headers = {
                    "Location": f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{file[1]}/{file[3]}",
                    "X-Repo-Commit": repo.commit,
                    "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
                    "X-Linked-Size": str(len(data)),
                }
                self._send(302, b"", headers)
        elif contents := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            self._send_contents(self.hub.repos[contents[1]], contents[2])

    def _send_contents(self, repo: Repo, name: str) -> None:
        if repo.contents is not None:
            self._send(200, repo.contents, {})
            return
        data, asked = repo.files[name], re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or not repo.ranges:
            self._send(200, data, {}, repo.gives)
            return
        start, stop = int(asked[1]), int(asked[2] or len(data) - 1) + 1
        piece = data[start:stop]
        where = {"Content-Range": f"bytes {start}-{start + len(piece) - 1}/{len(data)}"}
        self._send(206, piece, where, repo.gives)

    def _send(self, status: int, body: bytes, headers: dict[str, str], gives: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with suppress(ConnectionError):  # a client may have had enough
                self.wfile.write(body[:gives])
        if gives is not None and gives < len(body):
            self.close_connection = True


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A hub that listens until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def run_python(hub: Hub, home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, whose hub is this one and whose cache is in `home`."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
    hub_is = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DOWNLOAD_TIMEOUT": "2", "HF_HUB_ETAG_TIMEOUT": "2"}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env=kept | hub_is | {"COLUMNS": "200", "HOME": str(home)} | environment,
    )
