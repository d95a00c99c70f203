"""The virtual machine and the replay, against arithmetic done by hand and against a slower simulation."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.errors import BudgetError, RequestError
from moestro.planning import machines
from moestro.planning.clock import Share
from moestro.planning.contract import Costs, Lane, LayerSpec, ModelSpec, Phase, Step
from moestro.planning.costs import PIECE_BYTES
from moestro.planning.machines import Machine, costs_of, machine_named, machine_names
from moestro.planning.policies import POLICIES, make_policy
from moestro.planning.timeline import Timeline
from moestro.simulate.belady import belady_hits
from moestro.simulate.replay import replay
from moestro.simulate.trace import Pass, Trace
from moestro.simulate.virtual import VirtualMachine

GB = 10**9
MIXTRAL = LayerSpec(experts=8, neurons=14336, expert_bytes=2 * 3 * 14336 * 4096, hidden=4096)
# One layer of numbers that are easy to reckon with: an expert is 1 GB, the CPU takes 0.1 s for it, the link 1 s.
ROUND = LayerSpec(experts=4, neurons=64 * 10, expert_bytes=GB, hidden=1024)
COSTS = costs_of(cpu_gbps=10, link_gbps=1, gpu_gbps=100, cpu_gflops=1e9, gpu_gflops=1e9)


def _machine(costs: Costs = COSTS, gpu_gb: float = 1000, ram_gb: float = 1000) -> Machine:
    return Machine("test", "a machine of round numbers", int(gpu_gb * GB), int(ram_gb * GB), costs)


def _trace(spec: ModelSpec, chosen: list[list[list[int]]], prompt: list[dict[int, int]] | None = None) -> Trace:
    """A trace of decode steps, chosen[token][layer], behind a prompt of tokens an expert for each layer."""
    passes = []
    if prompt is not None:
        steps = [
            Step(i, Phase.PREFILL, tokens, {e: float(n) for e, n in tokens.items()}) for i, tokens in enumerate(prompt)
        ]
        passes.append(Pass(Phase.PREFILL, max(sum(p.values()) for p in prompt), tuple(steps)))
    for layers in chosen:
        decode = [Step(i, Phase.DECODE, dict.fromkeys(e, 1), dict.fromkeys(e, 0.5)) for i, e in enumerate(layers)]
        passes.append(Pass(Phase.DECODE, 1, tuple(decode)))
    return Trace("by hand", spec, 2, None, passes)


def _random_trace(spec: ModelSpec, tokens: int, seed: int, prompt: int = 64, top_k: int = 2) -> Trace:
    """Skewed routing with guesses of which three in four come true."""
    rng = random.Random(seed)
    layers = range(len(spec.layers))
    weights = [[1 / (1 + e) for e in range(spec.layers[i].experts)] for i in layers]

    def draw(layer: int) -> list[int]:
        found: dict[int, None] = {}
        while len(found) < top_k:
            found[rng.choices(range(len(weights[layer])), weights[layer])[0]] = None
        return list(found)

    def guess(wanted: list[int], layer: int) -> dict[int, float]:
        right = [e for e in wanted if rng.random() < 0.75]
        others = [e for e in range(spec.layers[layer].experts) if e not in right]
        return {e: 1 / (2 + i) for i, e in enumerate([*right, *rng.sample(others, min(2, len(others)))])}

    passes = []
    counts: list[dict[int, int]] = [{} for _ in layers]
    for layer in layers:
        for _ in range(prompt):
            for expert in draw(layer):
                counts[layer][expert] = counts[layer].get(expert, 0) + 1
    prefill = [
        Step(i, Phase.PREFILL, dict(sorted(c.items())), {e: n / 2 for e, n in c.items()}) for i, c in enumerate(counts)
    ]
    passes.append(Pass(Phase.PREFILL, prompt, tuple(prefill)))
    for _ in range(tokens):
        chosen = [sorted(draw(layer)) for layer in layers]
        steps = []
        for i in layers:
            guesses = {i + 1: guess(chosen[i + 1], i + 1)} if i + 1 < len(layers) else {}
            steps.append(Step(i, Phase.DECODE, dict.fromkeys(chosen[i], 1), dict.fromkeys(chosen[i], 0.5), guesses))
        passes.append(Pass(Phase.DECODE, 1, tuple(steps)))
    return Trace(f"random {seed}", spec, top_k, None, passes, lookahead=1)


# ---- lanes


def _virtual(costs: Costs = COSTS, **options: float) -> VirtualMachine:
    return VirtualMachine(ModelSpec((ROUND,) * 4, dense_bytes=0), costs, **options)  # type: ignore[arg-type]


def test_copies_follow_one_another_and_urgent_ones_overtake_between_pieces() -> None:
    machine = _virtual()
    piece_s = PIECE_BYTES / GB
    guesses = [machine.copy((0, e), GB, urgent=False) for e in (0, 1)]
    machine.now_s = 0.1
    miss = machine.copy((1, 0), GB, urgent=True)
    machine.now_s = 10.0
    assert all(copy.done() for copy in (*guesses, miss))
    begun_s = math.ceil(0.1 / piece_s) * piece_s  # the piece that ran is not interrupted
    assert miss.done_s == pytest.approx(begun_s + 1)
    assert guesses[0].done_s == pytest.approx(2)
    assert guesses[1].done_s == pytest.approx(3)
    assert machine.lanes()[Lane.LINK] == pytest.approx((3.0, 3 * GB))


def test_a_copy_that_has_not_begun_can_be_dropped_and_one_that_has_cannot() -> None:
    machine = _virtual()
    first, second = machine.copy((0, 0), GB, urgent=False), machine.copy((0, 1), GB, urgent=False)
    machine.now_s = 0.5
    assert second.cancel()
    assert not first.cancel()
    assert first.left_bytes() == pytest.approx(GB / 2, abs=PIECE_BYTES)
    machine.now_s = 5.0
    assert first.done()
    assert not second.done()
    assert machine.lanes()[Lane.LINK] == pytest.approx((1.0, GB))


def test_a_copy_into_a_slot_in_flight_waits_for_the_one_before() -> None:
    machine = _virtual()
    old, other = machine.copy((0, 0), GB, urgent=False), machine.copy((0, 1), GB, urgent=False)
    new = machine.copy((0, 2), GB, urgent=True, before=old)  # hastens what it waits for
    machine.now_s = 10.0
    assert new.done()
    assert (old.done_s, new.done_s, other.done_s) == pytest.approx((1, 2, 3))


def test_the_cpu_slows_down_while_the_link_copies() -> None:
    costs = replace(COSTS, cpu_beside_link_gbps=5.0)
    machine = _virtual(costs)
    machine.begin_layer(0, 1)
    machine.copy((1, 0), GB // 10, urgent=False)  # 0.1 s of the link
    machine.run_cpu([Share((0, 0), 1, ROUND.neurons)])
    crossing_s = costs.link_s(2 * ROUND.hidden)
    # Beside it 0.2 s would be needed: half is done after 0.1 s, and the rest takes 0.05 s alone.
    # The hidden states went first, while the link was copying already.
    beside_s = 0.1 - crossing_s
    assert machine.lane_free_s(Lane.CPU) == pytest.approx(
        crossing_s + beside_s + (1 - beside_s / 0.2) * 0.1 + crossing_s
    )


def test_work_behind_a_copy_waits_for_it_and_so_does_a_copy_behind_work() -> None:
    machine = _virtual()
    machine.begin_layer(0, 1)
    first = machine.copy((0, 0), GB, urgent=True)
    end_s = machine.run_gpu([Share((0, 0), 1, ROUND.neurons)], first)
    assert end_s == pytest.approx(1 + 0.01)
    second = machine.copy((0, 1), GB, urgent=True, after_s=end_s)
    assert machine.run_gpu([Share((0, 1), 1, ROUND.neurons)], second) == pytest.approx(end_s + 1 + 0.01)
    machine.end_layer()
    assert machine.now_s == pytest.approx(end_s + 1.01)


@settings(max_examples=200, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 40), st.integers(1, 12), st.booleans(), st.integers(0, 30)), min_size=1, max_size=12
    )
)
def test_the_link_does_what_a_simulation_piece_by_piece_does(arrivals: list[tuple[int, int, bool, int]]) -> None:
    """In units of one piece: (when it comes, pieces, urgent, when it may begin at the earliest)."""
    piece_s = COSTS.link_s(PIECE_BYTES)
    machine = _virtual()
    arrivals = sorted(arrivals, key=lambda a: a[0])
    copies = []
    for at, pieces, urgent, earliest in arrivals:
        machine.now_s = at * piece_s
        copies.append(machine.copy((0, 0), pieces * PIECE_BYTES, urgent, after_s=earliest * piece_s))
    machine.link.advance(math.inf)

    left = [pieces for _, pieces, _, _ in arrivals]
    ends = [0] * len(arrivals)
    now = 0
    while any(left):
        ready = [i for i, (at, _, _, earliest) in enumerate(arrivals) if left[i] and max(at, earliest) <= now]
        if ready:
            i = min(ready, key=lambda i: (not arrivals[i][2], i))
            left[i] -= 1
            ends[i] = now + 1
        now += 1
    assert [copy.done_s / piece_s for copy in copies] == pytest.approx(ends)


def test_experts_beyond_the_ram_come_from_the_disk() -> None:
    spec = ModelSpec((ROUND,), dense_bytes=0)
    trace = _trace(spec, [[[0]], [[1]], [[2]], [[0]], [[0]]])
    costs = replace(COSTS, disk_gbps=0.5)
    found = replay(trace, make_policy("cpu-only"), _machine(costs, ram_gb=2 / 0.9 + 0.01))  # room for two of four
    assert found.lanes[Lane.DISK] == pytest.approx((8.0, 4 * GB))  # 0, 1, 2, and 0 again
    assert found.decode.seconds == pytest.approx(8.5, rel=1e-3)
    assert replay(trace, make_policy("cpu-only"), _machine(costs)).decode.seconds == pytest.approx(0.5, rel=1e-3)


# ---- policies against arithmetic done by hand


def test_cpu_only_is_dense_and_experts_one_after_the_other() -> None:
    spec = ModelSpec((ROUND,) * 2, dense_bytes=10 * GB)
    found = replay(_trace(spec, [[[0, 1], [2, 3]]] * 5), make_policy("cpu-only"), _machine())
    # A token: 10 GB of dense weights at 100 GB/s, four experts at 10 GB/s; hidden states cross twice a layer.
    crossing_s = 2 * 2 * COSTS.link_s(2 * ROUND.hidden)
    assert found.decode.seconds / 5 == pytest.approx(0.1 + 0.4 + crossing_s)
    assert found.decode.own_share == pytest.approx(0.5 / (0.5 + crossing_s))


def test_layer_streaming_moves_every_expert_over_the_link_in_every_step() -> None:
    layers, tokens = 8, 20
    spec = ModelSpec((ROUND,) * layers, dense_bytes=10 * GB)
    trace = _trace(spec, [[[0, 1]] * layers] * tokens)
    found = replay(trace, make_policy("layer-streaming"), _machine(gpu_gb=10 + 8))
    seconds_a_token = layers * ROUND.experts * 1.0  # 1 GB each at 1 GB/s; dense and GPU hide behind it
    assert found.decode.seconds / tokens == pytest.approx(seconds_a_token, rel=0.05)
    assert found.moved_bytes == pytest.approx(tokens * layers * ROUND.experts * GB, rel=0.05)
    assert found.decode.misses <= 2  # the first layer's, before anything could be ahead


def test_a_copy_always_cache_pays_a_copy_for_each_miss() -> None:
    spec = ModelSpec((ROUND,), dense_bytes=10 * GB)
    trace = _trace(spec, [[[0, 1]], [[0, 1]], [[2, 3]], [[0, 1]]])
    found = replay(trace, make_policy("lru"), _machine(gpu_gb=10 + 2))
    assert (found.decode.hits, found.decode.misses, found.moved_bytes) == (2, 6, 6 * GB)
    # Four steps of 0.1 s dense; three of two copies and the last one's 0.01 s on the GPU; one of two hits.
    assert found.decode.seconds == pytest.approx(4 * 0.1 + 3 * (2 + 0.01) + 0.02, rel=1e-6)


def test_fiddler_copies_the_experts_with_the_most_tokens() -> None:
    costs = replace(COSTS, cpu_gflops=2 * 3 * ROUND.neurons * ROUND.hidden / 1e9 * 10)  # 0.1 s a token
    prompt = [{0: 1, 1: 2, 2: 30, 3: 20}]
    found = replay(_trace(ModelSpec((ROUND,), 0), [], prompt), make_policy("fiddler"), _machine(costs, gpu_gb=2))
    # Copying 2 and 3 takes 2 s; 0 and 1 on the CPU 0.3 s: less than 2 alone on the CPU (3 s), or 3 (2 s and 1 s).
    assert found.moved_bytes == 2 * GB
    assert found.prefill.seconds == pytest.approx(2.01, rel=1e-3)


def test_moestro_splits_a_miss_so_that_both_sides_end_together() -> None:
    costs = costs_of(cpu_gbps=2, link_gbps=1, gpu_gbps=1e6, cpu_beside_link_gbps=2.0, cpu_gflops=1e9, gpu_gflops=1e9)
    spec = ModelSpec((ROUND,), 0)
    found = replay(_trace(spec, [[[0]]]), make_policy("moestro"), _machine(costs, gpu_gb=2))
    # 1 GB at 3 GB/s together, but whole blocks: 3 of 10 cross (0.3 s), 7 stay (0.35 s).
    assert found.moved_bytes == 3 * GB // 10
    assert found.decode.seconds == pytest.approx(0.35, rel=1e-3)


def test_where_ram_is_shared_moestro_leaves_the_link_alone() -> None:
    """The CPU reads all that the RAM gives: a copy takes from it as much as it brings."""
    costs = costs_of(cpu_gbps=3, link_gbps=1, gpu_gbps=1e6, cpu_gflops=1e9, gpu_gflops=1e9)
    assert costs.cpu_beside_link_gbps == 2
    found = replay(_trace(ModelSpec((ROUND,), 0), [[[0]]]), make_policy("moestro"), _machine(costs, gpu_gb=2))
    assert found.moved_bytes == 0


@pytest.mark.parametrize("policy", ["fiddler", "moestro", "bandwidth-split"])
def test_decisions_follow_the_machine(policy: str) -> None:
    """A faster link carries more, a faster CPU leaves it less to carry."""
    spec = ModelSpec((MIXTRAL,) * 4, dense_bytes=GB)
    trace = _random_trace(spec, 30, seed=1)

    def moved(cpu_gbps: float, link_gbps: float) -> int:
        costs = costs_of(
            cpu_gbps=cpu_gbps,
            cpu_beside_link_gbps=cpu_gbps,
            link_gbps=link_gbps,
            gpu_gbps=800,
            cpu_gflops=500,
            gpu_gflops=1e5,
        )
        machine = _machine(costs, gpu_gb=1 + 8 * MIXTRAL.expert_bytes / GB)
        return replay(trace, make_policy(policy), machine).moved_bytes

    assert moved(20, 60) > moved(20, 6)
    assert moved(10, 25) > moved(200, 25)


@pytest.mark.parametrize(("gpu_gbps", "helps"), [(20, True), (40, True), (800, False)])
def test_speculation_pays_where_the_gpu_leaves_the_link_idle(gpu_gbps: float, helps: bool) -> None:
    """The paper has 1.05 to 1.34 x (table 2), on GPUs whose kernels took far longer than reading the weights."""
    spec = ModelSpec((MIXTRAL,) * 8, dense_bytes=800 * 10**6, dense_weights=400 * 10**6)
    costs = costs_of(cpu_gbps=40, link_gbps=12, gpu_gbps=gpu_gbps, cpu_gflops=500, gpu_gflops=1e5)
    gpu_bytes = spec.dense_bytes + 36 * MIXTRAL.expert_bytes
    with_guesses, without = (
        replay(_random_trace(spec, 60, seed=3), make_policy(name), _machine(costs), gpu_bytes=gpu_bytes).decode.tok_s
        for name in ("lru-speculative", "lru")
    )
    assert with_guesses > 1.1 * without if helps else with_guesses < without


# ---- all of them


MACHINES = [name for name in machine_names() if name != "this"]


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("machine", ["t4-colab", "quadro-rtx6000", "rtx4090", "rtx5090"])
def test_every_policy_reaches_its_own_limit(name: str, machine: str) -> None:
    spec = ModelSpec((MIXTRAL,) * 8, dense_bytes=800 * 10**6, dense_weights=400 * 10**6)
    trace = _random_trace(spec, 60, seed=3, prompt=512)
    found = replay(
        trace,
        make_policy(name),
        replace(machine_named(machine), ram_bytes=2**40),
        gpu_bytes=spec.dense_bytes + 20 * MIXTRAL.expert_bytes,
        heat=_random_trace(spec, 60, seed=4).heat(),
    )
    assert 0.9 <= found.decode.own_share <= 1.0 + 1e-9
    assert 0.9 <= found.prefill.own_share <= 1.0 + 1e-9
    assert found.decode.share <= 1.0 + 1e-9


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(POLICIES)),
    seed=st.integers(0, 2**16),
    slots=st.integers(0, 24),
    layers=st.integers(1, 4),
    experts=st.integers(2, 6),
    machine=st.sampled_from(MACHINES),
    splittable=st.booleans(),
)
def test_every_decision_on_any_trace_is_lawful_and_the_clock_adds_up(
    name: str, seed: int, slots: int, layers: int, experts: int, machine: str, splittable: bool
) -> None:
    """The replay checks each decision as the conductor does."""
    layer = LayerSpec(experts, 160, 10**7, splittable=splittable, hidden=64)
    spec = ModelSpec((layer,) * layers, dense_bytes=10**6, dense_weights=10**6)
    trace = _random_trace(spec, 12, seed, prompt=9)
    found = replay(trace, make_policy(name), machine_named(machine), gpu_bytes=spec.dense_bytes + slots * 10**7)
    decode = found.decode
    assert decode.hits + decode.joined + decode.misses == 12 * layers * 2
    assert found.seconds == pytest.approx(found.prefill.seconds + decode.seconds)
    assert all(
        busy_s <= found.seconds * (1 + 1e-9) for lane, (busy_s, _) in found.lanes.items() if lane is not Lane.LINK
    )
    assert decode.own_share <= 1 + 1e-9
    assert decode.share <= 1 + 1e-9
    assert found.slots * 10**7 <= slots * 10**7


def test_a_timeline_has_the_lanes_and_no_two_spans_of_one_at_once(tmp_path: Path) -> None:
    spec = ModelSpec((MIXTRAL,) * 3, dense_bytes=GB)
    spans = Timeline()
    machine = machine_named("rtx4090")
    found = replay(
        _random_trace(spec, 10, 5), make_policy("lru-speculative"), machine, gpu_bytes=6 * GB, timeline=spans
    )
    spans.save(tmp_path / "timeline.json")
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert set(lanes.values()) == {"cpu", "gpu", "link", "disk"}
    for row, lane in lanes.items():
        of_lane = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X" and e["tid"] == row)
        assert all(a[1] <= b[0] + 2e-3 for a, b in pairwise(of_lane)), lane
        busy_s = sum(end - start for start, end in of_lane) / 1e6
        assert busy_s == pytest.approx(found.lanes[Lane(lane)][0], rel=1e-3)


def test_a_trace_that_does_not_fit_is_refused_with_the_numbers() -> None:
    spec = ModelSpec((MIXTRAL,), dense_bytes=30 * GB)
    with pytest.raises(BudgetError, match=r"dense part needs 27.9 GiB .* there are 24.0 GiB"):
        replay(_trace(spec, [[[0]]]), make_policy("lru"), machine_named("rtx4090"))
    without = Machine("bare", "no GPU", 0, 10**12, costs_of(cpu_gbps=20))
    with pytest.raises(BudgetError, match="bare has no GPU; leave it out"):
        replay(_trace(spec, [[[0]]]), make_policy("lru"), without, gpu_bytes=2**30)
    assert replay(_trace(spec, [[[0]]]), make_policy("lru"), without).slots == 0
    with pytest.raises(BudgetError, match=r"rtx4090 has 24.0 GiB"):
        replay(_trace(spec, [[[0]]]), make_policy("lru"), machine_named("rtx4090"), gpu_bytes=2**40)


# ---- Belady, machines


def _best_hits(steps: list[frozenset[int]], slots: int) -> int:
    """The most hits of any cache, by trying all of them."""
    items = sorted(set().union(*steps))
    states: dict[frozenset[int], int] = {frozenset(s): 0 for s in _subsets(items, slots)}
    for wanted in steps:
        found: dict[frozenset[int], int] = {}
        for cache, hits in states.items():
            total = hits + len(cache & wanted)
            for following in _subsets(sorted(cache | wanted), slots):
                found[following] = max(found.get(following, 0), total)
        states = found
    return max(states.values())


def _subsets(items: list[int], most: int) -> list[frozenset[int]]:
    found = [frozenset[int]()]
    for item in items:
        found += [s | {item} for s in found if len(s) < most]
    return found


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.frozensets(st.integers(0, 4), min_size=1, max_size=2), min_size=1, max_size=7),
    slots=st.integers(0, 3),
)
def test_beladys_hits_are_the_most_that_any_cache_can_have(steps: list[frozenset[int]], slots: int) -> None:
    assert sum(map(len, belady_hits(steps, slots))) == _best_hits(steps, slots)


def test_machines_are_data_with_sources() -> None:
    assert len(MACHINES) == 12
    for name in MACHINES:
        machine = machine_named(name)
        costs = machine.costs
        assert costs.cpu_gbps
        assert costs.link_gbps
        assert costs.gpu_gbps
        assert costs.cpu_beside_link_gbps
        assert 0 < costs.cpu_beside_link_gbps < costs.cpu_gbps
        assert costs.link_gbps < costs.gpu_gbps
        assert machine.gpu_bytes >= 8 * 2**30
    data = json.loads(Path(machines.__file__).with_name("machines.json").read_text())
    for found in data["machines"]:
        assert set(found) - {"name", "sources"} == set(found["sources"]), found["name"]
    with pytest.raises(RequestError, match="no machine 'abacus'; there are: t4-colab"):
        machine_named("abacus")
