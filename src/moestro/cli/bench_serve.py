"""`moestro bench serve`: parses and prints, nothing else."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import RequestError
from ..planning.options import ModelOptions, Options
from ..planning.shapes import depth_of_shape
from .numbers import numbers
from .options import Json, Layers, Model, takes_options
from .preflight import check_model, check_named
from .terminal import show


@takes_options(only=("shape", "revision", "tokenizer", "trust_remote_code", "bits", "threads", "device"))
def bench_serve(
    source: ModelOptions,
    options: Options,
    model: Model = None,
    layers: Layers = None,
    clients: Annotated[str, typer.Option(metavar="N,N,...", help="How many clients ask at a time.")] = "1,4,16",
    prompt_tokens: Annotated[int, typer.Option(metavar="N", min=2, help="Random tokens of each prompt.")] = 128,
    answer_tokens: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of each answer.")] = 64,
    requests: Annotated[int, typer.Option(metavar="N", min=1, help="Requests of each client in a round.")] = 2,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Rounds to take medians of.")] = 3,
    turns: Annotated[
        bool, typer.Option("--turns", help="Also turns of conversations, beside their new tokens alone.")
    ] = False,
    http: Annotated[
        bool, typer.Option("--http", help="Over HTTP on loopback, with the clients in another process; not the turns.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Time a server's engine: clients that each ask again when their answer is whole, beside one answer at a time."""
    counts = numbers("--clients", clients, 1)
    check_named(model, source)
    if layers is not None and source.shape is None:
        raise RequestError("--layers cuts a random model of a --shape; leave it out with MODEL")
    if source.shape is not None:
        depth_of_shape(source.shape, layers)
    check_model(model, source)
    from ..bench.serve import load_served, measure_serve

    loaded, tokenizer = load_served(model, source, options, layers)
    report = measure_serve(
        loaded,
        tokenizer,
        model or str(source.shape),
        clients=counts,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        requests=requests,
        rounds=rounds,
        turns=turns,
        http=http,
        threads=options.threads,
    )
    show(report, as_json, model, source.revision)
