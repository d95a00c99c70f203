"""What this machine has and what Moestro will use of it."""

from __future__ import annotations

import platform
from importlib import metadata

import torch
import transformers

from ..compute.cpu import best_level, core_cpus, levels
from ..machine.probe import available_ram_bytes, cpu_features, cpu_model, total_ram_bytes
from ..planning.budget import format_bytes
from ..planning.policies import DEFAULT_POLICY

# The instruction sets that matter to the expert kernels.
_FEATURES = ("f16c", "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16")


def examine() -> dict[str, str]:
    """What was found, by what was looked for, in the order to print."""
    features = cpu_features()
    return {
        "moestro": metadata.version("moestro"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": cpu_model(),
        "cpu features": " ".join(f for f in _FEATURES if f in features) or "unknown",
        "ram": f"{format_bytes(total_ram_bytes())}, {format_bytes(available_ram_bytes())} free for weights",
        "gpu": _gpu(),
        "expert kernels": _kernels(),
        "default policy": f"{DEFAULT_POLICY}: experts used most are cached on the GPU, the CPU runs the others",
    }


def _kernels() -> str:
    compiled = levels()
    if not compiled:
        return "plain torch: this package was built without a C++ compiler"
    others = [name for name, here in compiled.items() if not here]
    return f"{best_level()}, on {len(core_cpus())} threads" + (
        f" (not on this CPU: {', '.join(others)})" if others else ""
    )


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use; the dense part runs on the CPU too"
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    name = torch.cuda.get_device_name()
    return f"{name}, {format_bytes(total_bytes)}, {format_bytes(free_bytes)} free; runs the dense part"
