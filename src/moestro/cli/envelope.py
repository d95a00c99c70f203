"""The line that `--json` prints last: a command's own keys, then what it was made by. Imports no torch.

Beside the command's keys there are `schema`, `versions`, `kernel_level`, `model_revision` and `options`: docs/json.md
says what they hold. A command's own keys never have these names.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

SCHEMA = 1  # raised when a key of any command goes or changes its meaning
PACKAGES = ("moestro", "torch", "transformers")
_TAKEN: ContextVar[Mapping[str, Any]] = ContextVar("taken", default=MappingProxyType({}))


def take(options: Mapping[str, Any]) -> None:
    """Remember the options of the command that is called, as they are after their checks."""
    _TAKEN.set(options)


def print_json(
    values: Mapping[str, Any], model: str | None = None, revision: str | None = None, **settled: Any
) -> None:
    """Print a command's values and what they were made by as one line of JSON.

    Args:
        model, revision: as the user named them, where the command was about a model.
        settled: options whose value came from the model or the machine, as it was used. What is no option of the
            command is left out.
    """
    print(json.dumps({**values, **_made_by(model, revision, settled)}))


def _made_by(model: str | None, revision: str | None, settled: Mapping[str, Any]) -> dict[str, Any]:
    from importlib import metadata  # these wait, since --help answers at once

    from ..loading.hub import commit_of

    taken = dict(_TAKEN.get())
    defaults = {"threads": _threads, "device": _device}
    for name, value in taken.items():
        if name in settled:
            taken[name] = settled[name]
        elif name in defaults and value in (None, "auto"):
            taken[name] = defaults[name]()
    return {
        "schema": SCHEMA,
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES},
        "kernel_level": kernel_level(),
        "model_revision": None if model is None else commit_of(model, revision),
        "options": taken,
    }


def kernel_level() -> str:
    """The level that the CPU's kernels run at; "torch" without kernels.

    Raises:
        RequestError: this CPU does not run the level that MOESTRO_LEVEL names.
    """
    try:
        from ..compute import _kernels
    except ImportError:
        return "torch"
    try:
        return _kernels.best_level()
    except ValueError:
        from ..compute.cpu import best_level

        return best_level()  # which says in one line what there is


def _threads() -> int:
    from ..machine.probe import physical_cores

    loaded: Any = sys.modules.get("moestro.compute.cpu")  # which may use fewer cores than there are
    return physical_cores() if loaded is None else len(loaded.core_cpus())


def _device() -> str:
    torch: Any = sys.modules.get("torch")
    return "cuda" if torch is not None and torch.cuda.is_available() else "cpu"
