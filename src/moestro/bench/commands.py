"""`moestro bench ...`: parses and prints, nothing else. Imports torch only inside a command."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from ..options import Json, Threads
from ..planning.shapes import SHAPES

KERNEL_SHAPES = tuple(name for name in SHAPES if name != "tiny")

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


@bench.command("kernels", epilog="Example: moestro bench kernels --shape olmoe-1b-7b --tokens 1 --rounds 3")
def bench_kernels(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"Only this shape; may be given several times. [default: {', '.join(KERNEL_SHAPES)}]",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Only so many tokens; may be given several times. "
            "[default: 1, 4, 16, 64, 256; beside kt-kernel 1, 4, 128; beside torch 16, 64, 256]",
            show_default=False,
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Rounds to take medians of.")] = 5,
    rivals: Annotated[
        bool, typer.Option("--rivals/--no-rivals", help="Also torch's linears and, if it is installed, kt-kernel.")
    ] = True,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time the CPU kernels at three models' shapes, beside this machine's read and FMA limits.

    Then beside kt-kernel, a whole MoE layer at 16 and 4 bits, and beside torch's linears, one expert in bf16 and fp32.
    """
    from .kernels import measure_kernels
    from .layers import measure_rivals, print_rivals

    shapes = shape or KERNEL_SHAPES
    beside = measure_rivals(shapes=shapes, tokens=tokens, rounds=rounds, threads=threads) if rivals else ()
    report = measure_kernels(shapes=shapes, tokens=tokens, rounds=rounds, threads=threads)
    if as_json:
        print(json.dumps(report.to_json() | {"rivals": [asdict(row) for row in beside]}))
        return
    report.print()
    if beside:
        print_rivals(beside)


@bench.command("decode", epilog="Example: moestro bench decode --shape olmoe-1b-7b --bits 4")
def bench_decode(
    shape: Annotated[str, typer.Option(metavar="NAME", help=f"One of {', '.join(SHAPES)}.")] = "olmoe-1b-7b",
    bits: Annotated[int, typer.Option(metavar="N", help="Bits of all weights: 16, 8 or 4.")] = 4,
    layers: Annotated[
        int | None, typer.Option(help="Cut the depth, to fit in RAM. [default: all]", show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Turns to take medians of.")] = 5,
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
