"""Measures all of this machine's rates that a plan needs, in under 20 seconds, and keeps them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

from ..devices import make_device
from ..machine.disk_rate import measure_disk
from ..machine.folder import cache_folder
from ..machine.kept import identity, keep_machine, kept_machine
from ..machine.kernel_rates import KernelRates, measure_kernel_rates, plausible_weights
from ..machine.link_rates import LinkRates, measure_link
from ..machine.measure import gpu_rates
from ..machine.probe import cpu_model, last_level_cache_bytes, nvidia_gpu, total_ram_bytes
from ..planning.machines import THIS, Machine, costs_of
from ..planning.rates import Rates
from .step_times import StepTimes, measure_step_times

Progress = Callable[[str, float], None]  # what is measured now, and which share of all is done
_PARTS = {"kernels": 0.7, "steps": 0.2, "disk": 0.05, "link": 0.05}  # of the time, about
_FLUSHED_BYTES = 64 * 2**20  # or more, where the caches are larger


def this_card(threads: int, *, anew: bool = False, on_progress: Progress = lambda what, share: None) -> Machine:
    """This machine with its rates: those that were kept, where nothing that they depend on has changed.

    Args:
        anew: measure them whatever was kept.

    Raises:
        RequestError: there are no kernels to measure, or the rates cannot be kept.
    """
    of = identity(threads, nvidia_gpu())
    found = None if anew else kept_machine(of)
    if found is not None:
        return found
    machine = measure_machine(threads, on_progress)
    keep_machine(machine, of)
    return machine


def measure_machine(threads: int, on_progress: Progress = lambda what, share: None) -> Machine:
    """Measure this machine, with its GPU if it has one.

    Raises:
        RequestError: there are no kernels to measure.
    """
    done = 0.0

    def part(name: str) -> Callable[[float], None]:
        return lambda share: on_progress(name, done + share * _PARTS[name])

    on_progress("kernels", 0.0)
    kernels = measure_kernel_rates(threads, on_progress=part("kernels"))
    done += _PARTS["kernels"]
    steps = _step_times(threads, part("steps"))
    done += _PARTS["steps"]
    on_progress("disk", done)
    disk_gbps = measure_disk(cache_folder())
    done += _PARTS["disk"]
    on_progress("link", done)
    device = make_device("auto")
    try:
        link = measure_link(device, threads)
        of_gpu = None if link is None else gpu_rates(device.torch_device)[:2]
        card = nvidia_gpu()
        gpu_bytes = device.memory_bytes() if card is None else card.total_bytes
    finally:
        device.close()
    on_progress("link", 1.0)
    text = _text(threads, "no GPU" if link is None else device.card_name)
    return machine_of_rates(text, kernels, steps, disk_gbps, link, of_gpu, gpu_bytes)


def measure_cpu(threads: int, formats: Sequence[str]) -> Machine:
    """This machine's CPU alone, with these formats, in a few seconds; nothing is kept.

    Raises:
        RequestError: there are no kernels to measure.
    """
    kernels, steps = measure_kernel_rates(threads, formats=formats), _step_times(threads)
    return machine_of_rates(_text(threads, "no GPU"), kernels, steps, None, None, None, 0)


def _step_times(threads: int, on_progress: Callable[[float], None] = lambda share: None) -> StepTimes:
    flushed = plausible_weights(max(_FLUSHED_BYTES, 2 * last_level_cache_bytes()))
    return measure_step_times(threads, flushed, on_progress)


def _text(threads: int, gpu: str) -> str:
    return f"{cpu_model()}, {threads} threads; {gpu}; measured {time.strftime('%Y-%m-%d')}"


def machine_of_rates(
    text: str,
    kernels: KernelRates,
    steps: StepTimes,
    disk_gbps: float | None,
    link: LinkRates | None,
    of_gpu: tuple[float, float] | None,
    gpu_bytes: int,
) -> Machine:
    """A machine from all that was measured of it.

    Args:
        of_gpu: GB/s of its memory, and GFLOP/s.
    """
    gpu_gbps, gpu_gflops = of_gpu or (None, None)
    costs = costs_of(
        cpu_gbps=kernels.cpu_gbps,
        cpu_gflops=kernels.cpu_gflops,
        link_gbps=None if link is None else link.link_gbps,
        cpu_beside_link_gbps=None if link is None else min(link.cpu_beside_link_gbps, kernels.cpu_gbps),
        gpu_gbps=gpu_gbps,
        gpu_gflops=gpu_gflops,
        disk_gbps=disk_gbps,
    )
    rates = Rates(
        kernels.experts,
        kernels.wide_experts,
        kernels.dense,
        kernels.attention_gbps,
        kernels.attention_gflops,
        kernels.plain_attention_gbps,
        kernels.plain_attention_gflops,
        **asdict(steps),
        link_beside_cpu_gbps=None if link is None else link.link_beside_cpu_gbps,
    )
    return Machine(THIS, text, gpu_bytes, total_ram_bytes(), costs, rates)
