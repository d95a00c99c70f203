"""Plan for a model that has no weights yet (`plan_for`), and carry the plan out (`build`).

`plan_for` gathers the facts: sizes of the model, free memory, and what a generation needs besides weights
(`gpu_need.py`); `planning/plan.py` decides. `build` only allocates the store and the slots and gives each experts
module its conductor. It loads nothing: `plug.py` fills store and slots from a checkpoint, `random_model.py` with random
weights.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compute.cpu import CpuExperts, first_touch
from ..compute.experts import ExpertMath
from ..decode.beams import ReorderCache
from ..decode.capture import can_capture, capture_steps, forget_steps
from ..decode.cpu import fuse
from ..decode.dense import DenseFormats, StoredWeight, dense_bytes, dense_weights, pack_dense, packable
from ..decode.hooks import Fused
from ..devices import Device
from ..engine.chunks import can_be_chunked
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
from ..engine.steps import begin_step, end_step
from ..engine.watch import Watch
from ..errors import ModelError, RequestError
from ..machine.measure import this_machine
from ..machine.probe import available_ram_bytes
from ..memory.formats import FORMATS, MATRIX_FORMATS, ExpertFormat, MatrixFormat, expert_format_named
from ..memory.slots import SlotPool
from ..memory.store import ExpertStore
from ..planning.contract import Costs, Expert, LayerSpec, ModelSpec, Placement, Policy
from ..planning.formats import format_of_bits, head_bits
from ..planning.machine_file import machine_of
from ..planning.machines import THIS
from ..planning.plan import Facts, Formats, Plan, make_plan, planned_context
from ..planning.spelling import spelled
from ..simulate.trace import Trace
from ..simulate.virtual import machine_clock
from .config import MoestroConfig
from .context import model_context
from .gpu_need import Need, refuse_on_gpu
from .methods import give_methods
from .timing import spent

logger = logging.getLogger("moestro")


@dataclass(slots=True, weakref_slot=True, eq=False)
class ExpertLayer:
    """What our experts function finds on an experts module: its layer number and its conductor.

    watch: notes of the module from when its experts were packed and its activation was recognized; None until then.
    """

    index: int
    layout: FamilyLayout
    conductor: Conductor
    watch: Watch | None = None

    def note(self, module: Any) -> None:
        """Note the module's present state, by which a later change is recognized."""
        self.watch = Watch(*module.modules(), hooks=True)

    def follow(self, module: Any) -> None:
        """Where the module was changed since it was noted, compute as it does now.

        Raises:
            ModelError: it now describes other weights than those that are packed.
        """
        if self.watch is None or self.watch.holds():
            return
        if (changed := self.layout.misfit(module)) is not None:
            raise ModelError(f"{changed} of experts was changed, but their weights are packed; load the model again")
        self.conductor.forget_math(self.index)
        self.note(module)


@dataclass(frozen=True, slots=True)
class StoredFormats:
    """The forms that a checkpoint has its weights in and that they keep.

    experts: of each layer's experts. dense: of weights outside the experts, by the model's names.
    """

    experts: Sequence[ExpertFormat]
    dense: Mapping[str, MatrixFormat]


def attach(model: Any, config: MoestroConfig, device: Device, stored: StoredFormats | None = None) -> Conductor:
    """Plan for a Transformers model on the meta device and make its conductor, `model.moestro`.

    Args:
        stored: what keeps its form; None where the config says all.

    Raises:
        What `plan_for` does.
    """
    return build(plan_for(model, config, device, stored), model, device, config.threads, config.budget.ram_bytes)


