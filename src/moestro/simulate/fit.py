"""Whether a machine of numbers holds a model at all: a speed of one that it does not hold would be of no use.

>>> from moestro.planning.machines import machine_named
>>> from moestro.planning.shapes import spec_of_shape
>>> print(shortfall(spec_of_shape("deepseek-v3"), machine_named("rtx4090")).in_words())
does not fit: dense weights need 31.9 GiB, but rtx4090 has 24.0 GiB of GPU memory; name a machine with more
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..planning.budget import format_bytes
from ..planning.contract import ModelSpec
from ..planning.machines import Machine
from ..planning.spelling import spelled
from .virtual import RAM_SHARE


@dataclass(frozen=True, slots=True)
class Shortfall:
    """What a model needs and a machine does not have. what, there, remedy: in words."""

    what: str
    there: str
    remedy: str
    needed_bytes: int
    there_bytes: int

    def in_words(self) -> str:
        """One line."""
        needed = format_bytes(self.needed_bytes)
        return f"does not fit: {self.what} need {needed}, but {self.there}; {self.remedy}"

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {"why": self.in_words(), "needed_bytes": self.needed_bytes, "there_bytes": self.there_bytes}


def shortfall(spec: ModelSpec, machine: Machine, gpu_bytes: int | None = None) -> Shortfall | None:
    """What a model lacks on a machine; None where GPU and RAM together hold it.

    Args:
        gpu_bytes: the GPU memory that may be used; None for all that the machine has.
    """
    has_gpu = bool(machine.costs.gpu_gbps)
    gpu = 0 if not has_gpu else machine.gpu_bytes if gpu_bytes is None else min(gpu_bytes, machine.gpu_bytes)
    if has_gpu and spec.dense_bytes > gpu:
        there = f"{machine.name} has {format_bytes(gpu)} of GPU memory"
        return Shortfall("dense weights", there, f"name a {spelled('machine')} with more", spec.dense_bytes, gpu)
    there_bytes, needed_bytes = gpu + int(machine.ram_bytes * RAM_SHARE), spec.dense_bytes + spec.expert_bytes
    if needed_bytes <= there_bytes:
        return None
    parts = [f"{format_bytes(gpu)} on the GPU"] * has_gpu + [
        f"{RAM_SHARE:g} of {format_bytes(machine.ram_bytes)} of RAM"
    ]
    there = f"{machine.name} has {format_bytes(there_bytes)} for them ({', '.join(parts)})"
    remedy = f"take fewer {spelled('bits')}, or a {spelled('machine')} with more memory"
    return Shortfall("dense weights and experts", there, remedy, needed_bytes, there_bytes)
