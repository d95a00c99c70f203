"""What a model would need and how fast it would be, before a weight is read: `moestro plan`. Imports no torch.

outlook("org/name", ModelOptions(), Options(bits=4, machine="rtx4090")).choice.verdict    # "FAST"

The plan is the one that `loading/build.py` carries out, made from the same sizes by the same function; what is measured
there on a model without weights is estimated here.
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from ..compute.cores import core_cpus
from ..errors import BudgetError, ModelError, RequestError
from ..machine import probe
from ..machine.kept import identity, kept_machine
from ..planning.budget import CUDA_MARGIN, Margin, exact_bytes
from ..planning.machine_file import machine_of
from ..planning.machines import THIS, Machine, assumed_machine, machine_named
from ..planning.model_config import families
from ..planning.options import BITS, ModelOptions, Options
from ..planning.plan import Facts, Plan, make_plan
from ..planning.policies import policy_name
from ..planning.spelling import spelled
from ..planning.text_shape import Footprint, TextShape, expert_workspace, has_fused_attention, text_shape
from ..simulate.forecast import Forecast, StepModel, Work, forecast
from .survey import Survey, survey
from .survey.found import ITEM_BYTES
from .survey.sizes import Sized, sized

FAST, GOOD, USABLE, SLOW, NO = "FAST", "GOOD", "USABLE", "SLOW", "NO"
_LEAST_TOK_S = ((15.0, FAST), (7.0, GOOD), (2.0, USABLE), (0.0, SLOW))
_FREE_RAM = 0.92  # of a named machine's RAM: the rest is the system's
_WORTH = 1.05  # times as fast: a change that brings less is not proposed


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model would run: its rates, and what is free there. is_here: whether it is this machine."""

    machine: Machine
    free_ram_bytes: int
    free_gpu_bytes: int | None
    is_here: bool

    @property
    def is_measured(self) -> bool:
        """Whether its rates were measured, here or where the machine's file was written."""
        return self.machine.rates is not None


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run a model: its options, the plan, the bytes by tier and the speeds; no speeds where it does not fit.

    disk_bytes: of the files, and of the kept copy of weights that have to be quantized.
    """

    options: Options
    plan: Plan
    gpu_bytes: int
    ram_bytes: int
    disk_bytes: int
    kv_bytes: int
    activation_bytes: int
    dense_bytes: int
    speeds: Forecast | None

    @property
    def fits(self) -> bool:
        """Whether the memory is enough."""
        return self.plan.why_not is None

    @property
    def verdict(self) -> str:
        """One word."""
        if self.speeds is None:
            return NO
        decode = self.speeds.decode.middle
        return next(word for least, word in _LEAST_TOK_S if decode >= least)


@dataclass(frozen=True, slots=True)
class Gain:
    """A change, in the words of a user, and what it would make of decode; before: tokens a second without it."""

    change: str
    decode_tok_s: float
    before_tok_s: float


@dataclass(frozen=True)
class Outlook:
    """What is known of a model before it is downloaded. table: by bits, None for the checkpoint's own form."""

    survey: Survey
    source: ModelOptions
    place: Place
    choice: Choice
    table: tuple[tuple[int | None, Choice], ...]
    gains: tuple[Gain, ...]

    @property
    def best(self) -> Choice:
        """What to run: as asked where it fits, else the most bits that do; as asked where nothing fits."""
        return self.choice if self.choice.fits else next((one for _, one in self.table if one.fits), self.choice)


def place_of(options: Options) -> Place:
    """The machine that the options name, or this one, with what is free."""
    budget = options.budget
    if options.machine not in (None, THIS):
        machine = machine_of(str(options.machine))
        has_gpu = bool(machine.costs.gpu_gbps) and options.device in ("auto", "cuda")
        all_gpu = machine.gpu_bytes if has_gpu else None
        return Place(_without_gpu(machine, has_gpu), int(machine.ram_bytes * _FREE_RAM), all_gpu, is_here=False)
    card = probe.nvidia_gpu()
    gpu = card if options.device in ("auto", "cuda") else None
    if options.device == "cuda" and gpu is None:
        raise RequestError(
            f"{spelled('device', 'cuda')}, but there is no NVIDIA GPU here; use {spelled('device', 'cpu')}, or name a "
            f"{spelled('machine')}"
        )
    cores = options.threads or len(core_cpus())
    free = None if gpu is None else gpu.free_bytes
    kept = kept_machine(identity(cores, card))
    if options.device == "emulated":  # a pretended GPU has as much memory as is asked for
        half = probe.available_ram_bytes() // 2
        machine, free = _assumed(cores, "a pretended GPU", half), max(half, budget.gpu_bytes or 0)
    elif kept is not None:
        machine = _without_gpu(kept, gpu is not None)
    else:
        machine = _assumed(cores, gpu and gpu.name, 0 if gpu is None else gpu.total_bytes)
    return Place(machine, probe.available_ram_bytes(), free, is_here=True)


