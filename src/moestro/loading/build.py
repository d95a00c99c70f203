"""Plans for a model that has no weights yet, builds its conductor, and tells its expert modules.

Reads sizes off the model, asks the policy where experts start, refuses what does not fit, and allocates
the store and the slots. What a generation needs in GPU memory besides weights is measured before there are any
(`gpu_need.py`); the slots get what that leaves. Does not load: `plug.py` fills the homes from a checkpoint,
`random_model.py` with random weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compute.cpu import CpuExperts, first_touch
from ..compute.experts import ExpertMath
from ..decode.capture import forget_steps, record_steps
from ..decode.cpu import fuse
from ..decode.cpu.dense import DenseFormats, dense_bytes, dense_weights, pack_dense
from ..devices import Device
from ..devices.graphs import graphs_of
from ..engine.conductor import Conductor
from ..engine.families import (
    FamilyActivation,
    FamilyLayout,
    expert_modules,
    keep_in_store,
    post_norm_of,
    why_no_experts,
)
from ..engine.gates import find_gate
from ..engine.steps import PREFILL_TOKENS, size_of
from ..engine.watch import Watch
from ..errors import BudgetError, ModelError, RequestError
from ..machine.measure import this_machine
from ..machine.probe import available_ram_bytes
from ..memory.formats import FLOAT_FORMATS, FORMATS, MATRIX_FORMATS, ExpertFormat
from ..memory.slots import SlotPool
from ..memory.store import ExpertStore
from ..planning.budget import Budget, GpuPlan, Margin, check_fits, format_bytes, share_out
from ..planning.contract import Costs, Expert, LayerSpec, ModelSpec, Phase, Placement, Policy
from ..planning.machines import THIS, Machine, machine_named
from ..planning.policies import make_policy
from ..simulate.replay import experts_room
from ..simulate.trace import Trace
from ..simulate.virtual import machine_clock
from .config import MoestroConfig
from .context import model_context
from .gpu_need import measure
from .methods import give_methods

DEFAULT_CONTEXT = 4096  # tokens that GPU memory is planned for, where the model's own context is not shorter

_GPU_SHARE = 0.95  # of free GPU memory, where none was named: other programs' share changes
# Of a CUDA budget: fragments between torch's blocks, and the workspace that cuBLAS keeps (8 MiB, 32 MiB on Hopper).
_CUDA_MARGIN = Margin(0.02, 64 * 2**20)


@dataclass(slots=True, weakref_slot=True, eq=False)
class ExpertLayer:
    """What our experts function finds on an experts module: its number and its conductor.

    watch: of the module as its experts were packed and its activation recognized; None until it has loaded.
    """

    index: int
    layout: FamilyLayout
    conductor: Conductor
    watch: Watch | None = None

    def note(self, module: Any) -> None:
        """Note what the module computes now."""
        self.watch = Watch(*module.modules(), hooks=True)

    def follow(self, module: Any) -> None:
        """Where the module was changed since, compute what it computes now.

        Raises:
            ModelError: it describes weights of another kind, and these are packed.
        """
        if self.watch is None or self.watch.holds():
            return
        if (changed := self.layout.misfit(module)) is not None:
            raise ModelError(f"{changed} of experts was changed, but their weights are packed; load the model again")
        self.conductor.forget_math(self.index)
        self.note(module)


def attach(model: Any, config: MoestroConfig, device: Device) -> Conductor:
    """Plan for a Transformers model on the meta device and make its conductor, `model.moestro`.

    Raises:
        ModelError: no experts that we could take. BudgetError: it does not fit. RequestError: a GPU
        budget without a GPU, or a context longer than the model's.
    """
    context = _planned_context(model.config, config.context)
    modules = expert_modules(model)
    if not modules:
        raise ModelError(why_no_experts(model.config))
    layouts = {name: FamilyLayout.of(name, module) for name, module in modules.items()}
    shared = [tied for tied in getattr(model, "all_tied_weights_keys", {}) if tied.rpartition(".")[0] in modules]
    if shared:
        raise ModelError(f"{shared[0]} is shared with another layer's experts, which Moestro does not support")
    fmt = FORMATS[_format_name(config.expert_bits or config.bits, model.config.dtype)]
    dense = dense_formats(model, config, device)
    spec = _spec_of(model, modules, layouts, fmt, dense_bytes(model, dense))
    math = [
        ExpertMath(layouts[name].shape, fmt, FamilyActivation(module, layouts[name]), post_norm_of(module))
        for name, module in modules.items()
    ]
    gpu_plan = _gpu_plan(model, spec, math, config, device, context)
    policy, placement, machine = _plan(spec, config, device, gpu_plan)
    store = ExpertStore([[layer.expert_bytes] * layer.experts for layer in spec.layers], placement.held)
    cpu = CpuExperts(config.threads)
    first_touch(store.memory, cpu.threads)
    if placement.slots:
        device.pin(store.memory)
    slots = device.pool(len(placement.held) + placement.slots, spec.slot_bytes)
    conductor = Conductor(
        spec=spec,
        math=math,
        policy=policy,
        device=device,
        store=store,
        slots=SlotPool(slots, placement.held, placement.warm),
        cpu=cpu,
        costs=Costs() if machine is None else machine.costs,
        gates=[find_gate(model, name) for name in modules],
        clock=machine_clock(spec, placement, machine) if machine is not None and config.clock == "virtual" else None,
        gpu_plan=None if gpu_plan is None else replace(gpu_plan, experts=slots.shape[0], expert_bytes=slots.numel()),
    )
    for index, (name, module) in enumerate(modules.items()):
        module._moestro = ExpertLayer(index, layouts[name], conductor)
        module._is_hf_initialized = True  # there is nothing in it for Transformers to initialize
    model.register_forward_pre_hook(_begin_step, with_kwargs=True)
    model.register_forward_hook(_end_step, always_call=True)
    model.moestro = conductor
    return conductor


def conduct_by(model: Any, policy: Policy, room_bytes: int, heat: Mapping[Expert, float], costs: Costs) -> Conductor:
    """Give a model whose experts are all in RAM another policy and other slots; it keeps its store and its device.

    For comparisons: held experts stay in RAM as well, so that the next policy finds them there.

    Args:
        room_bytes: device memory for experts.
    """
    old: Conductor = model.moestro
    placement = policy.place(old.spec, room_bytes, heat)
    old.let_go_of_slots()  # gives their memory back before the next is taken
    forget_steps(model)
    if placement.slots:
        old.device.pin(old.store.memory)
    memory = old.device.pool(len(placement.held) + placement.slots, old.spec.slot_bytes)
    slots = SlotPool(memory, placement.held, placement.warm)
    for expert in placement.held:
        source = old.store[expert]
        slots[expert][: source.numel()].copy_(source)
    conductor = old.hand_over(policy, slots, costs)
    for module in expert_modules(model).values():
        module._moestro = replace(module._moestro, conductor=conductor)
    model.moestro = conductor
    return conductor


def _plan(
    spec: ModelSpec, config: MoestroConfig, device: Device, gpu_plan: GpuPlan | None
) -> tuple[Policy, Placement, Machine | None]:
    """Who decides, where experts start, and the machine that is reckoned with, where one is needed.

    On a virtual clock experts get all that the dense part leaves, as in a replay, which knows no KV cache: the two
    are compared at equal budgets.

    Raises:
        BudgetError: it does not fit. RequestError: a GPU budget without a GPU, or a profile of another model.
    """
    budget, policy = config.budget, make_policy(config.policy)
    machine = None if config.machine in (None, THIS) else machine_named(config.machine)
    dense_on_gpu = device.torch_device.type != "cpu"
    room_bytes = 0 if gpu_plan is None else gpu_plan.left_bytes
    if config.clock == "virtual":
        machine = machine or this_machine(device, config.threads)
        room_bytes = experts_room(spec, machine, budget.gpu_bytes)  # the dense part is on the machine's GPU
    heat = {} if config.profile is None else Trace.load(Path(config.profile)).heat_for(spec)
    placement = policy.place(spec, room_bytes, heat)
    check_fits(
        spec,
        placement,
        gpu_bytes=room_bytes + (spec.dense_bytes if dense_on_gpu else 0),
        ram_bytes=available_ram_bytes() if budget.ram_bytes is None else budget.ram_bytes,
        dense_on_gpu=dense_on_gpu,
        ram_named=budget.ram_bytes is not None,
    )
    if machine is None and placement.slots:
        machine = this_machine(device, config.threads)
    return policy, placement, machine


def _gpu_plan(
    model: Any, spec: ModelSpec, math: Sequence[ExpertMath], config: MoestroConfig, device: Device, context: int
) -> GpuPlan | None:
    """How the GPU's memory is shared out before there are experts; None without a GPU and on a virtual clock.

    Raises:
        BudgetError: not even the dense part, the KV cache and the activations fit. RequestError: a GPU budget
        without a GPU.
    """
    if config.clock == "virtual":
        return None
    gpu_bytes = _gpu_bytes(config.budget, device)
    if device.name == "cpu":
        return None

    def plan_for(tokens: int) -> GpuPlan:
        need = measure(model, math, tokens, device.torch_device)
        return GpuPlan(
            budget_bytes=gpu_bytes,
            dense_bytes=spec.dense_bytes,
            context=tokens,
            kv_bytes=need.kv_bytes,
            activation_bytes=need.activation_bytes,
            measured=need.measured,
        )

    margin = _CUDA_MARGIN if device.name == "cuda" else Margin(0, 0)
    named = config.budget.gpu_bytes is not None
    return share_out(gpu_bytes, margin, context, plan_for, named=named, context_named=config.context is not None)


def _planned_context(config: Any, asked: int | None) -> int:
    """Tokens of prompt and answer that GPU memory is planned for.

    Raises:
        RequestError: more than the model can read.
    """
    longest = model_context(config)
    if asked is None:
        return min(longest or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if longest is not None and asked > longest:
        raise RequestError(f"--context {asked}, but the model's context is {longest}; ask for less")
    return asked


def home(conductor: Conductor, layer: int, expert: int) -> Tensor:
    """The bytes where an expert lives from the start: uint8 in RAM, or in the slot that holds it."""
    if (layer, expert) in conductor.store:
        return conductor.store[layer, expert]
    return conductor.slots[layer, expert][: conductor.spec.layers[layer].expert_bytes]


def pack_rest(model: Any, config: MoestroConfig, device: Device, *, fast: bool = False) -> None:
    """When all weights are there: pack the dense layers and fuse small operations, where they are on the CPU.

    Where they are on a device, have its decode steps recorded.

    Args:
        fast: as in `MatrixFormat.pack`.
    """
    formats = dense_formats(model, config, device)
    threads, graphs = model.moestro.cpu.threads, graphs_of(device)
    if formats is not None:
        pack_dense(model, formats, threads, fast=fast)
    modules = expert_modules(model).values()
    for module in modules:
        keep_in_store(module, module._moestro.layout)
    give_methods(model)
    if config.fuse and graphs is not None:
        record_steps(model, graphs)
    elif config.fuse:
        fuse(model, threads)
    for module in modules:
        module._moestro.note(module)


def dense_formats(model: Any, config: MoestroConfig, device: Device) -> DenseFormats | None:
    """How the dense layers will be packed; None where they stay as Transformers has them: on a GPU, or as asked.

    Raises:
        RequestError: bits for dense layers that are not on the CPU.
    """
    if device.name != "cpu":
        for option, value in {"--dense-bits": config.dense_bits, "--head-bits": config.head_bits}.items():
            if value not in (None, 16):
                raise RequestError(
                    f"{option} {value} needs the dense layers on the CPU; use --device cpu, or leave it out"
                )
        return None
    if not config.pack_dense:
        return None
    dtype = model.config.dtype
    return DenseFormats(
        other=MATRIX_FORMATS[_format_name(config.dense_bits or config.bits, dtype)],
        head=MATRIX_FORMATS[_format_name(config.head_bits or config.bits, dtype)],
    )


def _spec_of(
    model: Any, modules: Mapping[str, Any], layouts: Mapping[str, FamilyLayout], fmt: ExpertFormat, dense: int
) -> ModelSpec:
    return ModelSpec(
        layers=tuple(
            LayerSpec(
                experts=layouts[name].experts,
                neurons=layouts[name].shape.neurons,
                expert_bytes=fmt.expert_bytes(layouts[name].shape),
                splittable=not layouts[name].post_norm,
                hidden=layouts[name].shape.hidden,
                block_bytes=fmt.block_bytes(layouts[name].shape),
                matrices=3 if layouts[name].shape.has_gate else 2,
                block=fmt.block,
            )
            for name in modules
        ),
        dense_bytes=dense,
        dense_weights=dense_weights(model),
    )


def _begin_step(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """A hook that tells the conductor that a step begins, and whether it reads a prompt."""
    rows, count = size_of(args, kwargs)
    cache = kwargs.get("past_key_values")
    reads_prompt = cache is None or cache.get_seq_length() == 0 or count > PREFILL_TOKENS
    model.moestro.begin(rows * count, Phase.PREFILL if reads_prompt else Phase.DECODE)


def _end_step(model: Any, args: Any, output: Any) -> None:
    """A hook that tells it that the step is over."""
    model.moestro.end()


def _format_name(bits: int | None, dtype: torch.dtype | None) -> str:
    """The format for so many bits of a model of this dtype."""
    dtype = dtype or torch.get_default_dtype()
    if dtype not in FLOAT_FORMATS:
        raise RequestError(f"weights cannot be stored as {dtype}; use float32, float16 or bfloat16")
    if bits is None:
        return FLOAT_FORMATS[dtype]
    return f"int{bits}" if bits < 16 else "fp16" if dtype == torch.float16 else "bf16"


def _gpu_bytes(budget: Budget, device: Device) -> int:
    free_bytes = device.memory_bytes()
    if budget.gpu_bytes is None:
        return int(free_bytes * _GPU_SHARE)
    if device.name == "cpu":
        raise RequestError("--gpu-memory was given, but there is no GPU here; leave it out or use --device emulated")
    if device.name == "cuda" and budget.gpu_bytes > free_bytes:
        raise BudgetError(
            f"--gpu-memory asks for {format_bytes(budget.gpu_bytes)}, but {format_bytes(free_bytes)} are free on the "
            "GPU; ask for less or free some"
        )
    return budget.gpu_bytes
