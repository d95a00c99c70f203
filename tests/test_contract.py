"""Budgets, policies and the check of their decisions: pure Python, with a view that is a fake."""

from __future__ import annotations

import random
from collections.abc import Collection

import pytest

from moestro.errors import BudgetError, ContractError, RequestError
from moestro.planning.budget import Budget, exact_bytes, format_bytes, parse_bytes
from moestro.planning.check import check
from moestro.planning.contract import (
    GPU0,
    RAM,
    Decision,
    Expert,
    Lane,
    LayerSpec,
    ModelSpec,
    Move,
    Phase,
    Place,
    Placement,
    Step,
)
from moestro.planning.plan import check_fits
from moestro.planning.policies import make_policy

LAYER = LayerSpec(experts=4, neurons=160, expert_bytes=1000)
SPEC = ModelSpec(layers=(LAYER,) * 3, dense_bytes=5000)
STEP = Step(layer=1, phase=Phase.DECODE, tokens={0: 1, 3: 2}, mass={0: 0.5, 3: 1.5})
FULL = range(160)


class FakeView:
    """Everything is in RAM; `on_gpu` is ready there; `empty` slots are free."""

    now_s = 0.0

    def __init__(self, on_gpu: Collection[Expert] = (), in_ram: bool = True, empty: int = 0) -> None:
        self.on_gpu, self.in_ram, self.empty = set(on_gpu), in_ram, empty

    def ready_s(self, expert: Expert, at: Place) -> float:
        here = self.in_ram if at == RAM else expert in self.on_gpu
        return 0.0 if here else float("inf")

    def evictable(self, at: Place, layer: int) -> Collection[Expert]:
        return self.on_gpu

    def free_slots(self, at: Place, layer: int) -> int:
        return self.empty

    def lane_free_s(self, lane: Lane) -> float:
        return 0.0


def test_a_whole_decision_passes() -> None:
    check(Decision(cpu={0: FULL, 3: FULL}), STEP, FakeView(), SPEC)
    check(Decision(cpu={0: FULL}, gpu={3: FULL}), STEP, FakeView({(1, 3)}), SPEC)


def test_an_expert_may_be_split_at_a_block_with_its_copy() -> None:
    split = Decision(
        cpu={0: FULL, 3: range(64, 160)}, gpu={3: range(64)}, moves=(Move((1, 3), neurons=range(64), keep=False),)
    )
    check(split, STEP, FakeView(empty=1), SPEC)
    with pytest.raises(ContractError, match="no more are empty"):
        check(split, STEP, FakeView(), SPEC)


@pytest.mark.parametrize(
    ("decision", "says"),
    [
        (Decision(cpu={0: FULL}), "neurons 0..160 have no computer"),
        (Decision(cpu={0: FULL, 3: range(64)}), "neurons 64..160 have no computer"),
        (Decision(cpu={0: FULL, 3: FULL}, gpu={3: FULL}), "every neuron needs one computer"),
        (Decision(cpu={0: FULL, 3: range(70)}, gpu={3: range(70, 160)}), "not at a multiple of the block"),
        (Decision(cpu={0: FULL, 3: FULL, 2: FULL}), "no token was routed"),
        (Decision(cpu={0: FULL}, gpu={3: FULL}), "not there nor on its way"),
        (Decision(cpu={0: FULL, 3: FULL}, moves=(Move((2, 0), evict=(0, 0)),)), "not evictable"),
        (Decision(cpu={0: FULL, 3: FULL}, moves=(Move((2, 0), to=RAM),)), "only moves to gpu:0"),
    ],
)
def test_a_broken_decision_is_refused(decision: Decision, says: str) -> None:
    with pytest.raises(ContractError, match=says):
        check(decision, STEP, FakeView(), SPEC)


def test_experts_behind_a_norm_are_not_split() -> None:
    layer = LayerSpec(experts=4, neurons=160, expert_bytes=1000, splittable=False)
    whole = ModelSpec((layer,) * 3, 0)
    decision = Decision(cpu={0: FULL, 3: range(64)}, gpu={3: range(64, 160)})
    with pytest.raises(ContractError, match="no sum over neurons"):
        check(decision, STEP, FakeView({(1, 3)}), whole)


def test_an_expert_without_ram_copy_cannot_run_on_the_cpu() -> None:
    with pytest.raises(ContractError, match="no copy in RAM"):
        check(Decision(cpu={0: FULL, 3: FULL}), STEP, FakeView(in_ram=False), SPEC)


@pytest.mark.parametrize(
    ("decision", "says"),
    [
        (Decision(cpu={0: FULL}, gpu={3: FULL}, drop=((1, 3),)), "given to the GPU and taken from it"),
        (Decision(cpu={0: FULL, 3: FULL}, moves=(Move((1, 9)),)), "which the model does not have"),
        (Decision(cpu={0: FULL}, gpu={3: FULL}, moves=(Move((2, 0), neurons=range(64), keep=False),)), "keep=False"),
    ],
)
def test_a_decision_that_takes_what_it_uses_is_refused(decision: Decision, says: str) -> None:
    with pytest.raises(ContractError, match=says):
        check(decision, STEP, FakeView({(1, 3)}, empty=2), SPEC)


BOTH_ON_GPU = {0: FULL, 3: FULL}


