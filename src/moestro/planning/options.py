"""What a user can set: each option once, with its name, default, help and check. Needs the standard library alone.

A new option is one new field here. The commands, `moestro.load` and `MoestroConfig` read the fields.

    >>> Options(bits=5)
    Traceback (most recent call last):
    moestro.errors.RequestError: bits=5: there are 16, 8, 4, 3, 2
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

from ..errors import RequestError
from .budget import LEAST_CONTEXT, Budget, parse_bytes, parse_gbps
from .contract import Policy
from .machine_file import check_machine
from .machines import machine_names
from .option import Checked, bits_in, named, needs, one_of, option, option_like
from .policies import DEFAULT_POLICY, POLICIES, check_policy
from .shapes import SHAPES
from .spelling import spelled

METHOD = "moestro"  # the name under which Transformers knows our quantizer and our experts function
DEVICE_NAMES = ("auto", "cpu", "cuda", "emulated")
BITS = (16, 8, 4, 3, 2)
MOST_SEQUENCES = 64  # in a step
FITTED_BITS = (4, 3, 2)  # whose scales and zeros may be fitted
FITS = ("hqq", "none")
DTYPES = {name: name for name in ("auto", "float32", "float16", "bfloat16")} | {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
}


def _device_named(value: str, name: str) -> str:
    """A device's name; of torch's, which have a number, those of the first GPU and of the CPU."""
    kind, numbered, number = value.partition(":")
    if kind not in ("cpu", "cuda") or not numbered:
        return str(one_of("device", DEVICE_NAMES)(value, name))
    if number != "0":
        raise RequestError(
            f"{spelled(name, value, quoted=True)}: Moestro takes one GPU, the first; set CUDA_VISIBLE_DEVICES to the "
            f"number of another, which is then {kind}:0"
        )
    torch: Any = sys.modules.get("torch")  # a program that has not imported it has no other current GPU
    if kind == "cuda" and torch is not None and torch.cuda.is_initialized() and torch.cuda.current_device() != 0:
        raise RequestError(f"{name}={value!r}, but torch's current GPU is another; call torch.cuda.set_device(0) first")
    return kind


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Where a model's experts may live, which policy decides about them, and how its weights are kept."""

    gpu_memory: str | int | None = option(
        None,
        "The most GPU memory to use, KV cache and activations too, like 12GiB.",
        metavar="SIZE",
        unset="0.95 of what is free",
        check=parse_bytes,
    )
    ram: str | int | None = option(
        None,
        "The most RAM to use for weights, like 48GiB.",
        metavar="SIZE",
        unset="what is free",
        check=parse_bytes,
    )
    context: int | None = option(
        None,
        "Tokens of prompt and answer of a sequence, for which GPU memory is planned; a server takes no longer ones.",
        metavar="N",
        unset="the model's, at most 4096",
        check=needs(lambda n: n >= LEAST_CONTEXT, f"at least {LEAST_CONTEXT}, a token of prompt and of answer"),
    )
    sequences: int | None = option(
        None,
        "Sequences at a time, such as beams, for each of which memory for so long a context is planned.",
        metavar="N",
        unset="one, and on a GPU alone",
        check=needs(lambda n: 1 <= n <= MOST_SEQUENCES, f"1 to {MOST_SEQUENCES}"),
    )
    policy: str | Policy = option(  # noqa: RUF009  # no call that makes something to share
        DEFAULT_POLICY,
        f"The policy that decides where experts run: {', '.join(sorted(POLICIES))}.",
        metavar="NAME",
        check=check_policy,
    )
    device: str = option(
        "auto",
        "auto (a GPU where there is one), cpu, cuda, or emulated (a pretended GPU, for tests).",
        metavar="NAME",
        check=_device_named,
    )
    link: str | float | None = option(
        None,
        "Pace copies to the GPU, like 12GB/s, to see how a slower link would do.",
        metavar="RATE",
        unset="the link's own speed",
        check=parse_gbps,
    )
    machine: str | None = option(
        None,
        f"The machine whose speeds the policy plans with: {', '.join(machine_names())}, or a file that moestro "
        "machine -o wrote.",
        metavar="NAME|FILE",
        unset="this, measured",
        check=check_machine(),
    )
    clock: str = option(
        "wall",
        "wall, or virtual: real results in the modelled time of the named machine, on the emulated device.",
        metavar="NAME",
        check=one_of("clock", ("wall", "virtual")),
    )
    profile: str | None = option(
        None,
        "A trace (moestro trace) by which popular experts are placed.",
        metavar="FILE",
        unset="none",
        check=named("a file"),
    )
    threads: int | None = option(
        None,
        "CPU threads.",
        metavar="N",
        unset="one for each physical core",
        short="-t",
        check=needs(lambda n: 1 <= n <= (os.cpu_count() or 1), f"1 to {os.cpu_count()}, the CPUs of this machine"),
    )
    bits: int | None = option(
        None, "Bits of a weight: 16, 8, 4, 3 or 2.", metavar="N", unset="the checkpoint's", check=bits_in(BITS)
    )
    expert_bits: int | None = option(
        None, "Bits of the experts' weights.", metavar="N", unset="--bits", check=bits_in(BITS)
    )
    dense_bits: int | None = option(
        None,
        "Bits of attention and shared experts; below 16 they must be on the CPU.",
        metavar="N",
        unset="--bits",
        check=bits_in(BITS),
    )
    head_bits: int | None = option(
        None,
        "Bits of output head and embedding; below 16 they must be on the CPU.",
        metavar="N",
        unset="--bits; 16 with --bits 3 or 2",
        check=bits_in(BITS),
    )
    fit: str | None = option(
        None,
        "How weights become 4, 3 or 2 bits: hqq fits zeros to them; none takes the nearest whole numbers between a "
        "group's extremes, which is faster and loses more quality. It changes nothing at 16 and 8 bits, nor of weights "
        "that a checkpoint has quantized.",
        metavar="NAME",
        unset="hqq; none for --shape, whose weights are noise",
        check=one_of("fit", FITS),
    )
    transcode: int | None = option(
        None,
        "Bits for GGUF's IQ1 to IQ3 and TQ, which are not kept: 8.",
        metavar="N",
        unset="none",
        check=bits_in((8,)),
    )
    cache: bool = option(True, "Keep weights that had to be quantized in the cache, and load them from there.")
    fuse: bool = option(
        True,
        "Run a decode step in few calls: fused on the CPU, captured and replayed on a GPU. "
        "What is changed after loading runs as Transformers wrote it.",
    )
    pack_dense: bool = option(
        True,
        "On the CPU, pack dense layers for our kernels. Packed weights can be assigned, not edited in place or "
        "resized; unpacked they stay in torch, in the checkpoint's dtype.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pack_dense and not {self.dense_bits, self.head_bits} <= {None, 16}:
            names = f"{spelled('dense_bits')} and {spelled('head_bits')}"
            raise RequestError(f"{names} are for packed layers; leave them or {spelled('pack_dense', False)} out")
        if self.clock == "virtual" and (self.device != "emulated" or self.machine is None):
            needed = f"{spelled('device', 'emulated')} and {spelled('machine', 'NAME')}"
            raise RequestError(f"{spelled('clock', 'virtual')} needs {needed}, whose time it models")

    @property
    def skips_fit(self) -> bool:
        """Whether 4, 3 and 2 bits are rounded at once, not fitted."""
        return self.fit == "none"

    @property
    def budget(self) -> Budget:
        """The memory that may be used."""
        return Budget.parse(gpu_memory=self.gpu_memory, ram=self.ram)

    @property
    def link_gbps(self) -> float | None:
        """The pace of copies to the GPU in GB/s; None for the link's own."""
        return None if self.link is None else float(self.link)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Checked):
    """Which weights are loaded, beside a model's name."""

    shape: str | None = option(
        None,
        f"Instead of MODEL: random weights of a real shape, {', '.join(SHAPES)}.",
        metavar="NAME",
        unset="none",
        check=one_of("shape", SHAPES),
    )
    revision: str | None = option(
        None,
        "Of a hub id: the branch, tag or commit.",
        metavar="NAME",
        unset="main",
        check=named("a branch, tag or commit"),
    )
    config: str | None = option(
        None,
        "Another model whose config to take.",
        metavar="MODEL",
        unset="the checkpoint's own",
        check=named("a model's name"),
    )
    tokenizer: str | None = option(
        None,
        "Another model whose tokenizer to take.",
        metavar="MODEL",
        unset="the checkpoint's own",
        check=named("a model's name"),
    )
    trust_remote_code: bool = option(False, "Run code that the checkpoint brings; without it, none is run.")
    dtype: str = option(
        "auto",
        "auto (the checkpoint's), float32, float16 or bfloat16.",
        metavar="NAME",
        check=one_of("dtype", tuple(DTYPES)),
    )
    token: str | bool | None = option(
        None,
        "For the hub: a token, True for the one that is kept here, or False for none.",
        unset="the one that is kept here, if one is",
        in_python=True,
        is_secret=True,
    )
    cache_dir: str | None = option(
        None,
        "The folder of the hub's cache.",
        unset="that of huggingface_hub, which HF_HOME sets",
        check=named("a folder"),
        in_python=True,
    )
    local_files_only: bool = option(False, "Take what the hub's cache has, and ask the hub nothing.", in_python=True)
    attn_implementation: str | None = option(
        None,
        "What computes attention, by its name in Transformers, like sdpa or eager.",
        unset="what Transformers takes for the model",
        check=named("a name that Transformers has"),
        in_python=True,
    )
    seed: int = option(
        0,
        "Seed of sampling and of random shapes; the same seed gives the same text.",
        check=needs(lambda n: 0 <= n < 2**63, "0 or more, below 2**63"),
    )


