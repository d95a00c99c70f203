"""The command line: parses and prints, nothing else. Imports torch only inside a command."""

from __future__ import annotations

import sys
from functools import partial
from typing import Annotated, Any

import typer

from ..errors import MoestroError, is_fault
from ..loading.once import remembering
from ..logs import keep_traceback, set_up_logging
from ..planning.options import ModelOptions, Options, ReplayOptions
from ..text.options import TextOptions
from .cache import cache
from .envelope import print_json
from .late import LateBench
from .load import load_all
from .machine import machine
from .options import (
    DecodeTokens,
    Json,
    Model,
    OneLineErrors,
    PromptTokens,
    RecordedTrace,
    TextFile,
    TimelineFile,
    TraceTokens,
    takes_options,
    unset,
)
from .preflight import check_model, check_named, check_readable, check_routing
from .serve import serve
from .terminal import AnswerPrinter, ReadingBar, print_figures, read_prompt, say, use_any_bytes

app = typer.Typer(
    name="moestro",
    cls=OneLineErrors,
    help="Run Mixture-of-Experts models larger than the GPU's memory, conducted expert by expert.",
    epilog='Example: moestro run demo "Once upon a time"',
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it would take the square brackets of a default for markup
)
app.add_typer(
    typer.Typer(
        cls=LateBench, help="Measure this machine and Moestro on it.", no_args_is_help=True, rich_markup_mode=None
    ),
    name="bench",
)
app.add_typer(cache, name="cache")
app.command("machine", epilog="Example: moestro machine -o this.json")(machine)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
    verbose: Annotated[
        int,
        typer.Option(
            "--verbose", "-v", count=True, show_default=False, help="Log what is loaded; -vv also files and the plan."
        ),
    ] = 0,
) -> None:
    set_up_logging(verbose)
    if version:
        from importlib import metadata

        print(f"moestro {metadata.version('moestro')}")
        raise typer.Exit


@app.command(epilog='Example: moestro run demo "Once upon a time" -n 64 --temperature 0')
@takes_options()
def run(
    source: ModelOptions,
    options: TextOptions,
    engine: Options,
    model: Model = None,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; - reads standard input.", show_default=False)
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")] = False,
    trace: Annotated[str | None, unset("FILE", "Record what the routers choose.", "no")] = None,
    timeline: TimelineFile = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say the plan first, as numbered reasons.")] = False,
    as_json: Json = False,
) -> None:
    """Answer or continue one prompt, streaming, and print how fast it went.

    Where the model has a chat template, the prompt is a message in it, and the answer is printed alone.
    """
    if source.shape is not None and prompt is None:  # then what stands in MODEL's place is the prompt
        model, prompt = None, model
    from ..loading.timing import process_s, timing
    from ..text.files import writable

    with remembering():
        check_named(model, source)
        target = None if trace is None else writable(trace)
        spans = None if timeline is None else writable(timeline)
        check_readable(engine.profile, "trace")
        text = read_prompt(prompt)
        check_model(model, source, draft=options.draft)
        if explain:
            from ..loading.outlook import outlook
            from .plan import print_reasons

            print_reasons(outlook(model, source, engine), say)

        import moestro.loading.model  # noqa: F401  # here, so that its imports are not counted as reading

        from ..text.generation import generate_text
        from ..text.prompt import prompt_for
        from .replay import timed, traced

        with timing() as times:
            imports_s = process_s()
            written = partial(prompt_for, text=text, raw=raw)
            loaded, tokenizer, draft, given = load_all(model, source, engine, written, text=options)
    if given.in_template:
        say("chat    the prompt is a message in the model's chat template; --raw continues it as it is")
    printer, streams = AnswerPrinter(), not as_json
    with traced(loaded, target, model or source.shape or "", text), timed(loaded, spans), ReadingBar() as bar:
        result = generate_text(
            *(loaded, tokenizer, given.ids, options),
            on_text=printer.on_text if streams else None,
            on_reasoning=printer.on_reasoning if streams else None,
            splits_channels=as_json or given.in_template,
            on_checked=partial(printer.on_prompt, text) if streams and not given.in_template else lambda: None,
            on_progress=bar.on_progress,
            draft=draft,
        )
    if as_json:
        from ..text.choices import settled
        from .notes import settled_by

        more = {"chat_template": given.in_template, "load": {"imports_s": imports_s} | times.to_json()}
        chosen = settled(options, loaded.generation_config) | settled_by(loaded)
        print_json(result.to_json() | more, model, source.revision, **chosen)
    else:
        print()
        print_figures(result)
        say(f"start    {imports_s:.2f} s to import, {times}")


