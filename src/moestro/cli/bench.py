"""`moestro bench ...`: parses and prints, nothing else. Imports torch only inside a command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..bench.options import CACHE_DTYPES, TABLE_BITS, ComparedOptions, ShapeOptions, TableOptions, check_form
from ..errors import RequestError
from ..planning.budget import parse_bytes
from ..planning.option import needs, one_of
from ..planning.options import ModelOptions, Options, ReplayOptions
from ..planning.policies import POLICIES
from ..planning.shapes import ATTENTION_SHAPES, REAL_SHAPES, depth_of_shape
from ..simulate.routing import routed_shapes
from .bench_plan import bench_plan
from .bench_serve import bench_serve
from .numbers import numbers
from .options import DecodeTokens, Json, Layers, Model, PromptTokens, TraceTokens, takes_options, unset
from .preflight import check_model, check_named, check_plot, check_readable
from .shape_checks import check_prompts
from .terminal import show

TextSource = Annotated[str | None, unset("FILE", "The text to read.", "random tokens", "--text")]
Plot = Annotated[str | None, unset("FILE", "Draw it as an SVG.", "no")]

bench = typer.Typer(rich_markup_mode=None)  # as main.py names it
bench.command("plan", epilog="Example: moestro bench plan --shape olmoe-1b-7b --bits 4")(bench_plan)
bench.command("serve", epilog="Example: moestro bench serve --shape olmoe-1b-7b --bits 4 --turns")(bench_serve)


@bench.command("load", epilog="Example: moestro bench load --size 2GiB")
@takes_options()
def bench_load(
    size: Annotated[str, typer.Option(help="Bytes of experts in the checkpoint that is made for it.")] = "2GiB",
    as_json: Json = False,
) -> None:
    """Load a checkpoint that is made on the spot and watch the process's memory every 10 ms."""
    n_bytes = parse_bytes(size, "size")
    from ..bench.loading import measure_load

    report = measure_load(n_bytes)
    show(report, as_json)
    if not report.within_limit:
        raise typer.Exit(1)


@bench.command("kernels", epilog="Example: moestro bench kernels --shape olmoe-1b-7b --tokens 1 --rounds 3")
@takes_options(only=("shapes", "threads"), shapes=REAL_SHAPES)
def bench_kernels(
    measured: ShapeOptions,
    options: Options,
    formats: Annotated[
        list[str] | None,
        unset(
            "NAME", "Only this number format; may be given several times.", "fp32, fp16, bf16, int8, int4", "--format"
        ),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        unset("N", "Only so many tokens; may be given several times.", "1, 64; with --full 1, 4, 16, 64, 256", min=1),
    ] = None,
    rounds: Annotated[int | None, unset("N", "Rounds to take medians of.", "3; with --full 5", min=1)] = None,
    full: Annotated[bool, typer.Option("--full", help="All numbers of tokens, more rounds.")] = False,
    as_json: Json = False,
) -> None:
    """Time the CPU kernels at three models' shapes, beside this machine's limits of reading and of computing.

    By default a selection that takes under two minutes; the report names what was left out.
    """
    for name in formats or ():
        check_form(name)
    from ..bench.kernels import FULL_ROUNDS, FULL_TOKENS, MEASURED, ROUNDS, TOKENS, measure_kernels

    counts = tokens or (FULL_TOKENS if full else TOKENS)
    times = rounds or (FULL_ROUNDS if full else ROUNDS)
    report = measure_kernels(
        shapes=measured.shapes, formats=formats or MEASURED, tokens=counts, rounds=times, threads=options.threads
    )
    show(report, as_json)
    if (left_out := sorted(set(FULL_TOKENS) - set(counts))) and not as_json:
        print(f"left out: {', '.join(map(str, left_out))} tokens; --full has them, and {FULL_ROUNDS} rounds")


