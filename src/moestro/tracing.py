"""Records what a loaded model's routers choose, and what the next gates guess, as a trace (planning/trace.py).

    with recording(model) as recorder:
        model.generate(...)
    recorder.trace(model, "demo", text).save(Path("demo.trace"))

It only listens: policy, tokens and speed of a device are as without it, but for the time that guessing takes. Layers
are then no longer computed in one call (fuse/stretch.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache

from .errors import RequestError
from .generation import encode
from .planning.contract import Phase, Step
from .planning.trace import Pass, Trace

LOOKAHEAD = 3
_LEAST_GUESSES = 8  # kept of each gate's, or twice as many as it will choose


class Recorder:
    """Collects the passes of a model."""

    def __init__(self, lookahead: int = LOOKAHEAD) -> None:
        self.lookahead = lookahead
        self.top_k = 0
        self._passes: list[Pass] = []
        self._steps: list[Step] = []
        self._tokens, self._phase = 0, Phase.PREFILL

    def begin(self, tokens: int, phase: Phase) -> None:
        self._end()
        self._tokens, self._phase = tokens, phase

    def record(self, step: Step, top_k: int) -> None:
        self.top_k = max(self.top_k, top_k)
        most = max(_LEAST_GUESSES, 2 * top_k)
        kept = {layer: dict(list(guesses.items())[:most]) for layer, guesses in step.guesses.items()}
        self._steps.append(step._replace(guesses=kept))

    def _end(self) -> None:
        if self._steps:
            self._passes.append(Pass(self._phase, self._tokens, tuple(self._steps)))
        self._steps = []

    def trace(self, model: Any, name: str, text: str) -> Trace:
        """What was recorded so far."""
        self._end()
        conductor = model.moestro
        return Trace(
            model=name,
            spec=conductor.spec,
            top_k=self.top_k,
            text_sha256=hashlib.sha256(text.encode()).hexdigest(),
            passes=tuple(self._passes),
            lookahead=self.lookahead,
            agreement=tuple(None if gate is None else gate.agreement for gate in conductor.gates),
        )


@contextmanager
def recording(model: Any) -> Iterator[Recorder]:
    """Listen to a loaded model."""
    recorder = Recorder()
    model.moestro.recorder = recorder
    try:
        yield recorder
    finally:
        model.moestro.recorder = None


@torch.no_grad()
def trace_text(
    model: Any, tokenizer: Any, name: str, text: str, *, tokens: int, prompt_tokens: int, decode_tokens: int
) -> Trace:
    """Read a text as prompts, each followed by decode steps that are given the text's own next tokens.

    Args:
        tokens: decode steps in all, at most. prompt_tokens, decode_tokens: of each piece of the text.

    Raises:
        RequestError: the text is too short, or a piece is longer than the model's context.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    piece = prompt_tokens + decode_tokens
    if context and piece > context:
        raise RequestError(f"--prompt-tokens and --decode-tokens are {piece}, more than the context of {context}")
    ids = encode(tokenizer, text).to(model.device)
    if len(ids) <= prompt_tokens:
        raise RequestError(
            f"the text has {len(ids)} tokens, but a prompt alone takes {prompt_tokens}; give a longer one"
        )
    done = 0
    with recording(model) as recorder:
        for start in range(0, len(ids) - prompt_tokens, piece):
            cache = DynamicCache(config=model.config)
            at = start + prompt_tokens
            model(input_ids=ids[None, start:at], past_key_values=cache, use_cache=True)
            for token in ids[at : min(at + decode_tokens, at + tokens - done)]:
                model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True)
                done += 1
            if done >= tokens:
                break
    return recorder.trace(model, name, text)