def plan_for(model: Any, config: MoestroConfig, device: Device, stored: StoredFormats | None = None) -> Plan:
    """The plan for a Transformers model on the meta device, from its sizes and the machine's free memory.

    Args:
        stored: as in `attach`.

    Raises:
        ModelError: it has no experts that Moestro can store.
        BudgetError: it does not fit.
        RequestError: a GPU budget without a GPU, a context longer than the model's, or a profile of another model.
    """
    longest = model_context(model.config)
    planned_context(longest, config.context)  # refused before the work
    layouts = _layouts_of(model)
    experts: Sequence[ExpertFormat]
    if stored is None:
        experts = [FORMATS[_format_name(config.expert_bits or config.bits, model.config.dtype)]] * len(layouts)
    else:
        experts = stored.experts
    dense = dense_formats(model, config, device, stored)
    of_experts = (fmt for of in experts for fmt in of.matrices.values())
    refuse_on_gpu(device, (*of_experts, *({} if stored is None else stored.dense).values()))
    spec = _spec_of(model, layouts, experts, dense_bytes(model, dense))
    virtual = config.clock == "virtual"
    machine = None if config.machine in (None, THIS) else machine_of(config.machine)
    free_gpu_bytes = None if device.accelerator is None else device.memory_bytes()
    if free_gpu_bytes is not None and device.is_pretended:  # a pretended GPU has as much memory as is asked for
        free_gpu_bytes = max(free_gpu_bytes, config.budget.gpu_bytes or 0)
    facts = Facts(
        free_ram_bytes=available_ram_bytes(),
        free_gpu_bytes=free_gpu_bytes,
        margin=device.margin,
        dense_on_gpu=device.dense_on_gpu,
        machine=this_machine(device, config.threads) if virtual and machine is None else machine,
    )
    logger.debug("planning from %s; dense part %d bytes, experts %d", facts, spec.dense_bytes, spec.expert_bytes)
    decide = partial(
        make_plan,
        spec,
        facts=facts,
        formats=Formats(tuple(fmt.name for fmt in experts), *_dense_names(model, dense)),
        policy=config.policy,
        budget=config.budget,
        context=config.context,
        sequences=config.sequences,
        longest=longest,
        heat=None if config.profile is None else Trace.load(Path(config.profile)).heat_for(spec),
        virtual=virtual,
    )
    captures = config.fuse and device.graphs_have_memory and can_capture(model)
    need = Need(model, _math_of(model, layouts, experts), device.torch_device, captures)
    in_chunks = can_be_chunked(model)
    plan = decide(footprint=need.measured, chunked=need.measured if in_chunks else None)
    if plan.gpu is not None:
        estimated = decide(
            footprint=need.estimated,
            chunked=need.estimated if in_chunks else None,
            policy=copy.deepcopy(config.policy),  # one that was given has placed its experts
        )
        need.say_if_changed(estimated, plan)
    logger.debug("planned for %d tokens with policy %s: %s", plan.context, plan.policy, plan.in_words())
    if plan.check().machine is None and plan.placement.slots:
        plan = replace(plan, machine=this_machine(device, config.threads))
    return plan


def build(
    plan: Plan, model: Any, device: Device, threads: int | None = None, ram_budget_bytes: int | None = None
) -> Conductor:
    """Carry out a plan for a model on the meta device: allocate the store and the slots, make `model.moestro`.

    Decides and measures nothing.

    Args:
        plan: what to build; it fits.
        threads: of the CPU's kernels; None for one on each physical core.
        ram_budget_bytes: that the user named, which prompts keep to as well.
    """
    layouts, spec, placement = _layouts_of(model), plan.spec, plan.placement
    modules = expert_modules(model)
    cpu = CpuExperts(threads)
    with spent("packing"):
        store = ExpertStore([[layer.expert_bytes] * layer.experts for layer in spec.layers], placement.held)
        first_touch(store.memory, cpu.threads)
    conductor = Conductor(
        spec=spec,
        math=_math_of(model, layouts, [expert_format_named(name) for name in plan.formats.experts]),
        policy=plan.decider,
        device=device,
        store=store,
        slots=_slots(spec, placement, store, device),
        cpu=cpu,
        costs=plan.costs,
        gates=[find_gate(model, name) for name in modules],
        clock=machine_clock(spec, placement, plan.machine) if plan.virtual and plan.machine is not None else None,
        gpu_plan=plan.gpu,
        ram_budget_bytes=ram_budget_bytes,
    )
    for index, (name, module) in enumerate(modules.items()):
        module._moestro = ExpertLayer(index, layouts[name], conductor)
        module._is_hf_initialized = True  # Transformers has no weights to initialize here
    model.register_forward_pre_hook(begin_step, with_kwargs=True)
    model.register_forward_hook(end_step, always_call=True)
    model.moestro = conductor
    return conductor