@bench.command("attention", epilog="Example: moestro bench attention --shape qwen3-30b-a3b --queries 512 --rounds 1")
@takes_options(only=("shapes", "threads"), shapes=ATTENTION_SHAPES)
def bench_attention(
    measured: ShapeOptions,
    options: Options,
    dtypes: Annotated[
        list[str] | None,
        unset("NAME", "Only caches of this dtype; may be given several times.", "bf16, fp32", "--kv-dtype"),
    ] = None,
    cached: Annotated[
        list[int] | None,
        unset("N", "Tokens in the cache; may be given several times.", "4096, 16384", min=1),
    ] = None,
    queries: Annotated[
        list[int] | None,
        unset("N", "New tokens of a step or of a chunk; may be given several times.", "1, 4, 16, 512", min=1),
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Rounds to take medians of.")] = 3,
    as_json: Json = False,
) -> None:
    """Time attention over long caches, beside this machine's read and FMA limits, and a prompt's beside torch's."""
    for name in dtypes or ():
        one_of("dtype", CACHE_DTYPES)(name, "kv_dtype")
    from ..bench.attention import CACHED, DTYPES, QUERIES, measure_attention

    report = measure_attention(
        shapes=measured.shapes,
        dtypes=dtypes or DTYPES,
        cached=cached or CACHED,
        queries=queries or QUERIES,
        rounds=rounds,
        threads=options.threads,
    )
    show(report, as_json)


@bench.command("decode", epilog="Example: moestro bench decode --shape olmoe-1b-7b --bits 4")
@takes_options(only=("shape", "bits", "threads"))
def bench_decode(
    measured: ShapeOptions,
    options: Options,
    form: Annotated[
        str | None,
        unset(
            "NAME",
            "Weights as a checkpoint has them, not of so many bits: q4_k_m, mxfp4, q8_0, fp8, or any number format.",
            "none",
            "--format",
        ),
    ] = None,
    layers: Layers = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Turns to take medians of.")] = 5,
    alone: Annotated[bool, typer.Option(help="Also Transformers alone, in bfloat16.")] = True,
    batch: Annotated[
        str | None, unset("N,N,...", "Also steps of so many sequences each, beside the limit, like 1,2,4,8,16.", "none")
    ] = None,
    cached: Annotated[
        str | None, unset("N,N,...", "Tokens in the cache of each sequence of a batch, like 64,4096.", "64")
    ] = None,
    beams: Annotated[
        str | None, unset("N,N,...", "Also beam searches, beside batches and one sequence, like 4,8,16.", "none")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time a whole random-weight model beside Transformers alone."""
    if form is not None and options.bits is not None:
        raise RequestError("--format says all about the weights; leave --bits out")
    if cached is not None and batch is None:
        raise RequestError("--cached is about the steps of --batch; give that too, like --batch 1,4")
    if form is not None:
        check_form(form)
    depth_of_shape(measured.shape, layers)
    sequences, tokens = numbers("--batch", batch, 1), numbers("--cached", cached, 1)
    searches = numbers("--beams", beams, 2)
    from ..bench.batches import CACHED
    from ..bench.decode import measure_decode

    report = measure_decode(
        measured.shape,
        form or options.bits or 4,
        layers=layers,
        rounds=rounds,
        threads=options.threads,
        alone=alone,
        batches=sequences,
        cached=tokens or (CACHED,),
        beams=searches,
    )
    show(report, as_json)


@bench.command("policies", epilog="Example: moestro bench policies demo --text story.txt --as-shape mixtral-8x7b")
@takes_options(leave_out=("dtype", "revision", "config", "tokenizer", "policy", "links"))
def bench_policies(
    source: ModelOptions,
    options: ReplayOptions,
    compared: ComparedOptions,
    model: Model = None,
    text: TextSource = None,
    trace: Annotated[str | None, unset("FILE", "A trace instead of a model and a text.", "none")] = None,
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
    """All policies on one model's routing, prefill and decode: by replay on any machine, or live.

    A real shape without a text needs no model: figures are ranges, from what is known of its routing.
    """
    if live and (trace is not None or options.as_shape is not None or plot is not None):
        raise RequestError("--live runs the model itself; leave --trace, --as-shape and --plot out")
    if trace is None:
        check_named(model, source)
    elif model is not None or source.shape is not None or text is not None:
        raise RequestError("--trace has its own model and text; leave MODEL, --shape and --text out")
    if options.profile is not None and trace is None:
        raise RequestError("--profile is for a trace; without --trace the first half of what is read is the profile")
    check_readable(trace, "trace")
    check_readable(options.profile, "trace")
    check_readable(text, "text")
    check_plot(plot)
    if trace is None:
        check_model(model, source)
    names = tuple(compared.policies or POLICIES)
    pieces = {"tokens": tokens, "prompt_tokens": prompt_tokens, "decode_tokens": decode_tokens}
    drawn = None if plot is None else Path(plot)
    if source.shape in routed_shapes() and text is None and not live:
        if options.as_shape is not None:
            raise RequestError("--as-shape is for a trace or a model; leave it out with --shape")
        from ..bench.assumed import compare_assumed

        show(compare_assumed(str(source.shape), options, names, plot=drawn, **pieces), as_json)
        return
    from ..bench.policies import Reading, compare_by_replay, compare_live

    reading = Reading(model, source, text, tokens, prompt_tokens, decode_tokens)
    if not live:
        found = compare_by_replay(reading, trace, options, names, drawn)
    else:
        found = compare_live(reading, options, names)
    show(found, as_json, model, source.revision)


@bench.command("hybrid", epilog="Example: moestro bench hybrid --shape mixtral-8x7b --gpu-memory 24GiB --link 12GB/s")
@takes_options(
    only=("shape", "gpu_memory", "bits", "links", "policies", "device", "threads"),
    shape="mixtral-8x7b",
    gpu_memory="24GiB",
    bits=16,
)
def bench_hybrid(
    measured: ShapeOptions,
    compared: ComparedOptions,
    options: Options,
    layers: Layers = None,
    prompt: Annotated[
        list[int] | None,
        unset("N", "Tokens of a prompt; may be given several times; a paced link has one.", "32, 512, 2048", min=1),
    ] = None,
    decode_tokens: Annotated[int, typer.Option(metavar="N", min=2, help="The most tokens to decode.")] = 64,
    seconds: Annotated[float, typer.Option(metavar="S", help="Seconds after which a policy's decode ends.")] = 8.0,
    uniform: Annotated[bool, typer.Option(help="Also with routers that like all experts alike, decode only.")] = True,
    limit_s: Annotated[float | None, unset("S", "Seconds after loading from which no policy is begun.", "none")] = None,
    as_json: Json = False,
) -> None:
    """All policies live on the GPU, a random-weight model of real shape loaded once, beside what arithmetic allows."""
    needs(lambda s: s > 0, "above 0")(seconds, "seconds")
    needs(lambda s: s is None or s > 0, "above 0")(limit_s, "limit_s")
    depth_of_shape(measured.shape, layers)
    check_prompts(measured.shape, prompt or (1,), decode_tokens)
    from ..bench.hybrid import POLICIES as COMPARED
    from ..bench.hybrid import PROFILE_PROMPT, PROMPTS, measure_hybrid

    check_prompts(measured.shape, (PROFILE_PROMPT, *(prompt or PROMPTS)), decode_tokens)
    assert options.gpu_memory is not None
    report = measure_hybrid(
        measured.shape,
        device=options.device,
        gpu_memory=options.gpu_memory,
        bits=options.bits,
        layers=layers,
        links=(None, *map(float, compared.links)),
        names=compared.policies or COMPARED,
        prompts=tuple(prompt or PROMPTS),
        decode_tokens=decode_tokens,
        seconds=seconds,
        uniform=uniform,
        limit_s=float("inf") if limit_s is None else limit_s,
        threads=options.threads,
    )
    show(report, as_json)


@bench.command("host", epilog="Example: moestro bench host --shape olmoe-1b-7b --slots 0.5")
@takes_options(only=("shape", "machine", "bits", "policies"), shape="qwen3-30b-a3b", bits=16)
def bench_host(
    measured: ShapeOptions,
    compared: ComparedOptions,
    options: ReplayOptions,
    slots: Annotated[float, typer.Option(metavar="SHARE", help="Share of the experts that fits on the GPU.")] = 0.25,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Rounds of 16 tokens, policies in turns.")] = 5,
    as_json: Json = False,
) -> None:
    """Time what the host itself takes of a layer of a decode step, on a device that does nothing."""
    if not 0 <= slots < 1:
        raise RequestError(f"--slots {slots:g}: a share of the experts is wanted, from 0 to below 1")
    from ..bench.host import measure_host

    names = compared.policies or tuple(POLICIES)
    report = measure_host(
        measured.shape, slots=slots, bits=options.bits, machine=options.machine, names=names, rounds=rounds
    )
    show(report, as_json)


@bench.command("recall", epilog="Example: moestro bench recall demo --text story.txt --plot recall.svg")
@takes_options(leave_out=("dtype", "revision", "config", "tokenizer"))
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
    check_named(model, source)
    check_readable(text, "text")
    check_plot(plot)
    check_model(model, source)
    from ..bench.policies import Reading
    from ..bench.recall import FARTHEST, measure_recall

    reading = Reading(model, source, text, tokens, prompt_tokens, decode_tokens)
    report = measure_recall(reading.record(FARTHEST))
    if plot is not None:
        report.plot(Path(plot))
    show(report, as_json, model, source.revision)


@bench.command("quantization", epilog="Example: moestro bench quantization demo --shape olmoe-1b-7b --plot table.svg")
@takes_options()
def bench_quantization(
    table: TableOptions,
    model: Annotated[
        str, typer.Argument(help="An unquantized checkpoint's folder, a hub id, or demo.", metavar="MODEL")
    ],
    text: Annotated[str | None, unset("FILE", "The text to read.", "held-out stories, for demo", "--text")] = None,
    tokens: Annotated[
        int, typer.Option(metavar="N", min=0, help="The most tokens to read, from the text's beginning; 0 for all.")
    ] = 32_768,
    window: Annotated[
        int, typer.Option(metavar="N", min=2, help="Tokens of a window; published figures mostly have 2048.")
    ] = 256,
    layers: Layers = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Turns of decoding to take medians of.")] = 5,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Size and perplexity by bits of dense layers and of experts: the table of the paper that began this.

    Each cell loads the model anew and reads the text. The paper's own sizes for Mixtral-8x7B stand below.
    """
    check_named(model, table.source)
    if table.shape is not None:
        depth_of_shape(table.shape, layers)
    check_readable(text, "text")
    check_plot(plot)
    check_model(model, table.source)
    from ..bench.quantization import Reading, SpeedRequest, measure_quantization

    report = measure_quantization(
        Reading(model, table.source, text, tokens, window),
        dense_bits=[*map(int, table.dense_bits or TABLE_BITS)],
        expert_bits=[*map(int, table.expert_bits or TABLE_BITS)],
        fit=table.fit,
        speed=None if table.shape is None else SpeedRequest(table.shape, layers, rounds),
        threads=table.threads,
    )
    if plot is not None:
        report.plot(Path(plot))
    show(report, as_json, model, table.revision)
