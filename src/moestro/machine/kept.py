"""Rates of this machine, kept in the cache's folder under all that they depend on. Imports no torch.

What changes the rates changes the identity, and with it the file's name, so that they are measured anew. A file that is
damaged, or that another machine's name was given to, counts as none.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import RequestError, first_line
from ..planning.machine_file import machine_values, parse_machine
from ..planning.machines import THIS, Machine
from ..planning.rates import COUNTS, NEURONS, WIDE_NEURONS
from . import probe
from .folder import cache_folder

_DIGITS = 16
_LEVEL = "MOESTRO_LEVEL"


def identity(threads: int, gpu: probe.Gpu | None) -> dict[str, Any]:
    """All that this machine's rates depend on, as plain values."""
    return {
        "moestro": metadata.version("moestro"),
        "kernels": _kernels(),
        "measured": [*COUNTS, NEURONS, WIDE_NEURONS],
        "level": os.environ.get(_LEVEL, ""),
        "cpu": probe.cpu_model(),
        "cpu_features": hashlib.sha256(" ".join(sorted(probe.cpu_features())).encode()).hexdigest()[:_DIGITS],
        "threads": threads,
        "cpu_quota": probe.cpu_quota(),
        "ram_bytes": probe.total_ram_bytes(),
        "ram_limit_bytes": probe.ram_limit_bytes(),
        "gpu": None if gpu is None else gpu.name,
        "gpu_bytes": 0 if gpu is None else gpu.total_bytes,
        "driver": None if gpu is None else gpu.driver,
    }


def _kernels() -> list[Any]:
    """The file of compiled kernels: its name and size; empty without one."""
    found = find_spec("moestro.compute._kernels")
    if found is None or found.origin is None:
        return []
    return [Path(found.origin).name, Path(found.origin).stat().st_size]


def kept_machine(of: dict[str, Any]) -> Machine | None:
    """The machine whose rates were kept under an identity; None where none were, or its file is damaged."""
    try:
        values = json.loads(_file(of).read_text("utf-8"))
        if values["of"] != of or values["checksum"] != _checksum(values["machine"]):
            return None
        return replace(parse_machine(json.dumps(values["machine"])), name=THIS)
    except (OSError, ValueError, KeyError, TypeError, RequestError):
        return None


def keep_machine(machine: Machine, of: dict[str, Any]) -> Path:
    """Keep a machine under an identity; the file is there whole or not at all.

    Returns:
        The file.

    Raises:
        RequestError: it cannot be written.
    """
    path, values = _file(of), machine_values(machine)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w", encoding="utf-8") as file:
            json.dump({"of": of, "checksum": _checksum(values), "machine": values}, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise RequestError(
            f"the rates of this machine cannot be kept in {path.parent}: {first_line(error)}; MOESTRO_CACHE names "
            "another folder"
        ) from error
    return path


def _file(of: dict[str, Any]) -> Path:
    return cache_folder() / f"machine-{_checksum(of)}.json"


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:_DIGITS]