def conduct_by(model: Any, policy: Policy, room_bytes: int, heat: Mapping[Expert, float], costs: Costs) -> Conductor:
    """Give a model whose experts are all in RAM another policy and other slots; store and device stay.

    This is for comparisons: experts that the policy holds on the GPU stay in RAM too, where the next policy finds them.

    Args:
        room_bytes: device memory for experts.
        heat: how often each expert is used.
        costs: the rates that the policy decides by.
    """
    old: Conductor = model.moestro
    placement = policy.place(old.spec, room_bytes, heat)
    old.let_go_of_slots()  # gives their memory back before the next is taken
    forget_steps(model)
    slots = _slots(old.spec, placement, old.store, old.device)
    for expert in placement.held:
        source = old.store[expert]
        slots[expert][: source.numel()].copy_(source)
    conductor = old.hand_over(policy, slots, costs)
    for module in expert_modules(model).values():
        module._moestro = replace(module._moestro, conductor=conductor)
    model.moestro = conductor
    return conductor


def _slots(spec: ModelSpec, placement: Placement, store: ExpertStore, device: Device) -> SlotPool:
    """The slots of a placement in a device's memory; the store is pinned where copies will come from it."""
    if placement.slots and device.accelerator is not None:
        device.accelerator.pin(store.memory)
    memory = device.pool(len(placement.held) + placement.slots, spec.slot_bytes)
    return SlotPool(memory, placement.held, placement.warm)


def home(conductor: Conductor, layer: int, expert: int) -> Tensor:
    """The bytes to pack an expert into, uint8 [bytes of the expert]: in the store, or in the slot that holds it."""
    if (layer, expert) in conductor.store:
        return conductor.store[layer, expert]
    return conductor.slots[layer, expert][: conductor.spec.layers[layer].expert_bytes]


def pack_rest(
    model: Any,
    config: MoestroConfig,
    device: Device,
    *,
    fast: bool = False,
    stored: StoredFormats | None = None,
    weights: Mapping[str, StoredWeight] | None = None,
) -> None:
    """Finish a model whose weights have loaded: on the CPU pack its dense layers and fuse small operations.

    On a device, have its decode steps captured.

    Args:
        fast: find scales at once rather than fit them, as in `MatrixFormat.pack`, whatever the config says.
        stored: as in `attach`. weights: those outside the experts that are packed from a checkpoint's own bytes, by
            the model's names.
    """
    dense = dense_formats(model, config, device, stored)
    threads = model.moestro.cpu.threads
    if dense is not None:
        on = None if device.dense_is_packable else device.torch_device
        with spent("packing"):
            pack_dense(model, dense, threads, fast=fast or config.skips_fit, stored=weights, on=on)
    modules = expert_modules(model).values()
    for module in modules:
        keep_in_store(module, module._moestro.layout)
    give_methods(model)
    if config.fuse and not hasattr(model, "_reorder_cache"):
        model._reorder_cache = ReorderCache()
    if config.fuse and device.accelerator is not None:
        capture_steps(model, device.accelerator.graphs())
    elif config.fuse:
        with spent("warm_up"):
            fuse(model, threads)
        fused = Counter(type(each.forward).__name__ for each in model.modules() if isinstance(each.forward, Fused))
        logger.debug("of %d MoE layers and what is around them, fused: %s", len(modules), dict(fused))
    for module in modules:
        module._moestro.note(module)


