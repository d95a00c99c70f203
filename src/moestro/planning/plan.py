"""The plan of a run: what goes where and whether it fits, decided before there are weights. A value, no side effects.

    >>> spec = ModelSpec((LayerSpec(experts=8, neurons=64, expert_bytes=2**20),), dense_bytes=2**20)
    >>> facts = Facts(free_ram_bytes=2**20)
    >>> make_plan(spec, lambda tokens: Footprint(0, 0), facts, formats=Formats(("bf16",)), policy="cpu-only").in_words()
    'does not fit: the model needs 9.0 MiB of RAM (experts 8.0 MiB), but this machine has free 1.0 MiB; free memory or \
choose a smaller model'

Every fact of the machine is an argument. `loading/build.py` gathers them and carries a plan out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace

from ..errors import BudgetError, RequestError
from .budget import Budget, Margin, columns_for, format_bytes, round_up
from .chunks import GPU_SHARE, largest_chunk
from .contract import Costs, Expert, LayerSpec, ModelSpec, Placement, Policy
from .gpu_plan import GpuPlan, share_out
from .machines import Machine
from .policies import make_policy
from .spelling import spelled
from .text_shape import Footprint

DEFAULT_CONTEXT = 4096  # tokens that GPU memory is planned for, where the model's own context is not shorter

NO_MARGIN, _NO_BUDGET = Margin(0.0, 0), Budget()
_GPU_SHARE = 0.95  # of free GPU memory, where none was named: other programs' share changes


@dataclass(frozen=True, slots=True)
class Facts:
    """What is true of the machine, found out before a plan is made.

    free_gpu_bytes: None without a GPU. dense_on_gpu: whether dense weights take none of the RAM. machine: whose rates
    a policy reckons with; None where none was named.
    """

    free_ram_bytes: int
    free_gpu_bytes: int | None = None
    margin: Margin = NO_MARGIN
    dense_on_gpu: bool = False
    machine: Machine | None = None


@dataclass(frozen=True, slots=True)
class Formats:
    """Names of the formats that weights are stored in: of each layer's experts, of dense layers, and of the head.

    Dense layers in several are named like "q4_k+q6_k", the largest first. None where Transformers keeps the weights.
    """

    experts: tuple[str, ...]
    dense: str | None = None
    head: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """All that was decided about a run.

    kv_bytes: of the RAM, for the keys and values of as many sequences as were named; 0 where none were, or where they
    are on the GPU. room_bytes: of the GPU, for experts. heat: how often each expert is used, as far as a profile says.
    costs: the rates that the policy reckons with. why_not: why it does not fit; None where it does. decider: the policy
    as it placed the experts, which a plan read from JSON places anew.
    """

    spec: ModelSpec
    formats: Formats
    context: int
    gpu: GpuPlan | None
    kv_bytes: int
    room_bytes: int
    policy: str
    heat: tuple[tuple[Expert, float], ...]
    placement: Placement
    machine: Machine | None
    virtual: bool
    why_not: str | None
    decider: Policy = field(compare=False, repr=False)

    @property
    def costs(self) -> Costs:
        """Rates of the machine; none where nothing is copied and no machine was named."""
        return Costs() if self.machine is None else self.machine.costs

    @property
    def slots(self) -> int:
        """Slots of experts on the GPU, those of held experts too."""
        return len(self.placement.held) + self.placement.slots

    @property
    def ram_bytes(self) -> int:
        """Bytes of the experts that are in RAM."""
        return self.spec.expert_bytes - sum(self.spec.layers[layer].expert_bytes for layer, _ in self.placement.held)

    def check(self) -> Plan:
        """This plan, where it fits.

        Raises:
            BudgetError: it does not, with what is needed, what there is and what to ask for.
        """
        if self.why_not is not None:
            raise BudgetError(self.why_not)
        return self

    def in_words(self) -> str:
        """The plan in one line."""
        if self.why_not is not None:
            return f"does not fit: {self.why_not}"
        return f"{format_bytes(self.ram_bytes)} of experts in RAM" if self.gpu is None else self.gpu.in_words()

    def verdict(self) -> str:
        """Whether it fits, in a few words."""
        return f"{self.context} tokens fit" if self.why_not is None else f"{self.context} tokens do not fit"

    def to_json(self) -> str:
        """The plan as text, from which `from_json` makes an equal one."""
        shallow = {name: getattr(self, name) for name in self.__slots__ if name != "decider"}
        placement = {"held": sorted(self.placement.held), "slots": self.placement.slots, "warm": self.placement.warm}
        return json.dumps(shallow | {"placement": placement}, default=asdict)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote, with a policy that has placed its experts again."""
        values = json.loads(text)
        spec, machine = values["spec"], values["machine"]
        values["spec"] = ModelSpec(**spec | {"layers": tuple(LayerSpec(**layer) for layer in spec["layers"])})
        values["formats"] = Formats(**values["formats"] | {"experts": tuple(values["formats"]["experts"])})
        values["gpu"] = None if values["gpu"] is None else GpuPlan(**values["gpu"])
        values["machine"] = machine and Machine.from_values(machine)
        values["heat"] = tuple((tuple(expert), heat) for expert, heat in values["heat"])
        held, warm = (values["placement"][name] for name in ("held", "warm"))
        values["placement"] = Placement(
            frozenset(map(tuple, held)), values["placement"]["slots"], tuple(map(tuple, warm))
        )
        decider = make_policy(values["policy"])
        decider.place(values["spec"], values["room_bytes"], dict(values["heat"]))
        return cls(**values, decider=decider)