@app.command(epilog='Example: moestro chat demo --system "You tell fairy tales."')
@takes_options(leave_out=("num_beams",), max_new_tokens=512)
def chat(
    source: ModelOptions,
    options: TextOptions,
    engine: Options,
    model: Model = None,
    system: Annotated[str | None, unset(None, "What the model is told first.", "nothing")] = None,
    figures: Annotated[bool, typer.Option("--figures", help="Print how fast each answer went.")] = False,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, /help lists commands, Ctrl-D leaves."""
    from .chat import Conversation, Editor, read_piped

    def checked(tokenizer: Any) -> None:
        from ..text.templates import check_template

        check_template(tokenizer, system)

    loaded, tokenizer, draft, _ = load_all(model, source, engine, checked, text=options)
    from ..text.chat import ChatSession

    session = ChatSession(loaded, tokenizer, options, system, draft)
    if not session.has_template:
        say("this tokenizer has no chat template: the conversation is one text that the model continues")
    if is_typed := sys.stdin.isatty():
        say("/help lists commands, Ctrl-C stops an answer, Ctrl-D leaves")
    Conversation(session, Editor() if is_typed else read_piped, is_typed=is_typed, figures=figures).go_on()


app.command("serve", epilog="Example: moestro serve demo --port 8080")(serve)


@app.command("trace", epilog="Example: moestro trace demo --text story.txt -o demo.trace")
@takes_options(leave_out=("context", "link", "machine", "clock", "profile", "fuse", "pack_dense"))
def trace_command(
    source: ModelOptions,
    engine: Options,
    text: TextFile,
    model: Model = None,
    output: Annotated[str | None, unset("FILE", "Where to keep the trace.", "nowhere", "--output", "-o")] = None,
    tokens: TraceTokens = 1024,
    prompt_tokens: PromptTokens = 64,
    decode_tokens: DecodeTokens = 192,
    as_json: Json = False,
) -> None:
    """Record what a model's routers choose for a text, and what the next gates guess; print a summary."""
    from ..text.files import read_text, writable

    words, target = read_text(text), None if output is None else writable(output)
    loaded, tokenizer, *_ = load_all(model, source, engine)
    from ..simulate.trace_summary import summarize
    from ..text.tracing import trace_text
    from .notes import settled_by
    from .replay import print_summary

    name = model or source.shape or ""
    found = trace_text(
        loaded, tokenizer, name, words, tokens=tokens, prompt_tokens=prompt_tokens, decode_tokens=decode_tokens
    )
    if target is not None:
        found.save(target)
    summary = summarize(found)
    if as_json:
        print_json(summary, model, source.revision, **settled_by(loaded))
    else:
        print_summary(summary)


@app.command("replay", epilog="Example: moestro replay --shape mixtral-8x7b --bits 4 --machine rtx4090 --policy lru")
@takes_options()
def replay_command(
    options: ReplayOptions,
    trace: RecordedTrace = None,
    timeline: TimelineFile = None,
    as_json: Json = False,
) -> None:
    """Run a policy over a trace, or over a shape without one, on a virtual machine: hits, lanes, speeds and limits."""
    from ..text.files import writable

    check_routing(trace, options)
    check_readable(trace, "trace")
    check_readable(options.profile, "trace")
    spans = None if timeline is None else writable(timeline)
    from .replay import replayed

    found = replayed(trace, options, spans)
    if as_json:
        print_json(found.to_json())
    else:
        found.print()


@app.command("plan", epilog="Example: moestro plan mistralai/Mixtral-8x7B-v0.1 --gpu-memory 12GiB --bits 4")
@takes_options(
    only=(
        *(
            "shape",
            "revision",
            "config",
            "dtype",
            "gpu_memory",
            "ram",
            "context",
            "sequences",
            "policy",
            "device",
            "machine",
        ),
        *("threads", "bits", "expert_bits", "dense_bits", "head_bits", "transcode", "cache", "pack_dense"),
    )
)
def plan_command(source: ModelOptions, engine: Options, model: Model = None, as_json: Json = False) -> None:
    """Say whether a model fits and how fast it would be, before any of its weights is downloaded."""
    from ..loading.outlook import outlook
    from .plan import print_outlook, settled_by, to_json

    with remembering():
        found = outlook(model, source, engine)
        if as_json:
            print_json(to_json(found), model, source.revision, **settled_by(found))
        else:
            print_outlook(found)


@app.command("inspect", epilog="Example: moestro inspect demo")
@takes_options(only=("revision",))
def inspect_command(
    source: ModelOptions,
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A folder, a GGUF file, a hub id, ORG/REPO:Q4_K_M, or demo.", show_default=False
        ),
    ],
    as_json: Json = False,
) -> None:
    """Say what a model is, here or on the hub, without loading or fetching its weights."""
    with remembering():
        check_model(checkpoint, source)
        from ..loading.contents import inspect_model
        from .inspect import print_contents

        contents = inspect_model(checkpoint, source.revision)
        if as_json:
            print_json(contents.to_json(), checkpoint, source.revision)
        else:
            print_contents(contents)


