"""Moestro: Mixture-of-Experts models larger than the GPU's memory, conducted expert by expert.

    >>> import moestro
    >>> model = moestro.load("demo")  # or "mistralai/Mixtral-8x7B-Instruct-v0.1", gpu_memory="12GiB"
    >>> tokenizer = moestro.load_tokenizer("demo")
    >>> model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=4).shape
    torch.Size([1, 8])

The names below are loaded when they are first used, so that `moestro --help` imports no torch.

The environment variable MOESTRO_LOG (DEBUG, INFO, WARNING, ERROR or CRITICAL) says from which level on the logger
"moestro" writes lines to standard error: see `moestro.logs`. Prompts and generated text are not logged.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# torch's idle threads would otherwise spin for milliseconds on the cores that our own pool needs: decode of
# OLMoE's shape at 4 bits took 1.6 x as long. Read when torch is first imported; a user's own choice stays.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if TYPE_CHECKING:
    from .errors import MoestroError
    from .loading.config import MoestroConfig
    from .loading.load import load, load_tokenizer

_HOMES = {
    "MoestroConfig": "moestro.loading.plug",  # which registers what the config needs
    "MoestroError": "moestro.errors",
    "load": "moestro.loading.load",
    "load_tokenizer": "moestro.loading.load",
}

__all__ = ["MoestroConfig", "MoestroError", "__version__", "load", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moestro' has no attribute {name!r}")
    from .logs import set_up_logging

    set_up_logging()
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
