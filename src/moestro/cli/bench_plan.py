"""`moestro bench plan`: parses and prints, nothing else."""

from __future__ import annotations

from typing import Annotated

import typer

from ..bench.options import CellOptions, ShapeOptions
from ..planning.shapes import FORECAST_SHAPES
from ..progress import quiet
from .machine import measuring_bar
from .options import Json, takes_options, unset
from .terminal import show


@takes_options(only=("shapes", "bits", "threads"), shapes=FORECAST_SHAPES)
def bench_plan(
    measured: ShapeOptions,
    cells: CellOptions,
    layers: Annotated[int | None, unset("N", "Cut the depth to so many layers.", "a few", min=1)] = None,
    rounds: Annotated[
        int, typer.Option(metavar="N", min=1, help="Turns of each cell; that of the median error is told.")
    ] = 3,
    anew: Annotated[
        bool, typer.Option("--anew", help="Measure this machine's rates in each turn, whatever was kept.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare what moestro plan predicts with what runs of random-weight models reach, on the CPU."""
    from ..bench.plan import BITS as COMPARED
    from ..bench.plan import measure_plan

    with quiet(as_json), measuring_bar("predicting and running") as on_progress:
        report = measure_plan(
            shapes=measured.shapes,
            bits=[*map(int, cells.bits)] or COMPARED,
            layers=layers,
            rounds=rounds,
            threads=cells.threads,
            anew=anew,
            on_progress=on_progress,
        )
    show(report, as_json)
