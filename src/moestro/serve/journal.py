"""What a server writes down of its work: a line of JSON for each request, and figures for Prometheus.

Neither has texts of prompts, answers, keys or names of users.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

from fastapi import Request
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .requests import Finished
from .service import Service

requests_log = logging.getLogger("moestro.requests")
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"))
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STEP_SECONDS = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class Journal:
    """Counts and writes down requests.

    registry: the figures, for `prometheus_client`.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self.registry = CollectorRegistry()
        self.registry.register(_EngineFigures(service))
        more: dict[str, Any] = {"registry": self.registry}
        self._requests = Counter("moestro_http_requests", "HTTP requests", ["path", "status"], **more)
        self._first = Histogram(
            "moestro_first_token_seconds", "Seconds from a request to its first token", buckets=_SECONDS, **more
        )
        self._queued = Histogram("moestro_queued_seconds", "Seconds that a request waited", buckets=_SECONDS, **more)
        self._between = Histogram(
            "moestro_between_tokens_seconds", "Mean seconds between tokens of an answer", buckets=_STEP_SECONDS, **more
        )

    def noting(self, request: Request) -> Callable[[Finished], None]:
        """What is to be called with the end of each answer to a request."""

        def note(finished: Finished) -> None:
            request.state.ends = [*getattr(request.state, "ends", []), finished]
            if finished.reason not in ("stop", "length"):
                return
            self._queued.observe(finished.queued_s)
            self._first.observe(finished.queued_s + finished.prompt_s)
            if finished.completion_tokens > 1:
                self._between.observe(finished.decode_s / (finished.completion_tokens - 1))

        return note

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """Around an app: notes each request when its answer is over, and gives it a number, in X-Request-Id."""

        async def noted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            number, begun_s, status = f"req_{secrets.token_hex(8)}", perf_counter(), [0]
            scope.setdefault("state", {})

            async def sends(message: Message) -> None:
                if message["type"] == "http.response.start":
                    status[0] = message["status"]
                    message["headers"] = [*message["headers"], (b"x-request-id", number.encode())]
                await send(message)

            try:
                await app(scope, receive, sends)
            finally:
                self._note(scope, number, status[0], perf_counter() - begun_s)

        return noted

    def _note(self, scope: Scope, number: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None)  # a path of the client's could be any text
        self._requests.labels(route or "other", str(status)).inc()
        ends: list[Finished] = scope["state"].get("ends", [])
        line: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request": number,
            "method": scope["method"] if scope["method"] in _METHODS else "other",
            "path": route or "other",
            "status": status,
            "seconds": round(seconds, 4),
        }
        if ends:
            line["answers"] = [
                {
                    "reason": one.reason,
                    "prompt_tokens": one.prompt_tokens,
                    "cached_tokens": one.cached_tokens,
                    "completion_tokens": one.completion_tokens,
                    "queued_s": round(one.queued_s, 4),
                    "prompt_s": round(one.prompt_s, 4),
                    "decode_s": round(one.decode_s, 4),
                }
                for one in ends
            ]
        requests_log.info(json.dumps(line))


class _EngineFigures(Collector):
    """The engine's own counts, read when they are asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """All of them; none before there is an engine but whether it is ready."""
        is_ready = self._service.state == "ready"
        yield GaugeMetricFamily("moestro_ready", "Whether the model serves", value=float(is_ready))
        engine = self._service.engine
        if engine is None:
            return
        now = engine.progress()
        yield GaugeMetricFamily("moestro_requests_running", "Answers in the batch", value=now.running)
        yield GaugeMetricFamily("moestro_requests_waiting", "Requests that wait", value=now.waiting)
        yield GaugeMetricFamily("moestro_prefix_bytes", "Bytes of kept keys and values", value=now.kept_bytes)
        yield GaugeMetricFamily("moestro_kv_bytes", "Bytes of all rows' keys and values", value=engine.kv_bytes)
        yield CounterMetricFamily("moestro_steps", "Steps of the model", value=now.steps)
        yield CounterMetricFamily("moestro_prompt_tokens", "Tokens of prompts", value=now.prompt_tokens)
        yield CounterMetricFamily("moestro_cached_tokens", "Those that were not read again", value=now.cached_tokens)
        yield CounterMetricFamily("moestro_completion_tokens", "Tokens of answers", value=now.completion_tokens)
        ends = CounterMetricFamily("moestro_answers", "Answers that are over", labels=["reason"])
        for reason, count in now.finished.items():
            ends.add_metric([reason], count)
        yield ends
