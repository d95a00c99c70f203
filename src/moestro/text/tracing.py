"""Records what a loaded model's routers choose, and what the next gates guess, as a trace (simulate/trace.py).

    >>> with listening(model) as listener:
    ...     ids = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4)
    >>> listener.trace(model, "demo", None).tokens(Phase.PREFILL)
    3

It only listens: policy, tokens and speed of a device are as without it, but for the time that guessing takes. Layers
are then no longer computed in one call (decode/cpu/stretch.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..decode.capture import cache_for
from ..errors import RequestError
from ..loading.context import model_context
from ..planning.contract import Outcome, Phase, Step, StepInfo
from ..planning.spelling import spelled
from ..simulate.trace import Pass, Trace
from .generation import check_ids, embedding_rows, encode

LOOKAHEAD = 3


class TraceListener:
    """Collects the passes of a model."""

    def __init__(self, lookahead: int = LOOKAHEAD) -> None:
        self.lookahead = lookahead
        self.top_k = 0
        self._passes: list[Pass] = []
        self._steps: list[Step] = []
        self._tokens, self._phase = 0, Phase.PREFILL

    def begin(self, info: StepInfo) -> None:
        self._end()
        self._tokens, self._phase = info.tokens, info.phase

    def asked(self, step: Step, top_k: int) -> None:
        self.top_k = max(self.top_k, top_k)
        self._steps.append(step)

    def done(self, outcome: Outcome) -> None:
        """Of no interest here: a trace is what was asked for, not what was done."""

    def _end(self) -> None:
        if self._steps:
            self._passes.append(Pass(self._phase, self._tokens, tuple(self._steps)))
        self._steps = []

    def trace(self, model: Any, name: str, text: str | None) -> Trace:
        """The trace of all steps so far, of a text or of no text."""
        self._end()
        conductor = model.moestro
        return Trace(
            model=name,
            spec=conductor.spec,
            top_k=self.top_k,
            text_sha256=None if text is None else hashlib.sha256(text.encode()).hexdigest(),
            passes=tuple(self._passes),
            lookahead=self.lookahead,
            agreement=tuple(None if gate is None else gate.agreement for gate in conductor.gates),
        )


@contextmanager
def listening(model: Any, lookahead: int = LOOKAHEAD) -> Iterator[TraceListener]:
    """Listen to a loaded model."""
    listener = TraceListener(lookahead)
    model.moestro.listener = listener
    try:
        yield listener
    finally:
        model.moestro.listener = None


def trace_text(model: Any, tokenizer: Any, name: str, text: str, **pieces: int) -> Trace:
    """As `trace_ids`, of a text."""
    ids = encode(tokenizer, text)
    check_ids(tokenizer, ids, embedding_rows(model))
    return trace_ids(model, name, ids, text, **pieces)


def trace_ids(
    model: Any,
    name: str,
    ids: Tensor,
    text: str | None = None,
    *,
    tokens: int,
    prompt_tokens: int,
    decode_tokens: int,
    lookahead: int = LOOKAHEAD,
) -> Trace:
    """Record a model that reads tokens as `read_pieces` gives them.

    Args:
        ids: int64 [tokens], those of `text` if it has one.
        lookahead: for how many later layers gates guess.

    Raises:
        RequestError: too few tokens, or a piece that is longer than the model's context.
    """
    with listening(model, lookahead) as listener:
        pieces = {"tokens": tokens, "prompt_tokens": prompt_tokens, "decode_tokens": decode_tokens}
        for _ in read_pieces(model, ids.to(model.device), **pieces):
            pass
    return listener.trace(model, name, text)


@torch.no_grad()
def read_pieces(
    model: Any, ids: Tensor, *, tokens: int, prompt_tokens: int, decode_tokens: int
) -> Iterator[tuple[Phase, int, float]]:
    """Let a model read tokens as prompts, each followed by decode steps that are given the next tokens.

    Args:
        ids: int64 [tokens], where the model is.
        tokens: decode steps in all, at most. prompt_tokens, decode_tokens: of each piece.

    Yields:
        For each step its phase, its tokens, and its seconds on the conductor's clock.

    Raises:
        RequestError: too few tokens, or a piece that is longer than the model's context.
    """
    context = model_context(model.config)
    piece = prompt_tokens + decode_tokens
    if context is not None and piece > context:
        names = f"{spelled('prompt_tokens')} and {spelled('decode_tokens')}"
        raise RequestError(f"{names} are {piece}, more than the context of {context}")
    if len(ids) <= prompt_tokens:
        raise RequestError(f"the text has {len(ids)} tokens, but a prompt takes {prompt_tokens}; give a longer one")
    clock, done = model.moestro.time, 0
    for start in range(0, len(ids) - prompt_tokens, piece):
        cache = cache_for(model, None, piece) or DynamicCache(config=model.config)
        at = start + prompt_tokens
        end = min(at + decode_tokens, at + tokens - done, len(ids))
        for span in [slice(start, at), *(slice(i, i + 1) for i in range(at, end))]:
            begun_s = clock.now_s
            logits = model(input_ids=ids[None, span], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            logits[0, -1, 0].item()  # the step is over when a GPU has its result
            is_prompt = span.start == start
            yield Phase.PREFILL if is_prompt else Phase.DECODE, span.stop - span.start, clock.now_s - begun_s
        done += end - at
        if done >= tokens:
            return
