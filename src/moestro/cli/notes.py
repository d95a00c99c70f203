"""What a user should know of a loaded model before it answers, in a line each on standard error."""

from __future__ import annotations

from typing import Any

from ..compute.cpu import levels
from ..loading.context import model_context
from ..text.choices import without_effect
from ..text.options import TextOptions
from .terminal import say


def say_without_effect(text: TextOptions, model: Any) -> None:
    """Warn of options of a request for text that change nothing with this model."""
    for line in without_effect(text, model.generation_config):
        say(f"warning: {line}")


def settled_by(model: Any) -> dict[str, Any]:
    """What a loaded model made of options that leave something to it or to the machine, by their names."""
    conductor = model.moestro
    plan = conductor.gpu_plan
    return {
        "threads": conductor.cpu.threads,
        "device": conductor.device.name,
        "policy": conductor.policy.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "context": model_context(model.config) if plan is None else plan.context,
    }


def say_kernels() -> None:
    """Warn where the CPU's kernels are missing, and say how to get them."""
    if not levels():
        say(
            "warning: this Moestro was installed without its CPU kernels, and plain torch is several times slower; "
            "install a C++ compiler (g++ or clang), then Moestro again, with pip's --force-reinstall --no-cache-dir "
            "--no-deps"
        )