def make_plan(
    spec: ModelSpec,
    footprint: Callable[[int], Footprint],
    facts: Facts,
    *,
    chunked: Callable[[int, int], Footprint] | None = None,
    formats: Formats,
    policy: str | Policy,
    budget: Budget = _NO_BUDGET,
    context: int | None = None,
    sequences: int | None = None,
    longest: int | None = None,
    heat: Mapping[Expert, float] | None = None,
    virtual: bool = False,
) -> Plan:
    """Decide where everything goes. Nothing is measured, asked or allocated.

    On a virtual clock experts get all that the dense part leaves, as in a replay, which knows no KV cache: the two
    are compared at equal budgets.

    Args:
        footprint: what so many tokens need beside weights.
        chunked: the same where a prompt is read so many tokens at a time; None where it cannot be.
        context: tokens to plan for; None for the model's own, at most `DEFAULT_CONTEXT`, and fewer if only these fit.
        sequences: of so many tokens each, at a time; None for one, whose cache is planned on a GPU alone.
        longest: the model's own context; None where it is not known.
        virtual: whether time is modelled, as that of `facts.machine`.

    Raises:
        RequestError: a GPU budget without a GPU, or a context longer than the model's. BudgetError: the budget is
            none that a virtual machine has.
    """
    tokens, gpu, why_not = planned_context(longest, context), None, None
    kv_bytes = 0
    if virtual:
        assert facts.machine is not None
        room_bytes = experts_room(spec, facts.machine, budget.gpu_bytes)  # the dense part is on the machine's GPU
    elif facts.free_gpu_bytes is not None:
        need = (footprint, chunked, sequences or 1)
        gpu, why_not = _gpu_plan(spec, *need, facts, budget, tokens, context is not None)
        tokens, room_bytes = gpu.context, max(0, gpu.left_bytes)
    elif budget.gpu_bytes is not None:
        emulated = spelled("device", "emulated")
        raise RequestError(
            f"{spelled('gpu_memory')} was given, but there is no GPU here; leave it out or use {emulated}"
        )
    else:
        room_bytes = 0
        kv_bytes = 0 if sequences is None else _kv_bytes(footprint(tokens), tokens, sequences)
    decider = make_policy(policy) if isinstance(policy, str) else policy
    heat = heat or {}
    placement = decider.place(spec, room_bytes, heat)
    if why_not is None:
        try:
            check_fits(
                spec,
                placement,
                gpu_bytes=room_bytes + (spec.dense_bytes if facts.dense_on_gpu else 0),
                ram_bytes=facts.free_ram_bytes if budget.ram_bytes is None else budget.ram_bytes,
                dense_on_gpu=facts.dense_on_gpu,
                ram_named=budget.ram_bytes is not None,
                kv_bytes=kv_bytes,
            )
        except BudgetError as error:
            why_not = str(error)
    if gpu is not None:
        slots = len(placement.held) + placement.slots
        gpu = replace(gpu, experts=slots, expert_bytes=slots * spec.slot_bytes)
    return Plan(
        spec=spec,
        formats=formats,
        context=tokens,
        gpu=gpu,
        kv_bytes=kv_bytes,
        room_bytes=room_bytes,
        policy=decider.name,
        heat=tuple(heat.items()),
        placement=placement,
        machine=facts.machine,
        virtual=virtual,
        why_not=why_not,
        decider=decider,
    )


