"""`moestro bench plan`: parses and prints, nothing else."""

from __future__ import annotations

from typing import Annotated

import typer

from ..bench.options import ShapeOptions
from ..planning.option import bits_in
from ..planning.options import BITS, Options
from ..progress import quiet
from .machine import measuring_bar
from .options import Json, takes_options, unset
from .terminal import show


@takes_options(only=("shapes", "threads"))
def bench_plan(
    measured: ShapeOptions,
    options: Options,
    bits: Annotated[
        list[int] | None, unset("N", "Only so many bits of a weight; may be given several times.", "16, 8, 4")
    ] = None,
    layers: Annotated[int | None, unset("N", "Cut the depth to so many layers.", "a few", min=1)] = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Rounds to take medians of.")] = 3,
    anew: Annotated[
        bool, typer.Option("--anew", help="Measure this machine's rates before each shape, whatever was kept.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare what moestro plan predicts with what runs of random-weight models reach, on the CPU."""
    for one in bits or ():
        bits_in(BITS)(one, "--bits")
    from ..bench.plan import BITS as COMPARED
    from ..bench.plan import SHAPES, measure_plan

    with quiet(as_json), measuring_bar() as on_progress:
        report = measure_plan(
            shapes=measured.shapes or SHAPES,
            bits=bits or COMPARED,
            layers=layers,
            rounds=rounds,
            threads=options.threads,
            anew=anew,
            on_progress=on_progress,
        )
    show(report, as_json)
