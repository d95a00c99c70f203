"""The command line: parses and prints, nothing else. Imports torch only inside a command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import fields
from importlib import metadata
from inspect import signature
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MoestroError, RequestError
from ..planning.policies import DEFAULT_POLICY
from .bench import bench
from .options import (
    AsShape,
    Bits,
    Clock,
    Context,
    DecodeTokens,
    DenseBits,
    DeviceName,
    Dtype,
    ExpertBits,
    Fuse,
    GpuMemory,
    HeadBits,
    Json,
    Link,
    MachineName,
    MaxNewTokens,
    MinP,
    Model,
    NumBeams,
    PackDense,
    PolicyName,
    Profile,
    PromptTokens,
    Ram,
    RepetitionPenalty,
    ReplayBits,
    ReplayGpuMemory,
    ReplayMachine,
    Seed,
    Shape,
    Stop,
    Temperature,
    TextFile,
    Threads,
    TimelineFile,
    TopK,
    TopP,
    TraceTokens,
    TrustRemoteCode,
)
from .terminal import (
    AnswerPrinter,
    print_figures,
    print_piece,
    read_line,
    read_prompt,
    say,
    stop_on_interrupt,
    use_any_bytes,
)

if TYPE_CHECKING:
    from ..text.generation import TextOptions

app = typer.Typer(
    name="moestro",
    help="Run Mixture-of-Experts models larger than the GPU's memory, conducted expert by expert.",
    epilog='Example: moestro run demo "Once upon a time"',
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it would take the square brackets of a default for markup
)
app.add_typer(bench, name="bench")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"moestro {metadata.version('moestro')}")
        raise typer.Exit


@app.command(epilog='Example: moestro run demo "Once upon a time" -n 64 --temperature 0')
def run(
    command: typer.Context,
    model: Model = None,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; - reads standard input.", show_default=False)
    ] = None,
    shape: Shape = None,
    trust_remote_code: TrustRemoteCode = False,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = 0,
    stop: Stop = None,
    num_beams: NumBeams = None,
    gpu_memory: GpuMemory = None,
    ram: Ram = None,
    context: Context = None,
    policy: PolicyName = DEFAULT_POLICY,
    device: DeviceName = "auto",
    link: Link = None,
    machine: MachineName = None,
    clock: Clock = "wall",
    profile: Profile = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    bits: Bits = None,
    expert_bits: ExpertBits = None,
    dense_bits: DenseBits = None,
    head_bits: HeadBits = None,
    fuse: Fuse = True,
    pack_dense: PackDense = True,
    trace: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Record what the routers choose. [default: no]", show_default=False),
    ] = None,
    timeline: TimelineFile = None,
    as_json: Json = False,
) -> None:
    """Continue one prompt, streaming, and print how fast it went."""
    if shape is not None:  # then there is no MODEL, and what stands in its place is the prompt
        if prompt is not None:
            raise RequestError(f"both MODEL ({model}) and --shape ({shape}); name one of them")
        model, prompt = None, model
    from ..text.files import writable
    from ..text.generation import encode, generate_text
    from .replay import recorded, timed

    target = None if trace is None else writable(trace)
    spans = None if timeline is None else writable(timeline)
    options, text = _text_options(command), read_prompt(prompt)
    loaded, tokenizer = _load(model, shape, command)
    encode(tokenizer, text)  # before it is printed: it may be no text that a tokenizer takes
    if not as_json:
        print(text, end="", flush=True)
    with recorded(loaded, target, model or shape or "", text), timed(loaded, spans):
        on_text = None if as_json else print_piece
        result = generate_text(loaded, tokenizer, text, options, on_text=on_text, splits_channels=as_json)
    if as_json:
        print(json.dumps(result.to_json()))
    else:
        print()
        print_figures(result)


@app.command(epilog='Example: moestro chat demo --system "You tell fairy tales."')
def chat(
    command: typer.Context,
    model: Model = None,
    shape: Shape = None,
    trust_remote_code: TrustRemoteCode = False,
    system: Annotated[
        str | None, typer.Option(help="What the model is told first. [default: nothing]", show_default=False)
    ] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = 0,
    stop: Stop = None,
    gpu_memory: GpuMemory = None,
    ram: Ram = None,
    context: Context = None,
    policy: PolicyName = DEFAULT_POLICY,
    device: DeviceName = "auto",
    link: Link = None,
    machine: MachineName = None,
    clock: Clock = "wall",
    profile: Profile = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    bits: Bits = None,
    expert_bits: ExpertBits = None,
    dense_bits: DenseBits = None,
    head_bits: HeadBits = None,
    fuse: Fuse = True,
    pack_dense: PackDense = True,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, /new starts over, Ctrl-D leaves."""
    from ..text.chat import ChatSession
    from ..text.templates import check_template

    options = _text_options(command)
    loaded, tokenizer = _load(model, shape, command, lambda tokenizer: check_template(tokenizer, system))
    session = ChatSession(loaded, tokenizer, options, system)
    if not session.has_template:
        say("this tokenizer has no chat template: the conversation is one text that the model continues")
    say("Ctrl-C stops an answer, /new starts over, Ctrl-D leaves")
    while (text := read_line()) is not None:
        if text.strip() == "/new":
            session.reset()
        elif text.strip():
            try:
                printer = AnswerPrinter()
                with stop_on_interrupt() as stopped:
                    result = session.ask(
                        text, on_text=printer.on_text, on_reasoning=printer.on_reasoning, should_stop=stopped.is_set
                    )
                print()
                print_figures(result)
            except RequestError as error:
                if not sys.stdin.isatty():
                    raise
                say(f"{error}; /new starts over")
            except KeyboardInterrupt:
                say("\nstopped; that message is forgotten")


