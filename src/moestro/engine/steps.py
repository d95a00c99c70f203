"""What a step of a model is, and where each thread is among the steps: which one it is in, and which layer ran last.

A call of the model announces its step by a hook, and another hook says when it is over. A call of `model.forward`, of
an inner module or of one layer announces nothing: there a step begins at the first layer that does not follow the last.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from ..planning.contract import Phase, StepInfo

PREFILL_TOKENS = 16  # a row that gets more tokens than this reads a prompt
BEFORE_LAYERS = -1
_NO_STEP = sys.maxsize  # so that no layer follows


class StepOfThread(threading.local):
    """The step that a thread is in."""

    info = StepInfo((), ())
    phase = Phase.PREFILL  # of the info, which each layer asks for
    is_announced = False  # then it lasts until `end`, in whatever order its layers come
    layer = _NO_STEP  # that ran last

    def begin(self, info: StepInfo, *, announced: bool) -> None:
        """A step begins before its first layer."""
        self.info, self.phase, self.is_announced, self.layer = info, info.phase, announced, BEFORE_LAYERS

    def end(self) -> None:
        """The step is over, or has failed: the next layer belongs to another one."""
        self.is_announced, self.layer = False, _NO_STEP

    def begins_at(self, layer: int) -> bool:
        """Whether a layer that is to run belongs to a step that has not begun."""
        return not self.is_announced and layer <= self.layer


def begin_step(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Forward pre-hook: tell the model's conductor that a step begins."""
    model.moestro.begin(step_info(args, kwargs, model.moestro.device.stream_id()))


def end_step(model: Any, args: Any, output: Any) -> None:
    """Forward hook: tell the model's conductor that the step is over."""
    model.moestro.end()


def step_info(args: tuple[Any, ...], kwargs: Mapping[str, Any], stream: int = 0) -> StepInfo:
    """What a call of a Transformers model reads, from its arguments.

    Rows are the first dimension of the token ids [rows, tokens]; a cache that is empty or absent means a prompt. Where
    rows lie one behind the other in a single one (continuous batching), `cu_seq_lens_q` says where each begins and
    `position_ids` how much of it came before: there a row extends its sequence if it has one token, which is not its
    first.
    """
    if (ends := kwargs.get("cu_seq_lens_q")) is not None and (places := kwargs.get("position_ids")) is not None:
        counts = [stop - start for start, stop in pairwise(ends.tolist())]
        firsts = places.flatten()[ends[:-1].clamp(max=places.numel() - 1)].tolist()
        rows = [(n, n > 1 or first == 0) for n, first in zip(counts, firsts, strict=True) if n]  # the others fill up
        return StepInfo(
            tuple(n if is_prompt else 0 for n, is_prompt in rows),
            tuple(0 if is_prompt else n for n, is_prompt in rows),
            stream,
        )
    sequences, count = size_of(args, kwargs)
    cache = kwargs.get("past_key_values")
    reads_prompt = cache is None or cache.get_seq_length() == 0 or count > PREFILL_TOKENS
    return StepInfo.alike(Phase.PREFILL if reads_prompt else Phase.DECODE, count, sequences, stream)


def likely_info(tokens: int, stream: int = 0) -> StepInfo:
    """What a step that nothing announced is taken for, by its tokens over all rows."""
    return StepInfo.alike(Phase.PREFILL if tokens > PREFILL_TOKENS else Phase.DECODE, tokens, stream=stream)


def size_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """Rows, and tokens of each, of a call of a Transformers model; one token where it cannot be seen."""
    given = kwargs.get("input_ids", args[0] if args else None)
    if given is None:
        given = kwargs.get("inputs_embeds")
    shape = tuple(getattr(given, "shape", ()))
    return (int(shape[0]), int(shape[1])) if len(shape) > 1 else (1, 1)
