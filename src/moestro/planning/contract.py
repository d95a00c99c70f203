"""The contract between a policy, which decides, and the conductor, which carries out.

A policy sees a `Step` (what one MoE layer was asked for), a read-only `View` (where experts are) and
`Costs` (what this machine was measured to do), and returns a `Decision`. It imports neither torch nor
anything that moves weights, so the same object runs live and in a replay. It does not know which.

To write a policy, derive from `policies.BasePolicy`; docs/policies.md shows one of 40 lines.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

from .costs import Costs, LayerSpec
from .slots import Expert  # (MoE layer, expert), both counted from 0 within the model

__all__ = [
    "GPU0",
    "RAM",
    "SCORE",
    "Bound",
    "Costs",
    "Decision",
    "Expert",
    "Lane",
    "LayerSpec",
    "ModelSpec",
    "Move",
    "Outcome",
    "Phase",
    "Place",
    "Placement",
    "Policy",
    "Step",
    "StepInfo",
    "View",
    "guesses_kept",
]

SCORE = 65535  # a guess's certainty 1.0, as traces and recorded steps write it: uint16
_LEAST_GUESSES = 8

_NONE: Mapping[int, Any] = MappingProxyType({})


def guesses_kept(top_k: int) -> int:
    """How many experts of a gate's guess policies see and traces keep: the likeliest, twice as many as it chooses."""
    return max(_LEAST_GUESSES, 2 * top_k)


class Phase(Enum):
    """Whether a step reads a prompt or extends one."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class StepInfo:
    """What one step of a model reads, row by row; a row is a sequence.

    prompt_tokens, decode_tokens: how many new tokens of each row belong to its prompt, and how many extend it; one of
        the two is 0 for each row.
    stream: tells apart the streams of work that callers run steps on, as `Device.stream_id` does.
    """

    prompt_tokens: tuple[int, ...]
    decode_tokens: tuple[int, ...]
    stream: int = 0

    @classmethod
    def alike(cls, phase: Phase, tokens: int, rows: int = 1, stream: int = 0) -> StepInfo:
        """Rows of so many tokens each, all in one phase."""
        some, none = (tokens,) * rows, (0,) * rows
        return cls(some, none, stream) if phase is Phase.PREFILL else cls(none, some, stream)

    @property
    def rows(self) -> int:
        """How many sequences."""
        return len(self.prompt_tokens)

    @property
    def tokens(self) -> int:
        """New tokens over all rows."""
        return sum(self.prompt_tokens) + sum(self.decode_tokens)

    @property
    def phase(self) -> Phase:
        """Prefill as soon as one row reads its prompt: its many tokens decide what such a step costs."""
        return Phase.PREFILL if any(self.prompt_tokens) else Phase.DECODE


class Lane(Enum):
    """A resource that does one thing at a time."""

    CPU = "cpu"
    LINK = "link"
    DISK = "disk"
    GPU = "gpu"


class Place(NamedTuple):
    """A tier of memory that an expert can be in."""

    tier: Literal["disk", "ram", "gpu"]
    device: int = 0

    def __str__(self) -> str:
        return f"{self.tier}:{self.device}" if self.tier == "gpu" else self.tier


RAM, GPU0 = Place("ram"), Place("gpu", 0)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a policy needs to know of a model to place its experts."""

    layers: tuple[LayerSpec, ...]
    dense_bytes: int  # everything that is no expert: attention, norms, shared experts, embeddings, head
    dense_weights: int = 0  # their number

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts, packed."""
        return sum(layer.experts * layer.expert_bytes for layer in self.layers)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot: any expert of the model fits it."""
        return max(layer.expert_bytes for layer in self.layers)


class Step(NamedTuple):
    """What one MoE layer is asked to do, as its router said.

    tokens: expert -> tokens routed to it (only experts with at least one; the sentinel is removed).
    mass: expert -> sum of its routing weights over the tokens.
    guesses: later layer -> expert -> the share of the tokens' attention that its gate would give it, the likeliest
        first, from the next blocks' gates on this layer's hidden states; empty where there are none.
    """

    layer: int
    phase: Phase
    tokens: Mapping[int, int]
    mass: Mapping[int, float]
    guesses: Mapping[int, Mapping[int, float]] = _NONE