def _gpu_plan(
    spec: ModelSpec,
    footprint: Callable[[int], Footprint],
    chunked: Callable[[int, int], Footprint] | None,
    sequences: int,
    facts: Facts,
    budget: Budget,
    context: int,
    context_named: bool,
) -> tuple[GpuPlan, str | None]:
    """How the GPU's memory is shared out before there are experts, and why that does not fit, where it does not."""
    free_bytes, named = facts.free_gpu_bytes or 0, budget.gpu_bytes is not None
    gpu_bytes = int(free_bytes * _GPU_SHARE) if budget.gpu_bytes is None else budget.gpu_bytes
    margin_bytes = facts.margin.of(gpu_bytes)

    def plan_for(tokens: int) -> GpuPlan:
        found = {tokens: footprint(tokens)}

        def fits(chunk: int) -> bool:
            if chunk not in found:
                assert chunked is not None
                found[chunk] = chunked(tokens, chunk)
            return found[chunk].step_bytes <= gpu_bytes * GPU_SHARE

        chunk = tokens if chunked is None else largest_chunk(tokens, fits)
        fits(chunk)
        need = found[chunk]
        kv_bytes = _kv_bytes(need, tokens, sequences)
        return GpuPlan(
            *(gpu_bytes, spec.dense_bytes, tokens, kv_bytes, need.activation_bytes, margin_bytes),
            measured=need.measured,
            chunk=None if chunk == tokens else chunk,
            sequences=sequences,
        )

    if gpu_bytes > free_bytes:
        return plan_for(context), (
            f"{spelled('gpu_memory')} asks for {format_bytes(gpu_bytes)}, but {format_bytes(free_bytes)} are free "
            "on the GPU; ask for less or free some"
        )
    try:
        return share_out(gpu_bytes, facts.margin, context, plan_for, named=named, context_named=context_named), None
    except BudgetError as error:
        return plan_for(context), str(error)


def _kv_bytes(need: Footprint, context: int, sequences: int) -> int:
    """Keys and values of sequences of so many tokens; several are rows of one cache, with room to move in."""
    return need.kv_bytes if sequences == 1 else -(-need.kv_bytes * columns_for(context) // context) * sequences


def planned_context(longest: int | None, asked: int | None) -> int:
    """Tokens of prompt and answer that GPU memory is planned for.

    Raises:
        RequestError: more than the model can read.
    """
    if asked is None:
        return min(longest or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if longest is not None and asked > longest:
        raise RequestError(f"{spelled('context', asked)}, but the model's context is {longest}; ask for less")
    return asked


def experts_room(spec: ModelSpec, machine: Machine, gpu_bytes: int | None) -> int:
    """Bytes of the GPU that are left for experts.

    Raises:
        BudgetError: the dense part alone does not fit, or more was asked for than the machine has.
    """
    if not machine.costs.gpu_gbps:
        if gpu_bytes:
            asked = f"{spelled('gpu_memory')} {format_bytes(gpu_bytes)}"
            raise BudgetError(f"{asked}, but {machine.name} has no GPU; leave it out")
        return 0
    total = machine.gpu_bytes if gpu_bytes is None else gpu_bytes
    if total > machine.gpu_bytes:
        raise BudgetError(
            f"{spelled('gpu_memory')} {format_bytes(total)}, but {machine.name} has "
            f"{format_bytes(machine.gpu_bytes)}; ask for less"
        )
    if total < spec.dense_bytes:
        raise BudgetError(
            f"the dense part needs {format_bytes(spec.dense_bytes)} of GPU memory, but there are "
            f"{format_bytes(total)}; give more, or fewer {spelled('bits')}"
        )
    return total - spec.dense_bytes


def check_fits(
    spec: ModelSpec,
    placement: Placement,
    *,
    gpu_bytes: int,
    ram_bytes: int,
    dense_on_gpu: bool,
    ram_named: bool,
    kv_bytes: int = 0,
) -> None:
    """Refuse a model that does not fit, with the numbers and what would fit.

    Args:
        gpu_bytes, ram_bytes: the budget, or what is free where the user named none.
        ram_named: whether the user named the RAM, which is then for weights alone (the message says where the limit
            comes from).
        kv_bytes: of the RAM, for keys and values.

    Raises:
        BudgetError: one line with what is needed, what there is and what to ask for.
    """
    held_bytes = sum(spec.layers[layer].expert_bytes for layer, _ in placement.held)
    pool_bytes = (len(placement.held) + placement.slots) * spec.slot_bytes
    gpu_needed = pool_bytes + (spec.dense_bytes if dense_on_gpu else 0)
    if gpu_needed > gpu_bytes:
        raise BudgetError(
            f"the GPU needs {format_bytes(gpu_needed)} (dense weights {format_bytes(spec.dense_bytes)}), but "
            f"{spelled('gpu_memory')} allows {format_bytes(gpu_bytes)}; give it at least {round_up(gpu_needed)}"
        )
    experts_in_ram = spec.expert_bytes - held_bytes
    kv_bytes = 0 if ram_named else kv_bytes
    ram_needed = experts_in_ram + (0 if dense_on_gpu else spec.dense_bytes) + kv_bytes
    if ram_needed > ram_bytes:
        limit = f"{spelled('ram')} allows" if ram_named else "this machine has free"
        enough = f"give {spelled('ram')} at least {round_up(ram_needed)}"
        smaller = "choose a smaller model" if not kv_bytes else "take a smaller model, or fewer or shorter sequences"
        remedy = enough if ram_named else f"free memory or {smaller}"
        kv = f", keys and values {format_bytes(kv_bytes)}" if kv_bytes else ""
        raise BudgetError(
            f"the model needs {format_bytes(ram_needed)} of RAM (experts {format_bytes(experts_in_ram)}{kv}), but "
            f"{limit} {format_bytes(ram_bytes)}; {remedy}"
        )
