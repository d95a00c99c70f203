"""Where each thread is among the steps of a model: which one it is in, and which layer ran last.

A call of the model announces its step by a hook, and another hook says when it is over. A call of `model.forward`, of
an inner module or of one layer announces nothing: there a step begins at the first layer that does not follow the last.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from typing import Any

from ..planning.contract import Phase

PREFILL_TOKENS = 16  # a step that adds more tokens than this to a sequence reads a prompt
BEFORE_LAYERS = -1
_NO_STEP = sys.maxsize  # so that no layer follows


class StepOfThread(threading.local):
    """The step that a thread is in."""

    phase = Phase.PREFILL
    is_announced = False  # then it lasts until `end`, in whatever order its layers come
    layer = _NO_STEP  # that ran last

    def begin(self, phase: Phase, *, announced: bool) -> None:
        """A step begins before its first layer."""
        self.phase, self.is_announced, self.layer = phase, announced, BEFORE_LAYERS

    def end(self) -> None:
        """It is over, or has failed: what comes next belongs to another one."""
        self.is_announced, self.layer = False, _NO_STEP

    def begins_at(self, layer: int) -> bool:
        """Whether a layer that is to run belongs to a step that has not begun."""
        return not self.is_announced and layer <= self.layer


def likely_phase(tokens: int) -> Phase:
    """What a step that nothing announced is taken for, by its tokens over all sequences."""
    return Phase.PREFILL if tokens > PREFILL_TOKENS else Phase.DECODE


def size_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """Sequences, and tokens of each, of a call of a Transformers model; one token where it cannot be seen."""
    given = kwargs.get("input_ids", args[0] if args else None)
    if given is None:
        given = kwargs.get("inputs_embeds")
    shape = tuple(getattr(given, "shape", ()))
    return (int(shape[0]), int(shape[1])) if len(shape) > 1 else (1, 1)
