"""`moestro bench ...`: parses and prints, nothing else. Imports torch only inside a command."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..options import Json, Threads

bench = typer.Typer(help="Measure this machine and Moestro on it.", no_args_is_help=True, rich_markup_mode=None)


@bench.command("load", epilog="Example: moestro bench load --size 2GiB")
def bench_load(
    size: Annotated[str, typer.Option(help="Bytes of experts in the checkpoint that is made for it.")] = "2GiB",
    as_json: Json = False,
) -> None:
    """Load a checkpoint that is made on the spot and watch the process's memory every 10 ms."""
    from ..planning.budget import parse_bytes
    from .loading import measure_load

    report = measure_load(parse_bytes(size, "--size"))
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        print(report)
    if not report.within_limit:
        raise typer.Exit(1)


@bench.command("kernels", epilog="Example: moestro bench kernels --rounds 3")
def bench_kernels(
    rounds: Annotated[int, typer.Option(help="Rounds to take medians of.")] = 5,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time the CPU kernels at three models' shapes, beside this machine's read and FMA limits."""
    from .kernels import measure_kernels

    report = measure_kernels(rounds=rounds, threads=threads)
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        report.print()
