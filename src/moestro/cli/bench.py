"""`moestro bench ...`: parses and prints, nothing else. Imports torch only inside a command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import RequestError
from ..planning.options import ModelOptions, Options, ReplayOptions
from ..planning.policies import POLICIES
from ..planning.shapes import SHAPES
from .options import DecodeTokens, Json, Model, PromptTokens, TraceTokens, takes_options

TextSource = Annotated[
    str | None,
    typer.Option("--text", metavar="FILE", help="The text to read. [default: random tokens]", show_default=False),
]
Plot = Annotated[str | None, typer.Option(metavar="FILE", help="Draw it as an SVG. [default: no]", show_default=False)]
Policies = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help=f"Only this one; may be given several times. [default: {', '.join(POLICIES)}]",
        show_default=False,
    ),
]
KERNEL_SHAPES = tuple(name for name in SHAPES if name != "tiny")

bench = typer.Typer(help="Measure this machine and Moestro on it.", no_args_is_help=True, rich_markup_mode=None)


@bench.command("load", epilog="Example: moestro bench load --size 2GiB")
def bench_load(
    size: Annotated[str, typer.Option(help="Bytes of experts in the checkpoint that is made for it.")] = "2GiB",
    as_json: Json = False,
) -> None:
    """Load a checkpoint that is made on the spot and watch the process's memory every 10 ms."""
    from ..bench.loading import measure_load
    from ..planning.budget import parse_bytes

    report = measure_load(parse_bytes(size, "--size"))
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        print(report)
    if not report.within_limit:
        raise typer.Exit(1)


@bench.command("kernels", epilog="Example: moestro bench kernels --shape olmoe-1b-7b --tokens 1 --rounds 3")
@takes_options(only=("threads",))
def bench_kernels(
    options: Options,
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
            help="Only so many tokens; may be given several times. [default: 1, 64; with --full 1, 4, 16, 64, 256]",
            show_default=False,
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Rounds to take medians of. [default: 3; with --full 5]", show_default=False
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="All numbers of tokens, more rounds.")] = False,
    as_json: Json = False,
) -> None:
    """Time the CPU kernels at three models' shapes, beside this machine's read and FMA limits.

    By default a selection that takes under two minutes; the report names what was left out.
    """
    from ..bench.kernels import FULL_ROUNDS, FULL_TOKENS, ROUNDS, TOKENS, measure_kernels

    counts = tokens or (FULL_TOKENS if full else TOKENS)
    times = rounds or (FULL_ROUNDS if full else ROUNDS)
    report = measure_kernels(shapes=shape or KERNEL_SHAPES, tokens=counts, rounds=times, threads=options.threads)
    if as_json:
        print(json.dumps(report.to_json()))
        return
    report.print()
    if left_out := sorted(set(FULL_TOKENS) - set(counts)):
        print(f"left out: {', '.join(map(str, left_out))} tokens; --full has them, and {FULL_ROUNDS} rounds")


