"""Machines as data: what the papers' hardware and common cards can do, with sources (machines.json).

    >>> round(machine_named("rtx4090").costs.link_gbps, 1)
    25.2

A rate is a peak from a data sheet times the share of it that good code reaches. While the link copies, the CPU has
what the RAM gives beyond that: both read the same memory, and the link keeps its rate.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import RequestError
from .costs import Costs
from .rates import Rates, assumed_rates

_UNLIMITED = 1e9  # where a rate is not known
THIS = "this"  # measured, by machine/measure.py
_LEAST_BESIDE = 0.1  # of what the CPU reads alone, however fast the link is


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine: capacities in bytes, and its rates.

    rates: what was measured of its CPU beside `costs`; None of a data sheet or a class.
    """

    name: str
    text: str
    gpu_bytes: int
    ram_bytes: int
    costs: Costs
    rates: Rates | None = None

    @property
    def cpu_rates(self) -> Rates:
        """Those that were measured, or those of a CPU of this speed."""
        gbps, gflops = self.costs.cpu_gbps or _UNLIMITED, self.costs.cpu_gflops or _UNLIMITED
        return self.rates or assumed_rates(gbps, gflops)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Machine:
        """From the values of all fields, as `dataclasses.asdict` makes them and JSON keeps them."""
        costs, rates = values["costs"], values["rates"]
        points = tuple((tokens, gbps) for tokens, gbps in costs["cpu_points"])
        return cls(
            **{
                **values,
                "costs": Costs(**{**costs, "cpu_points": points}),
                "rates": None if rates is None else Rates.from_values(rates),
            }
        )


def machine_names() -> list[str]:
    """Names that `--machine` takes."""
    return [*named_machines(), THIS]


def named_machines() -> list[str]:
    """Names of the machines of machines.json."""
    return list(_profiles()[1])


def no_machine(name: str) -> str:
    """A line that there is none of that name, with those there are."""
    return (
        f"no machine {name!r}; there are: {', '.join(machine_names())}, and files that moestro machine -o FILE writes"
    )


def machine_named(name: str) -> Machine:
    """The machine of that name from machines.json.

    Raises:
        RequestError: there is none; lists those there are.
    """
    reached, machines = _profiles()
    if name not in machines:
        raise RequestError(no_machine(name))
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


def assumed_machine(
    cpu: str,
    cores: int,
    features: Collection[str],
    ram_bytes: int,
    gpu: str | None = None,
    gpu_bytes: int = 0,
) -> Machine:
    """A machine whose rates were not measured: by the class of its CPU and the name of its GPU.

    Args:
        cpu, features: its CPU's own name and instruction sets. cores: physical ones.
        gpu, gpu_bytes: its GPU's name, if it has one, and memory.
    """
    is_server = any(name in cpu for name in ("Xeon", "EPYC", "Graviton", "Neoverse", "Ampere"))
    kind = "server" if is_server else "Apple" if cpu.startswith("Apple") else "desktop or laptop"
    core_gbps, most_gbps = _CLASSES[kind]
    wide = any(name.startswith("avx512") for name in features)
    rates: dict[str, float] = {
        "cpu_gbps": min(cores * core_gbps, most_gbps),
        "cpu_gflops": cores * (_WIDE_GFLOPS if wide else _GFLOPS),
        "disk_gbps": _DISK_GBPS,
    }
    what = f"{cpu}, {cores} cores, rates of its class ({kind})"
    if gpu is not None:
        rates |= _gpu_rates(gpu)
        what += f"; {gpu}, rates by its name"
    return Machine(THIS, what, gpu_bytes, ram_bytes, costs_of(**rates))


# GB/s that a core reads and that a machine reads at most, by class: two cores of a server read 20 to 26 (docs/log.md);
# a desktop has two channels of DDR4 or DDR5, of which three quarters are reached. Assumptions.
_CLASSES = {"server": (11.0, 160.0), "desktop or laptop": (14.0, 50.0), "Apple": (20.0, 90.0)}
_WIDE_GFLOPS, _GFLOPS = 110.0, 60.0  # float32, of a core with AVX-512 and of another
_DISK_GBPS = 2.0
_ANY_GPU = {"gpu_gbps": 300.0, "gpu_gflops": 15e3, "link_gbps": 12.0}  # where the table has no card of that name


def _gpu_rates(name: str) -> dict[str, float]:
    """Of the first machine in the table whose card that is."""
    words = name.replace("NVIDIA", "").replace("GeForce", "").split()
    for one in _profiles()[1]:
        title = str(_profiles()[1][one]["gpu"])
        if words and f" {' '.join(words[:2])} " in f" {title} ".replace("GeForce ", ""):
            costs = machine_named(one).costs
            found = {"gpu_gbps": costs.gpu_gbps, "gpu_gflops": costs.gpu_gflops, "link_gbps": costs.link_gbps}
            return {key: value for key, value in found.items() if value}
    return dict(_ANY_GPU)


@cache
def _profiles() -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    data = json.loads(Path(__file__).with_name("machines.json").read_bytes())
    return data["reached"], {machine["name"]: machine for machine in data["machines"]}
