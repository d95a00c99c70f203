"""Machines as data: what the papers' hardware and common cards can do, with sources (machines.json).

    >>> round(machine_named("rtx4090").costs.link_gbps, 1)
    25.2

A rate is a peak from a data sheet times the share of it that good code reaches. While the link copies, the CPU has
what the RAM gives beyond that: both read the same memory, and the link keeps its rate.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import RequestError
from .costs import Costs

THIS = "this"  # measured, by machine/measure.py
_LEAST_BESIDE = 0.1  # of what the CPU reads alone, however fast the link is


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine: capacities in bytes, and its rates."""

    name: str
    text: str
    gpu_bytes: int
    ram_bytes: int
    costs: Costs


def machine_names() -> list[str]:
    """Names that `--machine` takes."""
    return [*_profiles()[1], THIS]


def machine_named(name: str) -> Machine:
    """The machine of that name from machines.json.

    Raises:
        RequestError: there is none; lists those there are.
    """
    reached, machines = _profiles()
    if name not in machines:
        raise RequestError(f"no machine {name!r}; there are: {', '.join(machine_names())}")
    found = machines[name]
    generation = next(share for key, (share, _) in reached["link"].items() if found["link"].startswith(key))
    return Machine(
        name=name,
        text=f"{found['gpu']}; {found['cpu']}; {found['ram_gib']:g} GiB RAM; {found['link']}",
        gpu_bytes=int(found["gpu_memory_gib"] * 2**30),
        ram_bytes=int(found["ram_gib"] * 2**30),
        costs=costs_of(
            cpu_gbps=found["dram_peak_gbps"] * reached["dram"][0],
            link_gbps=found["link_peak_gbps"] * generation,
            gpu_gbps=found["gpu_peak_gbps"] * reached["gpu_memory"][0],
            cpu_gflops=found["cpu_peak_gflops"] * reached["cpu_compute"][0],
            gpu_gflops=found["gpu_peak_tflops"] * 1e3 * reached["gpu_compute"][0],
            disk_gbps=found["disk_peak_gbps"] * reached["disk"][0],
        ),
    )


def costs_of(
    *,
    cpu_gbps: float,
    link_gbps: float | None = None,
    gpu_gbps: float | None = None,
    cpu_gflops: float | None = None,
    gpu_gflops: float | None = None,
    disk_gbps: float | None = None,
    cpu_beside_link_gbps: float | None = None,
) -> Costs:
    """Rates with what the CPU reads beside a busy link, if that was not measured."""
    beside = cpu_beside_link_gbps or max(cpu_gbps - (link_gbps or 0.0), _LEAST_BESIDE * cpu_gbps)
    return Costs(cpu_gbps, link_gbps, gpu_gbps, beside, cpu_gflops, gpu_gflops, disk_gbps)


@cache
def _profiles() -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    data = json.loads(Path(__file__).with_name("machines.json").read_text())
    return data["reached"], {machine["name"]: machine for machine in data["machines"]}
