"""This machine's few rates that a policy reckons with when no `--machine` is named: kept ones, or measured quickly.

About a second; `moestro machine` measures more, and keeps it. A rate measured alone lies where CPU and link share the
RAM, so the CPU's rate beside the link is taken as what remains of its own.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from ..compute.cpu import core_cpus, fma_gflops, levels, read_limit_gbps
from ..devices import Device, make_device
from ..memory.store import map_memory
from ..planning.machine_file import machine_of
from ..planning.machines import THIS, Machine, costs_of
from .kept import identity, kept_machine
from .probe import available_ram_bytes, last_level_cache_bytes, nvidia_gpu, total_ram_bytes

_READ_BYTES = 256 * 2**20  # or more, where the CPU's caches would hold much of it
_LINK_BYTES = 256 * 2**20
_MATRIX = 4096


def machine_by_name(name: str) -> Machine:
    """A machine of the table of `planning.machines`, or of a file; "this" is measured, with its GPU if it has one.

    Raises:
        RequestError: there is none of that name, or the file is none.
    """
    return this_machine(make_device("auto")) if name == THIS else machine_of(name)


def this_machine(device: Device, threads: int | None = None) -> Machine:
    """This machine with a device: a GPU, a pretended one (whose link has its pace), or none."""
    with torch.device("cpu"):  # models are built under `torch.device("meta")`
        return _measured(device, threads or len(core_cpus()))


def _measured(device: Device, threads: int) -> Machine:
    ram_bytes, kept = total_ram_bytes(), kept_machine(identity(threads, nvidia_gpu()))
    if kept is not None and kept.costs.gpu_gbps and device.accelerator is not None and not device.is_pretended:
        return kept
    if kept is not None and kept.costs.cpu_gbps and kept.costs.cpu_gflops:
        cpu_gbps, cpu_gflops = kept.costs.cpu_gbps, kept.costs.cpu_gflops
    else:
        cpu_gbps, cpu_gflops = _cpu_rates(threads)
    if (accelerator := device.accelerator) is None:
        return Machine(THIS, "this machine, no GPU", 0, ram_bytes, costs_of(cpu_gbps=cpu_gbps, cpu_gflops=cpu_gflops))
    if device.is_pretended:  # it computes on the CPU, at its rate
        gpu_gbps, gpu_gflops, link_gbps = cpu_gbps, cpu_gflops, accelerator.link.gbps or cpu_gbps
    else:
        gpu_gbps, gpu_gflops, link_gbps = gpu_rates(device.torch_device)
    costs = costs_of(
        cpu_gbps=cpu_gbps, link_gbps=link_gbps, gpu_gbps=gpu_gbps, cpu_gflops=cpu_gflops, gpu_gflops=gpu_gflops
    )
    what = "this machine with a pretended GPU" if device.is_pretended else device.card_name
    return Machine(THIS, what, device.memory_bytes(), ram_bytes, costs)


@functools.cache
def _cpu_rates(threads: int) -> tuple[float, float]:
    """GB/s that the CPU reads, GFLOP/s that it multiplies in float32."""
    size_bytes = min(max(_READ_BYTES, 3 * last_level_cache_bytes()), available_ram_bytes() // 4) // 64 * 64
    memory = map_memory(size_bytes).fill_(1).view(torch.float32)
    if not any(levels().values()):  # no kernels here: torch's own sum and product
        start_s = time.perf_counter()
        memory.sum()
        gbps = size_bytes / (time.perf_counter() - start_s) / 1e9
        return gbps, _product_gflops(torch.device("cpu"), torch.float32, 1024)
    return max(read_limit_gbps(memory, threads) for _ in range(2)), fma_gflops(threads)


@functools.cache
def gpu_rates(device: torch.device) -> tuple[float, float, float]:
    """GB/s of the GPU's memory, GFLOP/s of 16-bit products, GB/s of the link from pinned memory."""
    pinned = torch.empty(_LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(pinned, device=device)
    link_gbps = _LINK_BYTES / _seconds(lambda: target.copy_(pinned, non_blocking=True)) / 1e9
    memory_gbps = 2 * _LINK_BYTES / _seconds(lambda: target.clone()) / 1e9  # read and written
    return memory_gbps, _product_gflops(device, torch.float16, _MATRIX), link_gbps


def _product_gflops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    a = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / _seconds(lambda: a @ a) / 1e9


def _seconds(work: Callable[[], torch.Tensor]) -> float:
    """Of the quickest of a few, its result being there."""
    times = []
    for _ in range(4):
        start_s = time.perf_counter()
        work().view(-1)[:1].cpu()
        times.append(time.perf_counter() - start_s)
    return min(times)
