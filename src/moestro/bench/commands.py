"""`moestro bench ...`: parses and prints, nothing else. Imports torch only inside a command."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..options import Json, Threads
from ..planning.shapes import SHAPES

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


@bench.command("decode", epilog="Example: moestro bench decode --shape olmoe-1b-7b --bits 4")
def bench_decode(
    shape: Annotated[str, typer.Option(metavar="NAME", help=f"One of {', '.join(SHAPES)}.")] = "olmoe-1b-7b",
    bits: Annotated[int, typer.Option(metavar="N", help="Bits of all weights: 16, 8 or 4.")] = 4,
    layers: Annotated[
        int | None, typer.Option(help="Cut the depth, to fit in RAM. [default: all]", show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option(help="Turns to take medians of.")] = 5,
    threads: Threads = None,
    alone: Annotated[bool, typer.Option(help="Also Transformers alone, in bfloat16.")] = True,
    as_json: Json = False,
) -> None:
    """Time a whole random-weight model beside Transformers alone and, if it is installed, llama.cpp."""
    from .decode import measure_decode

    report = measure_decode(shape, bits, layers=layers, rounds=rounds, threads=threads, alone=alone)
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        report.print()