@bench.command("decode", epilog="Example: moestro bench decode --shape olmoe-1b-7b --bits 4")
@takes_options(only=("threads",))
def bench_decode(
    options: Options,
    shape: Annotated[str, typer.Option(metavar="NAME", help=f"One of {', '.join(SHAPES)}.")] = "olmoe-1b-7b",
    bits: Annotated[int, typer.Option(metavar="N", help="Bits of all weights: 16, 8 or 4.")] = 4,
    layers: Annotated[
        int | None, typer.Option(help="Cut the depth, to fit in RAM. [default: all]", show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Turns to take medians of.")] = 5,
    alone: Annotated[bool, typer.Option(help="Also Transformers alone, in bfloat16.")] = True,
    as_json: Json = False,
) -> None:
    """Time a whole random-weight model beside Transformers alone."""
    from ..bench.decode import measure_decode

    report = measure_decode(shape, bits, layers=layers, rounds=rounds, threads=options.threads, alone=alone)
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        report.print()


@bench.command("policies", epilog="Example: moestro bench policies demo --text story.txt --as-shape mixtral-8x7b")
@takes_options(leave_out=("dtype", "revision", "policy", "profile"))
def bench_policies(
    source: ModelOptions,
    options: ReplayOptions,
    model: Model = None,
    text: TextSource = None,
    trace: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="A recorded trace instead of a model and a text. [default: none]", show_default=False
        ),
    ] = None,
    policy: Policies = None,
    live: Annotated[
        bool,
        typer.Option(
            "--live", help="Run the model under each: on its GPU, or pretended on the machine's virtual clock."
        ),
    ] = False,
    tokens: TraceTokens = 512,
    prompt_tokens: PromptTokens = 64,
    decode_tokens: DecodeTokens = 192,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """All policies on one model's routing, prefill and decode: by replay on any machine, or live."""
    from ..bench.policies import Reading, compare_by_replay, compare_live

    reading = Reading(
        model, source.shape, text, tokens, prompt_tokens, decode_tokens, source.seed, source.trust_remote_code
    )
    names = tuple(policy or POLICIES)
    if not live:
        found = compare_by_replay(
            reading,
            trace,
            machine=options.machine,
            gpu_memory=options.gpu_memory,
            as_shape=options.as_shape,
            bits=options.bits,
            names=names,
            plot=None if plot is None else Path(plot),
        )
    elif trace is not None or options.as_shape is not None or plot is not None:
        raise RequestError("--live runs the model itself; leave --trace, --as-shape and --plot out")
    else:
        found = compare_live(
            reading, machine=options.machine, gpu_memory=options.gpu_memory, bits=options.bits, names=names
        )
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        found.print()


@bench.command("hybrid", epilog="Example: moestro bench hybrid --shape mixtral-8x7b --gpu-memory 24GiB --link 12GB/s")
@takes_options(only=("device", "threads"))
def bench_hybrid(
    options: Options,
    shape: Annotated[str, typer.Option(metavar="NAME", help=f"One of {', '.join(SHAPES)}.")] = "mixtral-8x7b",
    gpu_memory: Annotated[str, typer.Option(metavar="SIZE", help="The most GPU memory to use.")] = "24GiB",
    bits: Annotated[
        int | None, typer.Option(metavar="N", help="Bits of the experts' weights. [default: 16]", show_default=False)
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="Cut the depth, to fit in RAM. [default: all]", show_default=False)
    ] = None,
    link: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RATE",
            help="Also with the link paced so, like 12GB/s; may be given several times. [default: no]",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Only this one; may be given several times. [default: seven]", show_default=False
        ),
    ] = None,
    prompt: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Tokens of a prompt; may be given several times; a paced link has the first. [default: 32, 512, 2048]",
            show_default=False,
        ),
    ] = None,
    decode_tokens: Annotated[int, typer.Option(metavar="N", min=2, help="To decode, at most.")] = 64,
    seconds: Annotated[float, typer.Option(metavar="S", help="After which a policy's decode ends.")] = 8.0,
    uniform: Annotated[bool, typer.Option(help="Also with routers that like all experts alike, decode only.")] = True,
    limit_s: Annotated[
        float | None,
        typer.Option(metavar="S", help="After which no policy is begun. [default: none]", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """All policies live on the GPU, a random-weight model of real shape loaded once, beside what arithmetic allows."""
    from ..bench.hybrid import POLICIES as COMPARED
    from ..bench.hybrid import PROMPTS, measure_hybrid
    from ..planning.budget import parse_gbps

    report = measure_hybrid(
        shape,
        device=options.device,
        gpu_memory=gpu_memory,
        bits=bits,
        layers=layers,
        links=(None, *(parse_gbps(rate, "--link") for rate in link or ())),
        names=tuple(policy or COMPARED),
        prompts=tuple(prompt or PROMPTS),
        decode_tokens=decode_tokens,
        seconds=seconds,
        uniform=uniform,
        limit_s=float("inf") if limit_s is None else limit_s,
        threads=options.threads,
    )
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        report.print()


@bench.command("host", epilog="Example: moestro bench host --shape olmoe-1b-7b --slots 0.5")
@takes_options(only=("machine",))
def bench_host(
    options: ReplayOptions,
    shape: Annotated[str, typer.Option(metavar="NAME", help=f"One of {', '.join(SHAPES)}.")] = "qwen3-30b-a3b",
    slots: Annotated[float, typer.Option(metavar="SHARE", help="Of the experts, that fit on the GPU.")] = 0.25,
    bits: Annotated[
        int | None, typer.Option(metavar="N", help="Bits of the experts' weights. [default: 16]", show_default=False)
    ] = None,
    policy: Policies = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Rounds of 16 tokens, policies in turns.")] = 5,
    as_json: Json = False,
) -> None:
    """Time what the host itself takes of a layer of a decode step, on a device that does nothing."""
    from ..bench.host import measure_host

    report = measure_host(
        shape, slots=slots, bits=bits, machine=options.machine, names=policy or tuple(POLICIES), rounds=rounds
    )
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        report.print()


@bench.command("recall", epilog="Example: moestro bench recall demo --text story.txt --plot recall.svg")
@takes_options(leave_out=("dtype", "revision"))
def bench_recall(
    source: ModelOptions,
    model: Model = None,
    text: TextSource = None,
    tokens: TraceTokens = 1024,
    prompt_tokens: PromptTokens = 64,
    decode_tokens: DecodeTokens = 192,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """LRU hits against slots, and recall of the next gates' guesses against their number."""
    from ..bench.plots import plotting
    from ..bench.policies import Reading
    from ..bench.recall import FARTHEST, measure_recall
    from ..text.files import writable

    if plot is not None:  # refused before the work
        plotting()
        writable(plot)
    reading = Reading(
        model, source.shape, text, tokens, prompt_tokens, decode_tokens, source.seed, source.trust_remote_code
    )
    report = measure_recall(reading.record(FARTHEST))
    if plot is not None:
        report.plot(Path(plot))
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        report.print()