def _assumed(cores: int, gpu: str | None, gpu_bytes: int) -> Machine:
    features, ram_bytes = probe.cpu_features(), probe.total_ram_bytes()
    return assumed_machine(probe.cpu_model(), cores, features, ram_bytes, gpu, gpu_bytes)


def _without_gpu(machine: Machine, has_gpu: bool) -> Machine:
    if has_gpu:
        return machine
    return replace(machine, gpu_bytes=0, costs=replace(machine.costs, gpu_gbps=None, link_gbps=None, gpu_gflops=None))


def outlook(model: str | None, source: ModelOptions, options: Options, place: Place | None = None) -> Outlook:
    """What a model would need and how fast it would be with these options, and with others.

    Raises:
        MoestroError: no such model, or options that do not go together; one line.
    """
    found = survey(model, source, transcode=options.transcode is not None)
    place = place or place_of(options)
    choice = choose(found, options, place)
    table: list[tuple[int | None, Choice]] = []
    if not found.stored:
        for bits in BITS:
            table.append((bits, choose(found, _with_bits(options, bits), place)))
    table.append((None, choose(found, _with_bits(options, None), place)))
    return Outlook(found, source, place, choice, tuple(table), tuple(_gains(found, options, place, choice)))


def _with_bits(options: Options, bits: int | None) -> Options:
    return replace(options, bits=bits, expert_bits=None)


def choose(found: Survey, options: Options, place: Place, *, at_least: bool = False) -> Choice:
    """The plan with these options, its bytes and its speeds.

    Args:
        at_least: count no activations, which are estimated high, so that what does not fit surely does not.

    Raises:
        ModelError, RequestError: options that this model does not take.
    """
    on_gpu = place.free_gpu_bytes is not None
    pretended = options.device == "emulated"
    sizes = sized(found, options, on_gpu=on_gpu)
    shape = text_shape(found.config, ITEM_BYTES[found.dtype])
    footprint, chunked = _footprints(found, shape, sizes, on_cpu=not on_gpu)
    if at_least:
        footprint, chunked = partial(_cache_alone, shape), None
    facts = Facts(
        free_ram_bytes=place.free_ram_bytes,
        free_gpu_bytes=place.free_gpu_bytes,
        margin=CUDA_MARGIN if on_gpu and not pretended else Margin(0.0, 0),
        dense_on_gpu=on_gpu and not pretended,
        machine=place.machine,
    )
    plan = make_plan(
        sizes.spec,
        footprint,
        facts,
        chunked=chunked,
        formats=sizes.formats,
        policy=copy.deepcopy(options.policy),  # which places experts here that are never loaded
        budget=options.budget,
        context=options.context,
        sequences=options.sequences,
        longest=shape.context,
    )
    return _choice(found, options, place, sizes, plan, footprint(plan.context), facts.dense_on_gpu)


def _choice(
    found: Survey, options: Options, place: Place, sizes: Sized, plan: Plan, need: Footprint, dense_on_gpu: bool
) -> Choice:
    gpu = plan.gpu
    activation_bytes = need.activation_bytes if gpu is None else gpu.activation_bytes
    dense_bytes = sizes.spec.dense_bytes
    kv_bytes = (plan.kv_bytes or need.kv_bytes) if gpu is None else gpu.kv_bytes
    ram_bytes = plan.ram_bytes + (0 if dense_on_gpu else dense_bytes) + (kv_bytes if gpu is None else 0)
    gpu_bytes = 0 if gpu is None else gpu.expert_bytes + kv_bytes + activation_bytes + dense_bytes * dense_on_gpu
    kept = _is_quantized_here(found, options) and options.cache
    speeds = None
    if plan.why_not is None:
        work = work_of(found, sizes)
        steps = StepModel(sizes.spec, plan.decider, place.machine, work, plan.slots)
        speeds = forecast(steps, need.kv_bytes / 2)  # a cache that is half full
    return Choice(
        options=options,
        plan=plan,
        gpu_bytes=gpu_bytes,
        ram_bytes=ram_bytes,
        disk_bytes=found.weights_bytes + (sizes.spec.expert_bytes + dense_bytes if kept else 0),
        kv_bytes=kv_bytes,
        activation_bytes=activation_bytes,
        dense_bytes=dense_bytes,
        speeds=speeds,
    )


