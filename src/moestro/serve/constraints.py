"""What an answer must follow, for the engine: a JSON schema, a call of a tool, or an end of its thinking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError
from ..text.channels import Splitter
from ..text.forced import forced_call
from ..text.generation import encode
from ..text.stream import decode
from .faults import Refused
from .grammar import GrammarConstraint, GrammarRefused
from .requests import Constraint
from .schemas import MOST_CHARACTERS, check_schema
from .service import Ready
from .thinking import Thinking

_LONGEST_GRAMMAR = 4 * MOST_CHARACTERS  # characters, of the grammar of a forced call
_SEEN = 24  # tokens at the end of an answer in which a mark is found


def check_tools(ready: Ready, tools: Sequence[Any]) -> None:
    """Refuse tools that the model's family cannot call."""
    if tools and (ready.responses is None or not ready.responses.can_call):
        raise Refused(400, "the model's chat template has no tools that are known here; leave tools out", param="tools")


def call_constraints(
    ready: Ready,
    tools: Sequence[Any],
    name: str | None,
    n: int,
    prompt: Sequence[int],
    *,
    thinking_tokens: int | None = None,
) -> list[Constraint | None]:
    """What makes each of n answers a call of a tool, of the one with that name where one is given.

    Args:
        thinking_tokens: as in `following`.

    Raises:
        Refused: there is no such tool, or this model's calls, or its tools' schemas, cannot be written as a grammar.
    """
    names = [tool["function"]["name"] for tool in tools]
    if not names:
        raise Refused(400, "tool_choice wants a call, but there are no tools", param="tool_choice")
    if name is not None and name not in names:
        raise Refused(400, f"tool_choice names {name!r}, which is not in tools", param="tool_choice")
    try:
        grammar = forced_call(ready.responses, tools, name, prompt)
    except (TypeError, AttributeError, ValueError, KeyError, RecursionError) as error:
        line = "the parameters of a tool are no JSON schema that a call can follow; mend them, or leave tool_choice out"
        raise Refused(400, line, param="tools") from error
    if grammar is None:
        line = "this model's tool calls cannot be forced; tool_choice must be 'auto' or 'none'"
        raise Refused(400, line, param="tool_choice")
    if len(grammar) > _LONGEST_GRAMMAR:
        line = (
            f"the tools' schemas make a grammar of {len(grammar)} characters; at most {_LONGEST_GRAMMAR} are followed"
        )
        raise Refused(400, f"{line}; offer fewer tools, or leave tool_choice out", param="tools")
    return following(ready, n, prompt, lark=grammar, thinking_tokens=thinking_tokens)


def following(
    ready: Ready,
    n: int,
    prompt: Sequence[int],
    *,
    schema: dict[str, Any] | None = None,
    lark: str | None = None,
    thinking_tokens: int | None = None,
) -> list[Constraint | None]:
    """What makes each of n answers follow a schema or a grammar, or be any JSON object where neither is given.

    Before a schema's value, a model whose family thinks aloud may think.

    Args:
        lark: in llguidance's dialect, of the whole answer, with what is thought before.
        thinking_tokens: after so many tokens thinking is ended; None for no limit.

    Raises:
        RequestError: llguidance is missing, or it cannot follow this; one line that says what is not supported.
    """
    if schema is not None:
        check_schema(schema)
    thinking = None if lark is not None else _thinking(ready, prompt, thinking_tokens != 0)
    start = thinking.before() if thinking is not None else lark or ""
    others = {"answer": {"type": "object"} if schema is None else schema} if lark is None else {}
    found: list[Constraint | None] = []
    for _ in range(n):
        try:
            grammar = GrammarConstraint(ready.grammars.matcher(start, others), thinking)
        except GrammarRefused as error:
            raise RequestError(f"the {'schema' if lark is None else 'grammar'} cannot be followed: {error}") from error
        budget = [] if thinking_tokens is None else reasoning_budget(ready, thinking_tokens, prompt)
        if thinking_tokens and not budget:
            raise RequestError("this model's thinking cannot be cut; leave its budget out")
        found.append(_Both(budget[0], grammar) if budget and budget[0] is not None else grammar)
    return found


def _thinking(ready: Ready, prompt: Sequence[int], is_wanted: bool) -> Thinking:
    """How this model thinks aloud after a prompt.

    Raises:
        RequestError: the prompt has begun something else than the model's marks know.
    """
    channels = None if ready.responses is None else ready.responses.channels
    if channels is None:
        return Thinking()
    opened = channels.opening(prompt)
    tokens = ready.grammars.special_tokens()
    if channels.is_harmony:
        if opened.strip() != "<|start|>assistant":
            raise RequestError("the chat template begins the answer in a channel, in which no grammar can be followed")
        return Thinking(tokens=tokens, is_harmony=True)
    marks = channels.marks
    if not marks:  # the tokenizer brings a template of its own
        if Splitter(channels, opened).has_reasoned:
            raise RequestError(
                "the chat template begins with thinking whose end is not known; no grammar can follow it"
            )
        return Thinking()
    before = decode(ready.tokenizer, prompt[-_SEEN:], skip_special_tokens=False).rstrip()
    has_thought = any(before.endswith(end.strip()) for _, end in marks)
    return Thinking(marks, tokens, opened, is_wanted and not has_thought)


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

    thinking = None

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
        if self._forced and token == self._forced[0]:
            self._forced.pop(0)
            if not self._forced:
                self._end, self._seen = None, []
            return
        self._forced = []  # a grammar had it finish a character first
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


class _Both:
    """A budget for thinking, as far as the grammar lets it end, and the grammar."""

    def __init__(self, budget: Constraint, grammar: Constraint) -> None:
        self._budget, self._grammar, self.thinking = budget, grammar, grammar.thinking

    def mask(self, logits: Tensor) -> None:
        """As `Constraint` says."""
        self._grammar.mask(logits)
        wanted = logits.clone()
        self._budget.mask(wanted)
        wanted[logits.isneginf()] = -torch.inf
        if not bool(wanted.isneginf().all()):
            logits.copy_(wanted)

    def accept(self, token: int) -> None:
        """As `Constraint` says."""
        self._budget.accept(token)
        self._grammar.accept(token)
