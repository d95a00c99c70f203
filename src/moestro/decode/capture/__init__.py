"""A decode step captured once and replayed: graph, experts, graph, experts.

For accelerators; on the CPU, `decode/cpu/` is its way. Transformers' code runs once for each shape of a step, under
capture. Where it calls our experts function the graph ends, since what happens there is decided anew each time, and
the next one begins when that returns. A replay copies the step's inputs into the captured ones and gives
back copies of the captured outputs.

Decides which steps are captured: 1 to 16 tokens over all sequences, with a static cache, the second time that such a
step comes. All else runs as before, and what turns out not to be capturable does so after one line of the log. Does not
know how a device captures; `devices/graphs.py` does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...devices.graphs import Graphs
from .cache import StepCache
from .capture import Capture, CaptureFigures, current_capture
from .step import CapturedSteps, can_capture


def capture_steps(model: Any, graphs: Graphs) -> None:
    """Have a loaded model's decode steps captured."""
    model.forward = CapturedSteps(model, graphs)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.disable_compile = True  # which Transformers does by itself for a static cache on a GPU


def cache_for(model: Any, cache: Any, tokens: int, sequences: int = 1) -> Any:
    """A cache for so many tokens of each sequence.

    The given one, made longer where it has a size; one of a fixed size for a model whose steps are captured; else None,
    for Transformers' own. None is larger than the GPU's memory was planned for, unless it has to be.
    """
    plan = model.moestro.gpu_plan
    most = None if plan is None else plan.context // sequences
    if isinstance(cache, StepCache):
        if tokens > cache.tokens and isinstance(model.forward, CapturedSteps):
            model.forward.forget_cache(cache)  # what was captured with it holds its memory
        cache.grow(tokens, most)
    elif cache is None and isinstance(model.forward, CapturedSteps):
        return model.forward.new_cache(tokens, most)
    return cache


def forget_steps(model: Any) -> None:
    """Forget what was captured with the conductor that a model had."""
    if isinstance(model.forward, CapturedSteps):
        model.forward.forget()


def figures_of(model: Any) -> CaptureFigures | None:
    """What a model's captures cost and save so far; None where its steps are not captured."""
    return replace(model.forward.figures) if isinstance(model.forward, CapturedSteps) else None


__all__ = [
    "Capture",
    "CaptureFigures",
    "CapturedSteps",
    "StepCache",
    "cache_for",
    "can_capture",
    "capture_steps",
    "current_capture",
    "figures_of",
    "forget_steps",
]