@app.command(epilog="Example: moestro pack mistralai/Mixtral-8x7B-Instruct-v0.1 -o mixtral-4bit --bits 4")
@takes_options(
    only=(
        *("revision", "config", "tokenizer", "trust_remote_code", "dtype"),
        *("ram", "threads", "bits", "expert_bits", "dense_bits", "head_bits", "fit", "transcode"),
    )
)
def pack(
    source: ModelOptions,
    engine: Options,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint's folder, a hub id, or demo.", show_default=False)
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="DIR", help="The folder to write; a packed one is replaced.", show_default=False
        ),
    ],
    as_json: Json = False,
) -> None:
    """Write a model as a packed folder: quantized once, it is a MODEL that loads without quantizing."""
    from pathlib import Path

    with remembering():
        check_model(model, source)
        from ..loading.pack import pack as pack_model
        from .inspect import print_packed

        made = pack_model(model, Path(output).expanduser(), source, engine)
    if as_json:
        print_json({"folder": output, "n_bytes": made.n_bytes, "n_files": len(made.files) + 1}, model, source.revision)
    else:
        print_packed(output, made)


@app.command(epilog="Example: moestro doctor --report")
@takes_options()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of a table.")] = False,
    for_report: Annotated[
        bool, typer.Option("--report", help="What an error report should say: without paths, prompts and names.")
    ] = False,
) -> None:
    """Say what this machine has and what Moestro will use of it."""
    if for_report:
        from .report import report as find
    else:
        from .doctor import examine as find

    findings = find()
    if as_json:
        print_json(findings)
        return
    width = max(map(len, findings))
    for name, value in findings.items():
        print(f"{name:<{width}}  {value}")


def main() -> None:
    """Entry point: a MoestroError is one line and status 2, an unexpected error one line and 1; Ctrl-C is 130."""
    use_any_bytes()
    try:
        app()
    except MoestroError as error:
        say(f"error: {error}")
        sys.exit(2)
    except BaseException as error:
        if not is_fault(error):  # an exit, or an interrupt
            raise
        say(f"error: {keep_traceback(error)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