class View(Protocol):
    """Where experts are, on a wall clock or a virtual one. Read-only."""

    @property
    def now_s(self) -> float:
        """The clock."""

    @property
    def failures(self) -> int:
        """How often something failed, after which experts may be gone, or never have come, that a policy has down."""

    def ready_s(self, expert: Expert, at: Place) -> float:
        """When `expert` can be used at `at`: 0 if now, an expected arrival later than now, or inf."""

    def evictable(self, at: Place, layer: int) -> Collection[Expert]:
        """Experts at `at` whose slot a load for `layer` may take: cheap to ask one by one, dear to list."""

    def free_slots(self, at: Place, layer: int) -> int:
        """Empty slots at `at` that a load for `layer` may take."""

    def lane_free_s(self, lane: Lane) -> float:
        """When `lane` will have done what is queued on it."""


class Move(NamedTuple):
    """Bring an expert, or the neurons of it that a step needs, to a place; one that is there stays there.

    evict: whose slot to take; None takes an empty one. It may be an expert that the GPU computes in this very step,
        there already or brought by an earlier move: the copy then waits until it was computed. Or one whose own copy
        is in flight: then it waits for that.
    neurons: None for all of them.
    keep: stays after its layer's next step, also if it was there as one that would not.
    urgent: this step waits for it, so it overtakes guesses, also if it was on its way as one.
    """

    expert: Expert
    to: Place = GPU0
    evict: Expert | None = None
    neurons: range | None = None
    keep: bool = True
    urgent: bool = True


class Decision(NamedTuple):
    """Whether GPU or CPU computes which neurons of each active expert of a layer, and what moves meanwhile.

    `gpu` and `cpu` together tile each active expert's neurons [0, F) exactly once.
    drop: experts that are no longer wanted on the GPU, before anything moves; a copy that has begun goes on.
    """

    gpu: Mapping[int, range] = _NONE
    cpu: Mapping[int, range] = _NONE
    moves: tuple[Move, ...] = ()
    drop: tuple[Expert, ...] = ()


class Outcome(NamedTuple):
    """What a step really did, told to the policy afterwards.

    joined_bytes: what had not crossed yet of the copies that it joined; 0 where the device cannot say.
    moved_bytes: queued by this step, less what was dropped before it began.
    """

    layer: int
    phase: Phase
    hits: tuple[int, ...]
    joined: tuple[int, ...]
    misses: tuple[int, ...]
    joined_bytes: int
    moved_bytes: int
    cpu_s: float
    wall_s: float


class Bound(NamedTuple):
    """The least time that a method's arithmetic allows a layer step.

    step_s: of the steps one after another. link_s: of the link, which may overlap the steps.
    """

    step_s: float
    link_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Placement:
    """Where experts start.

    held: never leave the GPU and need no copy in RAM. slots: of the shared pool, besides those of the held experts.
    warm: experts that are in slots of the pool before the first step, and may leave; none that is held.
    """

    held: frozenset[Expert] = frozenset()
    slots: int = 0
    warm: tuple[Expert, ...] = ()


class Policy(Protocol):
    """One published method of running a model larger than the GPU. Pure Python; see `policies/`."""

    name: str
    lookahead: int  # for how many later layers it wants guesses

    def place(self, spec: ModelSpec, gpu_bytes: int, heat: Mapping[Expert, float]) -> Placement:
        """Choose the experts to hold within `gpu_bytes`, and slots. `heat`: how often each is used, if known."""

    def begin(self, info: StepInfo, view: View, costs: Costs) -> tuple[Move, ...]:
        """Before the first layer of a step."""

    def decide(self, step: Step, view: View, costs: Costs) -> Decision:
        """Split the work of one layer step."""

    def observe(self, done: Outcome) -> None:
        """Learn what a step did."""

    def bound(self, step: Step, done: Outcome, costs: Costs, dense_s: float) -> Bound:
        """The least time that the method's own arithmetic allows a layer step, given its hits.

        A replay asks once for steps of one layer and phase whose counts of tokens, kind by kind, are the same.
        """
