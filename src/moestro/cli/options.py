"""The options that commands share: names, help and types as typer reads them. Imports no torch."""

from __future__ import annotations

from typing import Annotated

import typer

from ..planning.machines import machine_names
from ..planning.policies import POLICIES
from ..planning.shapes import SHAPES

Model = Annotated[
    str | None,
    typer.Argument(help="A checkpoint's folder, a hub id, or demo.", metavar="MODEL", show_default=False),
]
Shape = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"Instead of MODEL: random weights of a real shape, {', '.join(SHAPES)}. [default: none]",
        show_default=False,
    ),
]
GpuMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="The most GPU memory to use, KV cache and activations too, like 12GiB. [default: 0.95 of what is free]",
        show_default=False,
    ),
]
Ram = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="The most RAM to use for weights, like 48GiB. [default: what is free]",
        show_default=False,
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Tokens of prompt and answer that GPU memory is planned for. [default: the model's, at most 4096]",
        show_default=False,
    ),
]
PolicyName = Annotated[
    str,
    typer.Option("--policy", metavar="NAME", help=f"Who decides where experts run: {', '.join(sorted(POLICIES))}."),
]
DeviceName = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="NAME",
        help="auto (a GPU where there is one), cpu, cuda, or emulated (for tests).",
    ),
]
Link = Annotated[
    str | None,
    typer.Option(
        metavar="RATE", help="Pace copies to the GPU, like 12GB/s. [default: the link's own speed]", show_default=False
    ),
]
MachineName = Annotated[
    str | None,
    typer.Option(
        "--machine",
        metavar="NAME",
        help=f"Whose rates the policy reckons with: {', '.join(machine_names())}. [default: this, measured]",
        show_default=False,
    ),
]
Clock = Annotated[
    str,
    typer.Option(metavar="NAME", help="wall, or virtual: real results in the time of the named machine, emulated."),
]
Profile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="A trace by which popular experts are placed. [default: none]", show_default=False
    ),
]
Dtype = Annotated[str, typer.Option(metavar="NAME", help="auto (the checkpoint's), float32, float16 or bfloat16.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", "-t", help="CPU threads. [default: one for each physical core]", show_default=False),
]
Bits = Annotated[
    int | None,
    typer.Option(metavar="N", help="Bits of a weight: 16, 8 or 4. [default: the checkpoint's]", show_default=False),
]
ExpertBits = Annotated[
    int | None, typer.Option(metavar="N", help="The same for the experts. [default: --bits]", show_default=False)
]
DenseBits = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="The same for attention and shared experts, on the CPU. [default: --bits]", show_default=False
    ),
]
HeadBits = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="The same for output head and embedding, on the CPU. [default: --bits]", show_default=False
    ),
]
Fuse = Annotated[
    bool,
    typer.Option(
        "--fuse/--no-fuse", help="A decode step in few calls: fused on the CPU, recorded and replayed on a GPU."
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that the checkpoint brings; without it, none is run."),
]
PackDense = Annotated[
    bool,
    typer.Option(
        "--pack-dense/--no-pack-dense",
        help="On the CPU, pack dense layers for our kernels; unpacked they stay in torch, which can edit them.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Stop after this many tokens.")]
Temperature = Annotated[
    float | None,
    typer.Option(
        help="0 always takes the likeliest token. [default: the checkpoint's, or 0.7; with beams, a plain beam search]",
        show_default=False,
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Sample from the likeliest tokens that hold this much probability. [default: the checkpoint's, or 0.95]",
        show_default=False,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        help="Sample from this many likeliest tokens; 0 for all. [default: the checkpoint's, or 50]",
        show_default=False,
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        help="Leave out tokens less likely than this part of the likeliest. [default: the checkpoint's, or 0]",
        show_default=False,
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        help="Above 1 makes tokens that were there less likely. [default: the checkpoint's, or 1]", show_default=False
    ),
]
Seed = Annotated[int, typer.Option(help="Of sampling and of random shapes; the same seed gives the same text.")]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        help="End at this text; may be given several times. [default: the checkpoint's, or none]", show_default=False
    ),
]
NumBeams = Annotated[
    int | None,
    typer.Option(
        help="Beams of a beam search; the text then comes at the end. [default: the checkpoint's, or 1]",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON last, and no text before it.")]
TextFile = Annotated[str, typer.Option("--text", metavar="FILE", help="The text to read.", show_default=False)]
TraceTokens = Annotated[int, typer.Option("--tokens", metavar="N", min=1, help="Tokens to decode in all.")]
PromptTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Of each piece of the text, read at once.")]
DecodeTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Of each piece, one by one after its prompt.")]
TimelineFile = Annotated[
    str | None,
    typer.Option(
        "--timeline",
        metavar="FILE",
        help="Keep what each lane did, as a Chrome trace. [default: no]",
        show_default=False,
    ),
]
AsShape = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Sizes and depth of a real shape, its layers choosing as the trace's do. [default: the trace's]",
        show_default=False,
    ),
]
ReplayBits = Annotated[
    int | None,
    typer.Option(
        "--bits",
        metavar="N",
        help="Bits of the experts' weights: 32, 16, 8 or 4. [default: the trace's]",
        show_default=False,
    ),
]
ReplayMachine = Annotated[
    str, typer.Option("--machine", metavar="NAME", help=f"The machine: {', '.join(machine_names())}.")
]
ReplayGpuMemory = Annotated[
    str | None,
    typer.Option(
        "--gpu-memory",
        metavar="SIZE",
        help="GPU memory for dense weights and experts. [default: all that the machine has]",
        show_default=False,
    ),
]
