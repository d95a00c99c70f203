"""`moestro doctor --report`: what an error report should say of a machine, and nothing of its user.

No path, prompt, user's or host's name is in it. Of Moestro's variables the names are, and values that are no paths.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata

from ..bench.machine_card import machine_card
from ..compute.cpu import levels
from ..errors import RequestError
from ..machine.probe import cpu_features
from ..planning.budget import format_bytes
from .envelope import PACKAGES, kernel_level

_MORE_PACKAGES = ("huggingface_hub", "safetensors", "tokenizers", "numpy", "triton", "gguf")
_NEVER_PATHS = ("MOESTRO_LEVEL", "MOESTRO_LOG")  # of others, which may be, the names alone are said


def report() -> dict[str, str]:
    """What was found, by what was looked for, in the order to print."""
    card = machine_card()
    gpu = "none that torch can use"
    if card["gpu"]:
        gpu = f"{card['gpu']}, {format_bytes(card['gpu_memory_bytes'])}, driver {card['driver'] or 'unknown'}"
    features = " ".join(sorted(cpu_features())) or "unknown"
    return {
        **{name: _version(name) for name in PACKAGES},
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        **{name: _version(name) for name in _MORE_PACKAGES},
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cpu": card["cpu"],
        "cores": f"{card['physical_cores']}, {card['logical_cpus']} logical",
        "cpu features": features,
        "expert kernels": _kernels(),
        "ram": f"{format_bytes(card['ram_bytes'])}, {format_bytes(card['ram_available_bytes'])} free for weights",
        "gpu": gpu,
        "settings": _settings() or "none",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _kernels() -> str:
    compiled = levels()
    if not compiled:
        return "none: built without a C++ compiler"
    try:
        chosen = kernel_level()
    except RequestError:  # which would say the value of the variable
        chosen = "none, since MOESTRO_LEVEL names one that does not run here"
    not_here = [name for name, is_here in compiled.items() if not is_here]
    return f"{chosen}; compiled: {', '.join(compiled)}; not on this CPU: {', '.join(not_here) or 'none'}"


def _settings() -> str:
    found = []
    for name in sorted(name for name in os.environ if name.startswith("MOESTRO_")):
        value = os.environ[name]
        is_word = name in _NEVER_PATHS and value.replace("_", "").isalnum()
        found.append(f"{name}={value}" if is_word else f"{name} is set")
    return ", ".join(found)
