"""`moestro machine`: what this machine can do, measured once and kept, as text or as a file for `--machine`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from ..console import print_table
from ..errors import RequestError
from ..planning.budget import format_bytes
from ..planning.machine_file import machine_values
from ..planning.machines import Machine, machine_named, named_machines
from ..planning.options import Options
from ..planning.rates import NEURONS, WIDE_LEAST, WIDE_NEURONS
from ..progress import Bar, quiet
from .envelope import print_json
from .options import Json, takes_options, unset
from .terminal import say


@takes_options(only=("threads",))
def machine(
    options: Options,
    output: Annotated[str | None, unset("FILE", "Write what --machine FILE reads.", "no", "--output", "-o")] = None,
    anew: Annotated[bool, typer.Option("--anew", help="Measure again what was kept.")] = False,
    names: Annotated[bool, typer.Option("--list", help="List the machines that --machine knows by name.")] = False,
    as_json: Json = False,
) -> None:
    """Measure this machine's rates in under 20 seconds, keep them, and print them.

    They are measured again where the CPU, the driver, the GPU, threads, limits or Moestro's version change.
    """
    if names:
        _list_machines(as_json)
        return
    from ..text.files import writable

    target = None if output is None else writable(output)
    from ..compute.cpu import core_cpus
    from ..loading.measure_machine import this_card

    with quiet(as_json), measuring_bar() as on_progress:
        found = this_card(options.threads or len(core_cpus()), anew=anew, on_progress=on_progress)
    values = machine_values(found)
    if target is not None:
        try:
            target.write_text(json.dumps(values, indent=1) + "\n", "utf-8")
        except OSError as error:
            raise RequestError(f"{target} cannot be written: {error.strerror}") from error
        say(f"machine {target}: moestro plan MODEL --machine {target} plans for it anywhere")
    if as_json:
        print_json({name: value for name, value in values.items() if name != "schema"})  # which every line has
    elif target is None:
        print_machine(found)


def _list_machines(as_json: bool) -> None:
    found = [machine_named(name) for name in named_machines()]
    if as_json:
        print_json({"machines": [machine_values(one) for one in found]})
        return
    width = max(len(one.name) for one in found)
    for one in found:
        print(f"{one.name:<{width}}  {one.text}")
    print(f"{'this':<{width}}  this machine, as moestro machine measures it")


@contextmanager
def measuring_bar(title: str = "measuring this machine") -> Iterator[Callable[[str, float], None]]:
    """A bar of how much of this machine, or of what the title says, is measured."""
    with Bar(title, 1.0) as bar:

        def on_progress(what: str, share: float) -> None:
            bar.reach(share)
            if share >= 1:
                bar.close()

        yield on_progress


def print_machine(found: Machine) -> None:
    """The rates as a user reads them."""
    costs, rates = found.costs, found.rates
    assert rates is not None
    print(found.text)
    print(f"memory     {format_bytes(found.ram_bytes)} of RAM, read at {costs.cpu_gbps:.1f} GB/s")
    print(f"products   {costs.cpu_gflops:.0f} GFLOP/s in float32")
    _line("disk", [(costs.disk_gbps, "{:.2f} GB/s")])
    link = [(costs.link_gbps, "{:.1f} GB/s alone"), (rates.link_beside_cpu_gbps, "{:.1f} beside the CPU")]
    link.append((costs.cpu_beside_link_gbps if costs.link_gbps else None, "which then reads {:.1f} GB/s"))
    _line("link", link)
    _line("GPU", [(costs.gpu_gbps, "{:.0f} GB/s"), (costs.gpu_gflops, "{:.0f} GFLOP/s")])
    print(
        f"attention  {rates.attention_gbps:.1f} GB/s of cache, {rates.attention_gflops:.0f} GFLOP/s of a prompt; "
        f"plain {rates.plain_attention_gbps:.1f} GB/s, {rates.plain_attention_gflops:.0f} GFLOP/s"
    )
    print(
        f"beside     {rates.step_us:.0f} us a step, {rates.layer_us:.0f} us a layer, "
        f"{rates.plain_layer_us:.0f} us a layer with plain attention, "
        f"{rates.prompt_ns:.1f} ns a token, layer and column of a prompt"
    )
    tables = {
        f"experts of {NEURONS} neurons": rates.experts,
        f"experts of {WIDE_NEURONS} neurons": rates.wide_experts,
        "dense": rates.dense,
    }
    for name, curves in tables.items():
        print(f"{name}: GB/s of packed weights, by tokens that each meets")
        least = WIDE_LEAST if curves is rates.wide_experts else 1  # with fewer tokens they are as the others
        counts = [str(tokens) for tokens, _ in curves[0].points if tokens >= least]
        rows = [(one.format, *(f"{gbps:.2f}" for tokens, gbps in one.points if tokens >= least)) for one in curves]
        print_table(("format", *counts), rows)


def _line(label: str, parts: list[tuple[Any, str]]) -> None:
    """A line of what was measured; nothing where nothing was."""
    if said := [text.format(value) for value, text in parts if value is not None]:
        print(f"{label:<9}  {', '.join(said)}")
