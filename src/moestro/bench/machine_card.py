"""Describe a machine and a checkout: hardware, versions, commit."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ..compute.cpu import core_cpus
from ..machine.probe import available_ram_bytes, cpu_model, total_ram_bytes
from .process import finish

GIB = 1 << 30
QUERY_LIMIT_S = 20.0


def machine_card() -> dict[str, Any]:
    """Hardware and versions; a value is None where the machine has no such part. Sizes are in bytes."""
    card: dict[str, Any] = {
        "cpu": cpu_model(),
        "physical_cores": len(core_cpus()),
        "logical_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_bytes": total_ram_bytes(),
        "ram_available_bytes": available_ram_bytes(),
        "gpu": None,
        "gpu_memory_bytes": None,
        "driver": None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
    }
    if torch.cuda.is_available():
        properties: Any = torch.cuda.get_device_properties(0)
        card |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "driver": _driver()}
    return card


def card_lines(machine: dict[str, Any], commit: str | None) -> Iterator[tuple[str, str]]:
    """A card and a commit as (label, text), a line each."""
    yield "CPU", f"{machine['cpu']}, {machine['physical_cores']} cores ({machine['logical_cpus']} logical)"
    yield "RAM", f"{machine['ram_bytes'] / GIB:.1f} GiB, {machine['ram_available_bytes'] / GIB:.1f} available"
    if machine["gpu"]:
        gpu = f"{machine['gpu']}, {machine['gpu_memory_bytes'] / GIB:.1f} GiB"
        yield "GPU", f"{gpu}, driver {machine['driver'] or 'unknown: nvidia-smi did not say'}"
    else:
        yield "GPU", "no CUDA device"
    names = ("python", "torch", "transformers", "triton")
    yield "versions", ", ".join(f"{name} {machine[name] or 'not installed'}" for name in names)
    yield "commit", commit or "unknown: no git checkout with a commit here"


def git_commit() -> str | None:
    """The commit, with "-dirty" when files differ from it; None outside a checkout."""
    with suppress(FileNotFoundError):  # no git here
        head = finish(["git", "rev-parse", "--verify", "HEAD"], QUERY_LIMIT_S)
        if head.code == 0:
            changes = finish(["git", "status", "--porcelain", "--untracked-files=no"], QUERY_LIMIT_S)
            return head.out.strip() + ("-dirty" if changes.out.strip() or changes.code else "")
    return None


def _driver() -> str | None:
    with suppress(FileNotFoundError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = finish(query, QUERY_LIMIT_S)
        if done.code == 0 and done.out.strip():
            return done.out.splitlines()[0].strip()
    return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def slug(name: str) -> str:
    """A device's name for a file: "Intel(R) Xeon(R) CPU @ 2.00GHz" becomes "intel-xeon"."""
    plain = re.sub(r"\((r|tm)\)|\bcpu\b|@.*", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "unknown"