def test_a_slot_may_be_used_again_within_a_step() -> None:
    """An expert leaves when it was computed: one that was there, or one that an earlier move brought."""
    view = FakeView({(1, 3)})
    check(Decision(gpu=BOTH_ON_GPU, moves=(Move((1, 0), evict=(1, 3)),)), STEP, view, SPEC)
    check(Decision(gpu=BOTH_ON_GPU, moves=(Move((1, 0), evict=(1, 3)), Move((2, 0), evict=(1, 0)))), STEP, view, SPEC)
    check(Decision(gpu=BOTH_ON_GPU, moves=(Move((1, 0)), Move((1, 3), evict=(1, 0)))), STEP, FakeView(empty=1), SPEC)


@pytest.mark.parametrize(
    ("moves", "says"),
    [
        ((Move((1, 3), evict=(1, 0)), Move((1, 0))), "evicted before the move that brings it"),
        ((Move((1, 0)), Move((1, 3), evict=(1, 0)), Move((2, 0), evict=(1, 0))), "evicted from gpu:0 twice"),
        ((Move((1, 0)), Move((2, 0), evict=(2, 1)), Move((1, 3), evict=(2, 0))), "not evictable"),
        ((Move((1, 0)), Move((1, 3))), "no more are empty"),
    ],
)
def test_a_chain_of_moves_through_a_slot_must_hold(moves: tuple[Move, ...], says: str) -> None:
    with pytest.raises(ContractError, match=says):
        check(Decision(gpu=BOTH_ON_GPU, moves=moves), STEP, FakeView(empty=1), SPEC)


def test_a_gpu_share_must_lie_within_the_neurons_that_move() -> None:
    move = Move((1, 3), neurons=range(64), keep=False)
    with pytest.raises(ContractError, match="a GPU share of this step within them"):
        check(Decision(cpu={0: FULL}, gpu={3: FULL}, moves=(move,)), STEP, FakeView(empty=1), SPEC)


def test_layer_split_holds_the_last_whole_layers() -> None:
    policy = make_policy("layer-split")
    held = policy.place(SPEC, 9_000, {}).held
    assert held == {(layer, expert) for layer in (1, 2) for expert in range(4)}
    assert not policy.place(SPEC, 3_999, {}).held


def test_no_such_policy() -> None:
    with pytest.raises(RequestError, match="bandwidth-split, cpu-only"):
        make_policy("wishful")


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        *(("12GiB", 12 * 2**30), ("500MB", 500_000_000), ("0.5 gib", 2**29), ("17 B", 17), ("1kb", 1000)),
        *(("0", 0), (0, 0), ("1048576", 2**20), (2**20, 2**20), (f"{2**60 + 1}", 2**60 + 1)),
    ],
)
def test_amounts_of_memory(text: str | int, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


def test_sizes_that_were_parsed_are_parsed_again() -> None:
    """A config hands on what its options found; a plan prints what an option takes."""
    for n_bytes in (0, 1 << 10, 560 << 10, 1 << 20, 48 << 30, *(random.randrange(1 << 20, 1 << 45) for _ in range(50))):
        assert parse_bytes(n_bytes) == n_bytes
        assert n_bytes < 1 << 20 or parse_bytes(exact_bytes(n_bytes)) == n_bytes
    assert parse_bytes(parse_bytes("560KiB")) == 560 << 10
    assert exact_bytes(48 << 30) == "48GiB"


@pytest.mark.parametrize("amount", ["5", " 5 ", "0.5", "32", "1048575", 5, 32])
def test_a_forgotten_unit_is_asked_for(amount: str | int) -> None:
    plain = str(amount).strip()
    for named in ("gpu_memory", "ram"):
        with pytest.raises(RequestError, match=f"{named}=.* has no unit.*did you mean {plain}GiB"):
            Budget.parse(**{named: amount})


@pytest.mark.parametrize("text", ["", "GiB", "12 GiG", "-3GiB", "1e9", "twelve"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(RequestError, match=r"ram=.* is no amount of memory"):
        Budget.parse(ram=text)


def test_format_bytes() -> None:
    assert [format_bytes(n) for n in (5, 2048, 3 * 2**20, 2**30, 2**41)] == [
        "5 B",
        "2.0 KiB",
        "3.0 MiB",
        "1.0 GiB",
        "2.0 TiB",
    ]


NOTHING_HELD = Placement()


def _fits(placement: Placement = NOTHING_HELD, gpu: int = 0, ram: int = 17_000, dense_on_gpu: bool = False) -> None:
    check_fits(SPEC, placement, gpu_bytes=gpu, ram_bytes=ram, dense_on_gpu=dense_on_gpu, ram_named=True)


def test_what_fits_exactly_is_taken() -> None:
    _fits()
    _fits(ram=12_000, gpu=5_000, dense_on_gpu=True)
    _fits(Placement(frozenset({(0, 0)})), ram=16_000, gpu=1_000)


def test_what_does_not_fit_is_refused_with_numbers_that_would() -> None:
    with pytest.raises(BudgetError, match=r"needs 16\.6 KiB of RAM.*allows 16\.6 KiB; give ram at least 16\.7KiB"):
        _fits(ram=16_999)
    assert parse_bytes("16.7KiB") >= 17_000
    with pytest.raises(BudgetError, match=r"the GPU needs 4\.9 KiB"):
        _fits(ram=12_000, gpu=4_999, dense_on_gpu=True)
    with pytest.raises(BudgetError, match="the GPU needs"):
        _fits(Placement(slots=2), gpu=1_999)
    assert GPU0.tier == "gpu"
    assert str(GPU0) == "gpu:0"