def work_of(found: Survey, sizes: Sized) -> Work:
    """What a model computes in a step."""
    shape = text_shape(found.config, ITEM_BYTES[found.dtype])
    return Work(
        formats=sizes.formats.experts,
        dense=sizes.dense,
        top_k=found.top_k,
        heads_width=shape.heads_width,
        attention_layers=len(shape.caches),
        is_plain=not has_fused_attention(found.config),
    )


def _footprints(
    found: Survey, shape: TextShape, sizes: Sized, *, on_cpu: bool
) -> tuple[Callable[[int], Footprint], Callable[[int, int], Footprint] | None]:
    make: Any = partial(shape.footprint, experts_bytes=expert_workspace(sizes.spec), scores_of_two_widths=on_cpu)
    whole = families().get(str(found.config.get("model_type")), {}).get("reads_whole")

    def in_chunks(context: int, chunk: int) -> Footprint:
        return make(context, chunk=chunk)  # type: ignore[no-any-return]

    return make, None if whole else in_chunks


def _cache_alone(shape: TextShape, context: int) -> Footprint:
    return Footprint(context, shape.kv_bytes(context), 0, 0, measured=False)


def _is_quantized_here(found: Survey, options: Options) -> bool:
    asked = (options.bits, options.expert_bits, options.dense_bits, options.head_bits)
    return not found.stored and found.kind != "shape" and any(bits is not None and bits < 16 for bits in asked)


def _gains(found: Survey, options: Options, place: Place, choice: Choice) -> list[Gain]:
    """Changes that would make decode faster, the largest first."""
    if choice.speeds is None:
        return []
    before = choice.speeds.decode.middle
    others: list[tuple[str, Options, Place]] = []
    if not found.stored:
        now = options.bits or 16
        others += [(f"--bits {bits}", _with_bits(options, bits), place) for bits in BITS if bits < now]
    if place.free_gpu_bytes is None:
        others += [_with_gpu(name, options, place) for name in ("rtx3060", "rtx4090")]
    else:
        more = place.free_gpu_bytes * 2
        doubled = replace(
            place, free_gpu_bytes=more, machine=replace(place.machine, gpu_bytes=2 * place.machine.gpu_bytes)
        )
        others.append(("a GPU with twice the memory", replace(options, gpu_memory=None), doubled))
        if policy_name(options.policy) != "moestro":
            others.append(("--policy moestro", replace(options, policy="moestro"), place))
    costs = place.machine.costs
    faster = replace(place.machine, costs=replace(costs, cpu_gbps=2 * (costs.cpu_gbps or 0.0)))
    others.append(("RAM that is read twice as fast", options, replace(place, machine=faster)))
    gains = []
    for change, changed, where in others:
        try:
            then = choose(found, changed, where)
        except (ModelError, RequestError, BudgetError):  # one that this model does not take
            continue
        if then.speeds is not None and then.speeds.decode.middle > before * _WORTH:
            gains.append(Gain(change, then.speeds.decode.middle, before))
    return sorted(gains, key=lambda gain: -gain.decode_tok_s)


def _with_gpu(name: str, options: Options, place: Place) -> tuple[str, Options, Place]:
    """This machine with the GPU of another."""
    card = machine_named(name)
    costs = replace(
        place.machine.costs,
        gpu_gbps=card.costs.gpu_gbps,
        gpu_gflops=card.costs.gpu_gflops,
        link_gbps=card.costs.link_gbps,
    )
    machine = replace(place.machine, gpu_bytes=card.gpu_bytes, costs=costs)
    changed = replace(options, device="auto", dense_bits=None, head_bits=None)
    return f"a GPU like that of {name}", changed, replace(place, machine=machine, free_gpu_bytes=card.gpu_bytes)


def command_of(found: Survey, source: ModelOptions, options: Options) -> str:
    """What to type to run it so."""
    words = ["moestro", "run", *(["--shape", source.shape] if source.shape else [found.model])]
    for kind, given in ((ModelOptions, source), (Options, options)):
        for one in fields(kind):
            value = getattr(given, one.name)
            if one.name in ("shape", "machine") or value == one.default:
                continue
            flag = f"--{one.name.replace('_', '-')}"
            if isinstance(value, bool):
                words.append(flag if value else f"--no-{flag[2:]}")
            else:
                words += [flag, exact_bytes(value) if one.name in ("gpu_memory", "ram") else str(value)]
    return f'{shlex.join(words)} "Once upon a time"'
