"""A decode step recorded once and replayed: graph, experts, graph, experts.

For accelerators; on the CPU, `decode/cpu/` is its way. Transformers' code runs once for each shape of a step, under
recording. Where it calls our experts function the graph ends, since what happens there is decided anew each time, and
the next one begins when that returns. A replay copies the step's inputs into the recorded ones and gives
back copies of the recorded outputs.

Decides which steps are recorded: 1 to 8 tokens over all sequences, with a static cache, the second time that such a
step comes. All else runs as before, and what turns out not to be recordable does so after one line of the log. Does not
know how a device records; `devices/graphs.py` does.

    record_steps(model, graphs)      # model.generate(..., cache_implementation="static") then replays
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...devices.graphs import Graphs
from .cache import StepCache
from .recording import Recording, TapeFigures, current_recording
from .step import StepTape


def record_steps(model: Any, graphs: Graphs) -> None:
    """Have a loaded model's decode steps recorded."""
    model.forward = StepTape(model, graphs)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.disable_compile = True  # which Transformers does by itself for a static cache on a GPU


def cache_for(model: Any, cache: Any, tokens: int, sequences: int = 1) -> Any:
    """A cache for so many tokens of each sequence.

    The given one, made longer where it has a size; one of a fixed size for a model whose steps are recorded; else None,
    for Transformers' own. None is larger than the GPU's memory was planned for, unless it has to be.
    """
    plan = model.moestro.gpu_plan
    most = None if plan is None else plan.context // sequences
    if isinstance(cache, StepCache):
        if tokens > cache.tokens and isinstance(model.forward, StepTape):
            model.forward.forget_cache(cache)  # what was recorded with it holds its memory
        cache.grow(tokens, most)
    elif cache is None and isinstance(model.forward, StepTape):
        return model.forward.new_cache(tokens, most)
    return cache


def forget_steps(model: Any) -> None:
    """Forget what was recorded with the conductor that a model had."""
    if isinstance(model.forward, StepTape):
        model.forward.forget()


def figures_of(model: Any) -> TapeFigures | None:
    """What a model's recordings cost and save so far; None where its steps are not recorded."""
    return replace(model.forward.figures) if isinstance(model.forward, StepTape) else None


__all__ = [
    "Recording",
    "StepCache",
    "StepTape",
    "TapeFigures",
    "cache_for",
    "current_recording",
    "figures_of",
    "forget_steps",
    "record_steps",
]
