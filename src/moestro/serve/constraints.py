"""What an answer must follow, for the engine: a JSON schema, a call of a tool, or an end of its thinking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError
from ..text.forced import forced_call
from ..text.generation import encode
from ..text.stream import decode
from .faults import Refused
from .requests import Constraint
from .service import Ready

_SEEN = 24  # tokens at the end of an answer in which a mark is found


def check_tools(ready: Ready, tools: Sequence[Any]) -> None:
    """Refuse tools that the model's family cannot call."""
    if tools and (ready.responses is None or not ready.responses.can_call):
        raise Refused(400, "the model's chat template has no tools that are known here; leave tools out", param="tools")


def call_constraints(
    ready: Ready, tools: Sequence[Any], name: str | None, n: int, prompt: Sequence[int]
) -> list[Constraint | None]:
    """What makes each of n answers a call of a tool, of the one with that name where one is given.

    Raises:
        Refused: there is no such tool, or this model's calls cannot be written as a grammar.
    """
    names = [tool["function"]["name"] for tool in tools]
    if not names:
        raise Refused(400, "tool_choice wants a call, but there are no tools", param="tool_choice")
    if name is not None and name not in names:
        raise Refused(400, f"tool_choice names {name!r}, which is not in tools", param="tool_choice")
    grammar = forced_call(ready.responses, tools, name, prompt)
    if grammar is None:
        line = "this model's tool calls cannot be forced; tool_choice must be 'auto' or 'none'"
        raise Refused(400, line, param="tool_choice")
    return following(ready, n, prompt, lark=grammar)


def following(
    ready: Ready, n: int, prompt: Sequence[int], *, schema: dict[str, Any] | None = None, lark: str | None = None
) -> list[Constraint | None]:
    """What makes each of n answers follow a schema or a grammar, or be any JSON object where neither is given."""
    raise RequestError("response_format is not supported yet")


def reasoning_budget(ready: Ready, tokens: int, prompt: Sequence[int]) -> list[Constraint | None]:
    """What ends an answer's thinking after so many tokens; empty where the model's thinking has no marks for it."""
    channels = None if ready.responses is None else ready.responses.channels
    if channels is None or not channels.marks:
        return []
    opened = channels.opening(prompt)
    return [_ReasoningBudget(ready.tokenizer, channels.marks, opened, tokens)]


class _ReasoningBudget:
    """Writes the mark that ends thinking when it was long enough.

    Args:
        marks: pairs of texts that begin and end it. opened: the one with which the prompt has begun it, or "".
    """

    def __init__(self, tokenizer: Any, marks: Sequence[tuple[str, str]], opened: str, tokens: int) -> None:
        self._tokenizer, self._left = tokenizer, tokens
        self._ends = dict(marks)
        self._end = self._ends.get(opened)  # of the thinking that goes on
        self._seen: list[int] = []
        self._forced: list[int] = []

    def mask(self, logits: Tensor) -> None:
        """As `Constraint` says."""
        if self._end is not None and self._left <= 0 and not self._forced:
            self._forced = [int(one) for one in encode(self._tokenizer, self._end, add_special_tokens=False)]
        if self._forced:
            kept = logits[self._forced[0]].clone()
            logits.fill_(-torch.inf)
            logits[self._forced[0]] = kept if bool(kept.isfinite()) else 0.0

    def accept(self, token: int) -> None:
        """As `Constraint` says."""
        self._seen = [*self._seen, token][-_SEEN:]
        if self._forced:
            self._forced.pop(0)
            if not self._forced:
                self._end, self._seen = None, []
            return
        text = decode(self._tokenizer, self._seen, skip_special_tokens=False)
        if self._end is not None:
            self._left -= 1
            if self._end.strip() in text:
                self._end, self._seen = None, []
            return
        for begin, end in self._ends.items():
            if begin.strip() in text:
                self._end, self._seen = end, []
                return
