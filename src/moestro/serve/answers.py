"""The answers to one request of a client, as they come: n of them, each told apart into its parts.

async for at, event in Answers(ready, requests): ...      # event: Said, or Finished
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from .requests import Finished, Piece, Request, TokenLogprobs
from .service import Ready

if TYPE_CHECKING:
    from ..text.responses import Part, Responses


@dataclass(frozen=True, slots=True)
class Said:
    """More of an answer: parts that became final, and the tokens' logarithms that came with them."""

    parts: tuple[Part, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


Event = Said | Finished


class _Reader(Protocol):
    is_reasoning: bool

    def feed(self, text: str, token_ids: Sequence[int]) -> list[Part]:
        """Take a piece of text; return the parts that became final with it."""

    def end(self) -> list[Part]:
        """The rest, at the end of the answer."""


def _reader(formats: Responses | None, request: Request, tools: Sequence[Any]) -> _Reader:
    if request.constraint is not None and request.constraint.thinking is not None:
        from .behind import BehindThinking

        return BehindThinking(request.constraint.thinking)
    from ..text.responses import ResponseReader

    return ResponseReader(formats, request.prompt, tools)


class Answers:
    """The n answers to a prompt. For one event loop. To be closed, or the engine goes on though no client reads.

    Args:
        requests: one for each answer, all with the same prompt.
        tools: that the answer may call, as the chat template was given them.
        has_one_call: whether an answer ends with its first call.
        is_plain: whether the text is one part, whatever it marks.
        on_end: called with the end of each answer.

    Raises:
        As `Engine.submit`; then none of them is submitted.
    """

    def __init__(
        self,
        ready: Ready,
        requests: Sequence[Request],
        *,
        tools: Sequence[Any] = (),
        has_one_call: bool = False,
        is_plain: bool = False,
        on_end: Callable[[Finished], None] = lambda finished: None,
    ) -> None:
        loop, self._changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(self._changed.set)

        formats = None if is_plain else ready.responses
        self._readers = [_reader(formats, one, tools) for one in requests]
        self._tickets: list[Any] = []
        self.reasoning_tokens = [0] * len(requests)
        self._has_one_call, self._called = has_one_call, set[int]()
        self._on_end = on_end
        try:
            for request in requests:
                self._tickets.append(ready.engine.submit(request, wake))
        except BaseException:
            for ticket in self._tickets:
                ticket.cancel()
            raise
        self._left = set(range(len(self._tickets)))

    def __len__(self) -> int:
        return len(self._tickets)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        left = self._left
        while left:
            await self._changed.wait()
            self._changed.clear()
            for at in sorted(left):
                for event in self._tickets[at].take():
                    if isinstance(event, Finished):
                        left.discard(at)
                        self._on_end(event)
                        if at not in self._called and (rest := self._cut(at, self._readers[at].end())):
                            yield at, Said(rest, ())
                        yield at, replace(event, reason="stop") if at in self._called else event
                    elif at not in self._called:
                        yield at, self._said(at, event)

    def close(self) -> None:
        """Cancel what is not over."""
        for at in self._left:
            self._tickets[at].cancel()
            self._on_end(Finished("cancelled", 0))
        self._left.clear()

    def _said(self, at: int, piece: Piece) -> Said:
        reader = self._readers[at]
        parts = self._cut(at, reader.feed(piece.text, piece.token_ids)) if piece.text else ()
        if reader.is_reasoning:
            self.reasoning_tokens[at] += len(piece.token_ids)
        return Said(parts, piece.token_ids, piece.logprobs or ())

    def _cut(self, at: int, parts: Sequence[Part]) -> tuple[Part, ...]:
        """The parts up to the first call, where that ends the answer."""
        calls = [index for index, part in enumerate(parts) if part.kind == "tool_call"]
        if not self._has_one_call or not calls:
            return tuple(parts)
        self._called.add(at)
        self._tickets[at].cancel()
        return tuple(parts[: calls[0] + 1])