def dense_formats(
    model: Any, config: MoestroConfig, device: Device, stored: StoredFormats | None = None
) -> DenseFormats | None:
    """The formats of the dense layers; None where all stay in torch: with --no-pack-dense, or floats on a GPU.

    Args:
        stored: as in `attach`.

    Raises:
        RequestError: bits below 16 for dense layers that are not on the CPU.
    """
    if not device.dense_is_packable:
        for option, value in {"dense_bits": config.dense_bits, "head_bits": config.head_bits}.items():
            if value not in (None, 16):
                raise RequestError(
                    f"{spelled(option, value)} needs the dense layers on the CPU; use {spelled('device', 'cpu')}, "
                    "or leave it out"
                )
        kept = {} if stored is None else {name: fmt for name, fmt in stored.dense.items() if fmt.is_quantized}
        packs = config.pack_dense and device.dense_keeps_form and kept
        return DenseFormats(None, None, kept) if packs else None
    if not config.pack_dense:
        return None
    dtype = model.config.dtype
    return DenseFormats(
        other=MATRIX_FORMATS[_format_name(config.dense_bits or config.bits, dtype)],
        head=MATRIX_FORMATS[_format_name(head_bits_of(config), dtype)],
        stored={} if stored is None else stored.dense,
    )


def _dense_names(model: Any, formats: DenseFormats | None) -> tuple[str | None, str | None]:
    """The formats of the dense layers and of head and embedding, by name; several are joined, the largest first."""
    sizes: tuple[Counter[str], Counter[str]] = Counter(), Counter()
    for layer in () if formats is None else packable(model, formats):
        sizes[layer.is_head][layer.fmt.name] += layer.n_bytes
    dense, head = ("+".join(name for name, _ in of.most_common()) or None for of in sizes)
    return dense, head


def _layouts_of(model: Any) -> dict[str, FamilyLayout]:
    """The layout of each experts module's weights, by the module's name.

    Raises:
        ModelError: there are no experts, or none that Moestro can store.
    """
    modules = expert_modules(model)
    if not modules:
        raise ModelError(why_no_experts(model.config))
    layouts = {name: FamilyLayout.of(name, module) for name, module in modules.items()}
    shared = [tied for tied in getattr(model, "all_tied_weights_keys", {}) if tied.rpartition(".")[0] in modules]
    if shared:
        raise ModelError(f"{shared[0]} is shared with another layer's experts, which Moestro does not support")
    return layouts


def _math_of(model: Any, layouts: Mapping[str, FamilyLayout], formats: Sequence[ExpertFormat]) -> list[ExpertMath]:
    return [
        ExpertMath(layouts[name].shape, fmt, FamilyActivation(module, layouts[name]), post_norm_of(module))
        for (name, module), fmt in zip(expert_modules(model).items(), formats, strict=True)
    ]


def _spec_of(model: Any, layouts: Mapping[str, FamilyLayout], formats: Sequence[ExpertFormat], dense: int) -> ModelSpec:
    return ModelSpec(
        layers=tuple(
            LayerSpec(
                experts=layout.experts,
                neurons=layout.shape.neurons,
                expert_bytes=fmt.expert_bytes(layout.shape),
                splittable=not layout.post_norm,
                hidden=layout.shape.hidden,
                block_bytes=fmt.block_bytes(layout.shape),
                matrices=3 if layout.shape.has_gate else 2,
                block=fmt.block,
                head_bytes=fmt.head_bytes(layout.shape),
            )
            for layout, fmt in zip(layouts.values(), formats, strict=True)
        ),
        dense_bytes=dense,
        dense_weights=dense_weights(model),
    )


def head_bits_of(config: MoestroConfig) -> int | None:
    """Bits of head and embedding, as the options have them."""
    return head_bits(config.bits, config.head_bits)


def _format_name(bits: int | None, dtype: torch.dtype | None) -> str:
    """The format for so many bits of a model of this dtype."""
    return format_of_bits(bits, str(dtype or torch.get_default_dtype()).removeprefix("torch."))