@dataclass(frozen=True, kw_only=True)
class ReplayOptions(Checked):
    """What a trace is replayed with: a policy, a machine and the model's sizes."""

    policy: str = option_like(Options, "policy", check=one_of("policy", POLICIES))
    machine: str = option_like(
        Options, "machine", default="rtx4090", help=f"The machine: {', '.join(machine_names())}, or a file.", unset=None
    )
    gpu_memory: str | int | None = option_like(
        Options, "gpu_memory", help="GPU memory for dense weights and experts.", unset="all that the machine has"
    )
    shape: str | None = option_like(
        ModelOptions,
        "shape",
        help="A real shape with published or assumed routing, as a range, in place of a trace: "
        f"{', '.join(name for name in SHAPES if name != 'tiny')}.",
    )
    as_shape: str | None = option_like(
        ModelOptions, "shape", help="A real shape's sizes and depth, for the trace's choices.", unset="the trace's"
    )
    bits: int | None = option_like(
        Options,
        "bits",
        help="Bits of the experts' weights: 32, 16, 8, 4, 3 or 2.",
        unset="the trace's",
        check=bits_in((32, *BITS)),
    )
    profile: str | None = option_like(Options, "profile")

    @property
    def gpu_bytes(self) -> int | None:
        """The GPU memory to use; None for all that the machine has."""
        return None if self.gpu_memory is None else parse_bytes(self.gpu_memory)
