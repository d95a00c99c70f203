"""The contract between a policy, which decides, and the conductor, which carries out.

A policy sees a `Step` (what one MoE layer was asked for), a read-only `View` (where experts are) and
`Costs` (what this machine was measured to do), and returns a `Decision`. It imports neither torch nor
anything that moves weights, so the same object runs live and in a replay. It does not know which.

    check(policy.decide(step, view, costs), step, view, spec, block=64)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, Protocol

from ..errors import ContractError

Expert = tuple[int, int]  # (MoE layer, expert), both counted from 0 within the model


class Phase(Enum):
    """Whether a step reads a prompt or extends one."""

    PREFILL = "prefill"
    DECODE = "decode"


class Lane(Enum):
    """A resource that does one thing at a time."""

    CPU = "cpu"
    LINK = "link"
    DISK = "disk"
    GPU = "gpu"


@dataclass(frozen=True, slots=True)
class Place:
    """A tier of memory that an expert can be in."""

    tier: Literal["disk", "ram", "gpu"]
    index: int = 0

    def __str__(self) -> str:
        return f"gpu:{self.index}" if self.tier == "gpu" else self.tier


DISK, RAM, GPU0 = Place("disk"), Place("ram"), Place("gpu", 0)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One MoE layer as the planner sees it: counts and bytes, no tensors."""

    experts: int
    neurons: int  # F, the expert's hidden size
    expert_bytes: int  # packed, scales and biases included
    splittable: bool = True  # False where a norm follows the expert: its output is no sum over neurons


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a policy needs to know of a model to place its experts."""

    layers: tuple[LayerSpec, ...]
    dense_bytes: int  # everything that is no expert: attention, norms, shared experts, embeddings, head

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts, packed."""
        return sum(layer.experts * layer.expert_bytes for layer in self.layers)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot: any expert of the model fits it."""
        return max(layer.expert_bytes for layer in self.layers)


@dataclass(frozen=True, slots=True)
class Costs:
    """Rates of this machine in GB/s (1e9 bytes a second); None where nothing was measured yet."""

    cpu_gbps: float | None = None
    link_gbps: float | None = None
    gpu_gbps: float | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """What one MoE layer is asked to do, as its router said.

    tokens: expert -> tokens routed to it (only experts with at least one; the sentinel is removed).
    mass: expert -> sum of its routing weights over the tokens.
    guesses: later layer -> expert -> score, from the next blocks' gates; empty where there are none.
    """

    layer: int
    phase: Phase
    tokens: Mapping[int, int]
    mass: Mapping[int, float]
    guesses: Mapping[int, Mapping[int, float]] = field(default_factory=dict)


class View(Protocol):
    """Where experts are, on a wall clock or a virtual one. Read-only."""

    @property
    def now_s(self) -> float:
        """The clock."""

    def ready_s(self, expert: Expert, at: Place) -> float:
        """When `expert` can be used at `at`: now or earlier, an expected arrival, or inf."""

    def evictable(self, at: Place, layer: int) -> Collection[Expert]:
        """Experts at `at` whose slot a load for `layer` may take."""

    def free_slots(self, at: Place, layer: int) -> int:
        """Empty slots at `at` that a load for `layer` may take."""

    def lane_free_s(self, lane: Lane) -> float:
        """When `lane` will have done what is queued on it."""


@dataclass(frozen=True, slots=True)
class Move:
    """Bring an expert, or the neurons of it that a step needs, to a place.

    evict: whose slot to take; None takes an empty one. neurons: None for all of them.
    keep: stays after its layer's next step. urgent: this step waits for it, so it overtakes guesses.
    """

    expert: Expert
    to: Place = GPU0
    evict: Expert | None = None
    neurons: range | None = None
    keep: bool = True
    urgent: bool = True


@dataclass(frozen=True, slots=True)
class Decision:
    """Who computes which neurons of which active expert of the step's layer, and what moves meanwhile.

    `gpu` and `cpu` together tile each active expert's neurons [0, F) exactly once.
    """

    gpu: Mapping[int, range] = field(default_factory=dict)
    cpu: Mapping[int, range] = field(default_factory=dict)
    moves: tuple[Move, ...] = ()
    cancel: tuple[Expert, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step really did, told to the policy afterwards."""

    layer: int
    phase: Phase
    hits: tuple[int, ...]
    joined: tuple[int, ...]
    misses: tuple[int, ...]
    moved_bytes: int
    cpu_s: float
    wall_s: float


@dataclass(frozen=True, slots=True)
class Placement:
    """Where experts start. Held ones never leave the GPU and need no copy in RAM."""

    held: frozenset[Expert] = frozenset()
    slots: int = 0  # slots of the shared pool, besides those of the held experts


