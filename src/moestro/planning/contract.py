"""The contract between a policy, which decides, and the conductor, which carries out.

A policy sees a `Step` (what one MoE layer was asked for), a read-only `View` (where experts are) and
`Costs` (what this machine was measured to do), and returns a `Decision`. It imports neither torch nor
anything that moves weights, so the same object runs live and in a replay. It does not know which.

    check(policy.decide(step, view, costs), step, view, neurons=14336, block=64)
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
    keep: stays after the step. urgent: this step waits for it, so it overtakes guesses.
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


def check(decision: Decision, step: Step, view: View, layer: LayerSpec, block: int) -> None:
    """Refuse a decision that would compute a neuron twice, never, or from a slot that is not there.

    Raises:
        ContractError: naming the policy's mistake, the layer and the expert.
    """
    where = f"layer {step.layer}"
    for expert in decision.gpu.keys() | decision.cpu.keys():
        if expert not in step.tokens:
            raise ContractError(f"{where}: expert {expert} is computed, but no token was routed to it")
    for expert in step.tokens:
        shares = [share for side in (decision.gpu, decision.cpu) if (share := side.get(expert)) is not None]
        _check_tiling(shares, layer, block, f"{where}, expert {expert}")
    _check_moves(decision.moves, step.layer, view)
    arriving = {(move.expert, move.to) for move in decision.moves}
    for expert in decision.gpu:
        key = (step.layer, expert)
        if view.ready_s(key, GPU0) == float("inf") and (key, GPU0) not in arriving:
            raise ContractError(f"{where}: expert {expert} is given to the GPU, but is not there nor on its way")
    for expert in decision.cpu:
        if view.ready_s((step.layer, expert), RAM) == float("inf"):
            raise ContractError(f"{where}: expert {expert} is given to the CPU, but has no copy in RAM")


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


def _check_moves(moves: Iterable[Move], layer: int, view: View) -> None:
    evicted: set[Expert] = set()
    taken = 0
    for move in moves:
        if move.to != GPU0:
            raise ContractError(f"layer {layer}: a move to {move.to}, but only moves to gpu:0 can be carried out")
        if move.evict is None:
            taken += 1
            if taken > view.free_slots(move.to, move.expert[0]):
                raise ContractError(f"layer {layer}: {taken} moves into empty slots, but fewer are empty")
        elif move.evict in evicted or move.evict not in view.evictable(move.to, move.expert[0]):
            raise ContractError(f"layer {layer}: expert {move.evict} is not evictable from {move.to}")
        else:
            evicted.add(move.evict)