@app.command("trace", epilog="Example: moestro trace demo --text story.txt -o demo.trace")
def trace_command(
    command: typer.Context,
    text: TextFile,
    model: Model = None,
    shape: Shape = None,
    trust_remote_code: TrustRemoteCode = False,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Where to keep the trace. [default: nowhere]", show_default=False
        ),
    ] = None,
    tokens: TraceTokens = 1024,
    prompt_tokens: PromptTokens = 64,
    decode_tokens: DecodeTokens = 192,
    gpu_memory: GpuMemory = None,
    ram: Ram = None,
    policy: PolicyName = DEFAULT_POLICY,
    device: DeviceName = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    bits: Bits = None,
    expert_bits: ExpertBits = None,
    dense_bits: DenseBits = None,
    head_bits: HeadBits = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Record what a model's routers choose for a text, and what the next gates guess; print a summary."""
    from ..simulate.trace_summary import summarize
    from ..text.files import read_text, writable
    from ..text.tracing import trace_text
    from .replay import print_summary

    words, target = read_text(text), None if output is None else writable(output)
    loaded, tokenizer = _load(model, shape, command)
    name = model or shape or ""
    found = trace_text(
        loaded, tokenizer, name, words, tokens=tokens, prompt_tokens=prompt_tokens, decode_tokens=decode_tokens
    )
    if target is not None:
        found.save(target)
    summary = summarize(found)
    if as_json:
        print(json.dumps(summary))
    else:
        print_summary(summary)


@app.command(
    "replay", epilog="Example: moestro replay demo.trace --policy lru --machine rtx4090 --as-shape mixtral-8x7b"
)
def replay_command(
    trace: Annotated[str, typer.Argument(metavar="TRACE", help="A file that moestro trace wrote.", show_default=False)],
    policy: PolicyName = DEFAULT_POLICY,
    machine: ReplayMachine = "rtx4090",
    gpu_memory: ReplayGpuMemory = None,
    as_shape: AsShape = None,
    bits: ReplayBits = None,
    profile: Profile = None,
    timeline: TimelineFile = None,
    as_json: Json = False,
) -> None:
    """Run a policy over a trace on a virtual machine, without a GPU: hits, lanes, speeds and their limits."""
    from ..text.files import writable
    from .replay import print_replay, run_replay

    found = run_replay(
        trace,
        policy,
        machine,
        gpu_memory=gpu_memory,
        shape=as_shape,
        bits=bits,
        profile=profile,
        timeline=None if timeline is None else writable(timeline),
    )
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        print_replay(found)


@app.command(epilog="Example: moestro doctor")
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of a table.")] = False,
) -> None:
    """Say what this machine has and what Moestro will use of it."""
    from .doctor import examine

    findings = examine()
    if as_json:
        print(json.dumps(findings))
        return
    width = max(map(len, findings))
    for name, value in findings.items():
        print(f"{name:<{width}}  {value}")


def _text_options(command: typer.Context) -> TextOptions:
    from ..text.generation import TextOptions

    given = {field.name: command.params.get(field.name) for field in fields(TextOptions)}
    return TextOptions(**{name: value for name, value in given.items() if value is not None})


def _load(
    model: str | None, shape: str | None, command: typer.Context, check: Callable[[Any], None] = lambda tokenizer: None
) -> tuple[Any, Any]:
    """The model and its tokenizer, which is checked first.

    What `load` takes is named among the command's options as it is there.
    """
    from ..compute.cpu import core_cpus
    from ..loading.load import load, load_tokenizer

    options = {name: command.params[name] for name in signature(load).parameters.keys() & command.params.keys()}
    options |= {"model": model, "shape": shape}
    if options["threads"] is None:
        options["threads"] = len(core_cpus())
    trusted = options["trust_remote_code"]
    tokenizer = load_tokenizer(model, shape=shape, trust_remote_code=trusted) if model or shape else None
    if tokenizer is not None:
        check(tokenizer)
    loaded = load(**options)
    if (plan := loaded.moestro.gpu_plan) is not None:
        say(plan.in_words())
    return loaded, tokenizer


def main() -> None:
    """Entry point: a MoestroError is one line and status 2; Ctrl-C is status 130, by typer."""
    use_any_bytes()
    try:
        app()
    except MoestroError as error:
        say(f"error: {error}")
        sys.exit(2)


if __name__ == "__main__":
    main()