class Policy(Protocol):
    """One published method of running a model larger than the GPU. Pure Python; see `policies/`."""

    name: str

    def place(self, spec: ModelSpec, gpu_bytes: int, heat: Mapping[Expert, float]) -> Placement:
        """Choose the experts to hold within `gpu_bytes`. `heat`: how often each is used, if known."""

    def begin(self, tokens: int, view: View, costs: Costs) -> tuple[Move, ...]:
        """Before the first layer of a step of `tokens` tokens."""

    def decide(self, step: Step, view: View, costs: Costs) -> Decision:
        """Split the work of one layer step."""

    def observe(self, done: Outcome) -> None:
        """Learn what a step did."""


def check(decision: Decision, step: Step, view: View, spec: ModelSpec, block: int) -> None:
    """Refuse a decision that would compute a neuron twice, never, or from a slot that is not there.

    Raises:
        ContractError: naming the policy's mistake, the layer and the expert.
    """
    layer, where = spec.layers[step.layer], f"layer {step.layer}"
    _check_shares(decision, step, layer, block, where)
    check_moves(decision.moves, view, spec, where, step=step, gpu=decision.gpu)
    arriving = {move.expert for move in decision.moves}
    leaving = {move.evict for move in decision.moves} | set(decision.cancel)
    for expert in decision.gpu:
        key = (step.layer, expert)
        if key in leaving:
            raise ContractError(f"{where}: expert {expert} is given to the GPU and taken from it in one decision")
        if view.ready_s(key, GPU0) == float("inf") and key not in arriving:
            raise ContractError(f"{where}: expert {expert} is given to the GPU, but is not there nor on its way")
    for expert in decision.cpu:
        if view.ready_s((step.layer, expert), RAM) == float("inf"):
            raise ContractError(f"{where}: expert {expert} is given to the CPU, but has no copy in RAM")


def _check_shares(decision: Decision, step: Step, layer: LayerSpec, block: int, where: str) -> None:
    """Refuse shares that do not tile each active expert's neurons."""
    whole = range(layer.neurons)
    all_on_cpu = not decision.gpu and decision.cpu.keys() == step.tokens.keys()
    if all_on_cpu and all(share == whole for share in decision.cpu.values()):
        return  # as most are
    for expert in decision.gpu.keys() | decision.cpu.keys():
        if expert not in step.tokens:
            raise ContractError(f"{where}: expert {expert} is computed, but no token was routed to it")
    for expert in step.tokens:
        shares = [share for side in (decision.gpu, decision.cpu) if (share := side.get(expert)) is not None]
        _check_tiling(shares, layer, block, f"{where}, expert {expert}")


def check_moves(
    moves: Iterable[Move],
    view: View,
    spec: ModelSpec,
    where: str,
    step: Step | None = None,
    gpu: Mapping[int, range] | None = None,
) -> None:
    """Refuse moves that cannot be carried out; `step` and `gpu` are the decision's that they belong to.

    Raises:
        ContractError: naming the policy's mistake.
    """
    evicted: set[Expert] = set()
    into_empty: set[Expert] = set()
    for move in moves:
        layer, expert = move.expert
        if not (0 <= layer < len(spec.layers) and 0 <= expert < spec.layers[layer].experts):
            raise ContractError(f"{where}: a move of expert {move.expert}, which the model does not have")
        if move.to != GPU0:
            raise ContractError(f"{where}: a move to {move.to}, but only moves to gpu:0 can be carried out")
        if view.ready_s(move.expert, GPU0) == float("inf") and view.ready_s(move.expert, RAM) == float("inf"):
            raise ContractError(f"{where}: a move of expert {move.expert}, which has no copy in RAM")
        if move.neurons is not None:
            share = (gpu or {}).get(expert) if step is not None and layer == step.layer else None
            if move.keep or share is None or not set(share) <= set(move.neurons):
                raise ContractError(
                    f"{where}: some neurons of expert {move.expert} are moved; that needs keep=False and a GPU share "
                    "of this step within them"
                )
        if view.ready_s(move.expert, GPU0) < float("inf"):
            continue  # it joins, and takes no slot
        if move.evict is None:
            into_empty.add(move.expert)
            if len(into_empty) > view.free_slots(move.to, layer):
                raise ContractError(f"{where}: {len(into_empty)} moves into empty slots, but fewer are empty")
        elif move.evict in evicted or move.evict not in view.evictable(move.to, layer):
            raise ContractError(f"{where}: expert {move.evict} is not evictable from {move.to}")
        else:
            evicted.add(move.evict)


def _check_tiling(shares: Iterable[range], layer: LayerSpec, block: int, where: str) -> None:
    spans = sorted((share.start, share.stop) for share in shares)
    if len(spans) > 1 and not layer.splittable:
        raise ContractError(f"{where}: split, but a norm follows the expert, so its output is no sum over neurons")
    edge = 0
    for start, stop in spans:
        if start != edge or stop <= start:
            raise ContractError(f"{where}: neurons {start}..{stop} follow {edge}; every neuron needs one computer")
        if stop % block and stop != layer.neurons:
            raise ContractError(f"{where}: split at neuron {stop}, not at a multiple of the block of {block}")
        edge = stop
    if edge != layer.neurons:
        raise ContractError(f"{where}: neurons {edge}..{layer.neurons} have no computer")
