"""The Triton kernels against float64: on the GPU where there is one, else by Triton's interpreter on CPU tensors."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from moestro.compute import gpu
from moestro.compute.experts import ExpertMath, ExpertWork, run_experts
from moestro.compute.gpu import (
    GpuKernel,
    Plan,
    kernel_of,
    plan_of,
    plan_on_device,
    run_grouped,
    table_of,
    workspace_at_most,
    workspace_bytes,
)
from moestro.compute.gpu import plan as plans
from moestro.compute.gpu.plan import PlanPart
from moestro.memory.formats import FORMATS, ExpertShape
from test_cpu_kernels import GATES

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and overflow, in the interpreter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def tolerance(kernel: GpuKernel) -> float:
    """Of the largest result: by how the join of gate and up enters the second half."""
    if kernel.down_is_fp32:
        return 3e-6
    return 5e-5 if kernel.down_matrix.code == "bf16" else 1e-3


class Layer:
    """Random experts in slots, in another order than theirs, among slots of poison."""

    def __init__(self, math: ExpertMath, dtype: torch.dtype, experts: int = 3) -> None:
        self.math, self.experts = math, experts
        pool = torch.full((experts + 2, math.format.expert_bytes(math.shape)), 0xFF, dtype=torch.uint8)
        self.slots = torch.randperm(experts + 2)[:experts]
        for slot in self.slots:
            self.fill(pool[slot])
        self.pool = pool.to(DEVICE)
        kernel = kernel_of(math, dtype, DEVICE)
        assert kernel is not None
        self.kernel, self.dtype = kernel, dtype

    def fill(self, packed: Tensor) -> None:
        """Write a random expert."""
        shape = self.math.shape
        parts = {name: torch.randn(size) / shape.hidden**0.5 for name, size in shape.parts.items()}
        self.math.format.pack(packed, shape, parts, fast=True)

    @property
    def table(self) -> Tensor:
        return table_of(self.kernel, self.slots.tolist(), DEVICE)

    def x(self, tokens: int) -> Tensor:
        return torch.randn(tokens, self.math.shape.hidden).to(self.dtype).to(DEVICE)

    def work(self, index: Tensor, weights: Tensor, shares: tuple[range, ...] = ()) -> list[ExpertWork]:
        """What a router's choice asks of each expert, those without tokens included."""
        found = []
        for expert in range(self.experts):
            rows, column = torch.nonzero(index == expert, as_tuple=True)
            for share in shares or (range(self.math.shape.neurons),):
                found.append(ExpertWork(self.pool[self.slots[expert]], share, rows, weights[rows, column]))
        return found

    def expected(self, x: Tensor, work: list[ExpertWork]) -> Tensor:
        """float64 [T, D]."""
        total = torch.zeros(x.shape, dtype=torch.float64)
        for packed, neurons, rows, weights, *_ in work:
            p = self.math.format.unpack(packed.cpu(), self.math.shape, neurons, torch.float64)
            h = x.cpu()[rows].double()
            gate = None if p.gate is None else linear(h, p.gate, p.gate_bias)
            y = linear(self.math.activation(gate, linear(h, p.up, p.up_bias)), p.down, p.down_bias)
            total.index_add_(0, rows, y * weights[:, None].double())
        return total

    def run(self, plan: Plan, x: Tensor) -> Tensor:
        """Into poisoned memory; float32 [T, D] on the host."""
        out = torch.full(x.shape, float("nan"), device=DEVICE)
        poison = torch.full((workspace_bytes(self.kernel, plan),), 0xFF, dtype=torch.uint8, device=DEVICE)
        run_grouped(self.kernel, self.pool, plan, x, out, add=False, workspace=poison)
        return out.cpu()

    def error(self, out: Tensor, expected: Tensor) -> float:
        """The largest, as a share of the largest result."""
        return float((out - expected).abs().max() / expected.abs().max())


def _layer(name: str, x: str, hidden: int = 24, neurons: int = 40, gate: str = "silu", **shape: bool) -> Layer:
    return Layer(ExpertMath(ExpertShape(hidden, neurons, **shape), FORMATS[name], GATES[gate]), DTYPES[x])


def choice(tokens: int, experts: int = 3, k: int = 2) -> tuple[Tensor, Tensor]:
    """A router's: index int64 [T, K], weights [T, K]."""
    index = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)])
    return index, torch.rand(tokens, k) + 0.1


@pytest.mark.parametrize(
    ("name", "x"),
    [(name, x) for name in ("int8", "int4") for x in DTYPES]
    + [("fp32", "fp32"), ("fp32", "bf16"), ("fp16", "fp16"), ("fp16", "bf16"), ("bf16", "bf16"), ("bf16", "fp16")],
)
@pytest.mark.parametrize("is_wide", [True, False])
def test_formats_against_float64(name: str, x: str, is_wide: bool) -> None:
    odd = int(torch.randint(1, 64, ()))
    hidden, neurons = (64 + odd, odd) if is_wide else (64, 64 + odd)
    layer = _layer(name, x, hidden=hidden, neurons=neurons, has_bias=odd % 2 == 0)
    index, weights = choice(2, k=1)
    hidden_states = layer.x(2)
    expected = layer.expected(hidden_states, layer.work(index, weights))
    out = layer.run(plan_on_device(layer.kernel, index.to(DEVICE), weights.to(DEVICE), layer.table), hidden_states)
    assert (error := layer.error(out, expected)) <= tolerance(layer.kernel), f"{layer.kernel}: {error:.1e}"


@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize("gate", sorted(GATES))
def test_gates_against_float64(gate: str, has_gate: bool) -> None:
    if not has_gate and gate in ("gpt_oss", "deepseek_v4"):
        pytest.skip("clamped gates join two")
    layer = _layer("fp32", "fp32", gate=gate, has_gate=has_gate, has_bias=True)
    index, weights = choice(1)
    x = layer.x(1) * 4  # meets the clamps
    expected = layer.expected(x, layer.work(index, weights))
    out = layer.run(plan_of(layer.kernel, layer.pool, layer.work(index, weights), 1), x)
    assert layer.error(out, expected) <= tolerance(layer.kernel)


@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_numbers_of_tokens(name: str, tokens: int) -> None:
    """With 40 an expert has more than a tile of 16."""
    layer = _layer(name, "bf16", neurons=64, has_bias=True)
    index, weights = choice(tokens)
    index[:, 0] = 1  # chosen by all, by some of them twice
    x, work = layer.x(tokens), layer.work(index, weights)
    out = layer.run(plan_of(layer.kernel, layer.pool, work, tokens), x)
    assert layer.error(out, layer.expected(x, work)) <= tolerance(layer.kernel)


def tiles_of(part: PlanPart) -> dict[int, list[list[int]]]:
    """Those with pairs, by the rows of their group; each has pairs for which no smaller group has room."""
    found = {rows: [tile for tile in tiles.tolist() if tile[3] < tile[4]] for rows, tiles in part.groups}
    for least, (rows, tiles) in zip((0, *found), found.items(), strict=False):
        assert all(least < tile[4] - tile[3] <= rows for tile in tiles)
    return {rows: tiles for rows, tiles in found.items() if tiles}


@pytest.mark.parametrize("partly", [False, True], ids=["all", "an expert is missing and one is there in part"])
@pytest.mark.parametrize("pairs_at_once", [0, 256])
@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (1, 3), (3, 2), (17, 3), (50, 3)])
def test_both_builders_plan_the_same(
    tokens: int, k: int, pairs_at_once: int, partly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "PAIRS_AT_ONCE", pairs_at_once)
    layer = _layer("fp32", "fp32", hidden=8, neurons=130)
    index, weights = choice(tokens, k=k)
    index[torch.rand(tokens, k) < 0.2] += 3  # somebody else's
    weights[torch.rand(tokens, k) < 0.2] = 0
    index[0, 0], weights[0, 0] = 2, 0.5
    table, work = layer.table, layer.work(index, weights)
    if partly:
        table[1, 2] = 0
        table[2, 1], table[2, 2] = 1, 2
        work = [work[0], work[2]._replace(neurons=range(64, 130))]
    work = [w for w in work if len(w.rows)]
    (ours,) = plan_of(layer.kernel, layer.pool, work, tokens).parts
    (theirs,) = plan_on_device(layer.kernel, index.to(DEVICE), weights.to(DEVICE), table).parts
    pairs = len(ours.pair_token)
    assert torch.equal(theirs.pair_token[:pairs], ours.pair_token)
    assert torch.equal(theirs.pair_weight[:pairs], ours.pair_weight)
    assert tiles_of(theirs) == tiles_of(ours)
    starts, entries = theirs.token_start.tolist(), theirs.token_pairs.tolist()
    of_tokens = [[p for p in entries[a:b] if p < tokens * k] for a, b in itertools.pairwise(starts)]
    starts, entries = ours.token_start.tolist(), ours.token_pairs.tolist()
    assert of_tokens == [entries[a:b] for a, b in itertools.pairwise(starts)]


def test_what_is_nobodys_adds_nothing() -> None:
    """Indices that are no expert's, weights of 0, experts without tokens, and a token that chose nobody."""
    layer = _layer("bf16", "bf16")
    index = torch.tensor([[0, 4], [5, 2], [2, 0], [3, 9]])
    weights = torch.tensor([[0.5, 0.7], [0.1, 0.0], [0.3, 0.2], [0.4, 0.4]])
    x, work = layer.x(4), layer.work(index, weights)
    expected = layer.expected(x, work)
    by_host = layer.run(plan_of(layer.kernel, layer.pool, work, 4), x)
    by_device = layer.run(plan_on_device(layer.kernel, index.to(DEVICE), weights.to(DEVICE), layer.table), x)
    assert layer.error(by_host, expected) <= tolerance(layer.kernel)
    assert torch.allclose(by_host, by_device, rtol=1e-5, atol=1e-6)
    assert not by_device[3].any()
    nothing = layer.run(plan_on_device(layer.kernel, (index + 3).to(DEVICE), weights.to(DEVICE), layer.table), x)
    assert torch.equal(nothing, torch.zeros(x.shape))
    assert torch.equal(layer.run(plan_of(layer.kernel, layer.pool, [], 4), x), nothing)


@pytest.mark.parametrize("name", ["fp16", "int4"])
def test_shares_of_an_expert_add_up(name: str) -> None:
    """The down bias comes with the last neuron; shares may be of one plan or of two, which are added."""
    layer = _layer(name, "fp16", neurons=100, has_bias=True)
    index, weights = choice(2, k=1)
    x = layer.x(2)
    expected = layer.expected(x, layer.work(index, weights))
    shares = (range(64), range(64, 100))
    together = layer.run(plan_of(layer.kernel, layer.pool, layer.work(index, weights, shares), 2), x)
    assert layer.error(together, expected) <= tolerance(layer.kernel)
    out = torch.ones(x.shape, device=DEVICE)
    for share in shares:
        work = layer.work(index, weights, (share,))
        run_grouped(layer.kernel, layer.pool, plan_of(layer.kernel, layer.pool, work, 2), x, out)
    assert layer.error(out.cpu() - 1, expected) <= tolerance(layer.kernel)


def test_the_workspace_is_bounded_whatever_the_tokens() -> None:
    layer = _layer("bf16", "bf16", neurons=180, has_bias=True)
    index, weights = choice(6)
    x, work = layer.x(6), layer.work(index, weights)
    whole = plan_of(layer.kernel, layer.pool, work, 6)
    limit = workspace_bytes(layer.kernel, whole) // 3
    for plan in (
        plan_of(layer.kernel, layer.pool, work, 6, limit_bytes=limit),
        plan_on_device(layer.kernel, index.to(DEVICE), weights.to(DEVICE), layer.table, limit_bytes=limit),
    ):
        assert len(plan.parts) > 1
        assert workspace_bytes(layer.kernel, plan) <= limit
        assert layer.error(layer.run(plan, x), layer.expected(x, work)) <= tolerance(layer.kernel)
    chunked = replace(whole, limit_bytes=limit * 2)
    assert len(chunked.parts) == 1
    assert workspace_bytes(layer.kernel, chunked) < workspace_bytes(layer.kernel, whole)
    assert layer.error(layer.run(chunked, x), layer.expected(x, work)) <= tolerance(layer.kernel)
    with pytest.raises(ValueError, match="a workspace of 1 bytes"):
        run_grouped(layer.kernel, layer.pool, whole, x, x.float(), workspace=torch.empty(1, dtype=torch.uint8))


@pytest.mark.parametrize("tokens", [1, 8, 300])
def test_what_is_planned_for_is_enough(tokens: int) -> None:
    layer = _layer("int4", "bf16", neurons=600)
    index, weights = choice(tokens)
    for plan in (
        plan_of(layer.kernel, layer.pool, layer.work(index, weights), tokens),
        plan_on_device(layer.kernel, index.to(DEVICE), weights.to(DEVICE), layer.table),
    ):
        assert workspace_bytes(layer.kernel, plan) <= workspace_at_most(layer.kernel, tokens)


def test_results_are_the_same_bit_for_bit() -> None:
    """Whoever shares its tile, and in whatever order the router names its choice."""
    layer = _layer("int8", "bf16")
    index, weights = (part.to(DEVICE) for part in choice(20))
    x = layer.x(20)
    first, second, other_way = (
        layer.run(plan_on_device(layer.kernel, i, w, layer.table), x)
        for i, w in ((index, weights), (index, weights), (index.flip(1), weights.flip(1)))
    )
    assert torch.equal(first, second)
    assert torch.equal(first, other_way)


def test_few_programs_split_the_neurons_of_an_expert() -> None:
    layer = _layer("bf16", "bf16", neurons=64 * 8 + 5, has_bias=True)
    index, weights = torch.tensor([[2]]), torch.tensor([[0.7]])
    x, work = layer.x(1), layer.work(index, weights)
    results = [layer.run(plan_of(layer.kernel, layer.pool, work, 1), x) for _ in range(2)]
    assert torch.equal(*results)
    assert layer.error(results[0], layer.expected(x, work)) <= tolerance(layer.kernel)


@pytest.mark.parametrize("size", [1e-30, 1e3, 1e9])
def test_hidden_states_of_any_size(size: float) -> None:
    """The join of gate and up may be larger than any float16."""
    layer = _layer("int8", "bf16")
    index, weights = choice(2, k=1)
    x = layer.x(2)
    x[0] *= size
    work = layer.work(index, weights)
    out, expected = layer.run(plan_of(layer.kernel, layer.pool, work, 2), x), layer.expected(x, work)
    for row in range(2):
        assert out[row].isfinite().all()
        assert (out[row] - expected[row]).abs().max() <= 1e-3 * expected[row].abs().max() + 1e-37


@pytest.mark.parametrize("gate", sorted(GATES))
def test_nan_shows_in_its_token_alone(gate: str) -> None:
    layer = _layer("int8", "fp16", gate=gate, hidden=20, neurons=20)
    index, weights = choice(2)
    x = layer.x(2)
    x[1, 5] = float("nan")
    out = layer.run(plan_of(layer.kernel, layer.pool, layer.work(index, weights), 2), x)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def test_small_tiles_of_gpus_without_tensor_cores() -> None:
    layer = _layer("int4", "fp16")
    kernel = layer.kernel = replace(layer.kernel, has_tensor_cores=False)
    index, weights = choice(2)
    x, work = layer.x(2), layer.work(index, weights)
    plan = plan_on_device(kernel, index.to(DEVICE), weights.to(DEVICE), layer.table)
    assert [list(tiles_of(part)) for part in plan.parts] == [[4]]
    assert layer.error(layer.run(plan, x), layer.expected(x, work)) <= tolerance(kernel)


@pytest.mark.parametrize(
    ("pairs", "most", "rows", "half", "without"),
    [
        (8, 1, (16,), (16,), (4,)),
        (40, 16, (16,), (16,), (4, 16)),
        (40, 17, (16, 32), (16, 32), (4, 16, 32)),
        (80, 64, (16, 32, 64), (16, 32), (4, 16, 32)),
        (1000, 900, (16, 32, 64), (16, 32), (4, 16, 32)),
        (9000, 2000, (128,), (16, 32), (4, 16, 32)),
    ],
)
def test_tiles_grow_with_the_tokens_of_an_expert(
    pairs: int, most: int, rows: tuple[int, ...], half: tuple[int, ...], without: tuple[int, ...]
) -> None:
    kernel = _layer("int4", "bf16").kernel
    for changes, wanted in (
        ({}, rows),
        ({"down_is_fp32": True}, half),
        ({"dtype": "fp32"}, half),
        ({"dtype": "fp32", "down_is_fp32": True}, without),
        ({"has_tensor_cores": False}, without),
    ):
        of = replace(kernel, **changes).on_tensor_cores
        assert plans.tile_sizes(of, pairs, 8, most) == wanted


@pytest.mark.parametrize("sizes", [(32,), (64,), (128,), (16, 32), (16, 32, 64)])
def test_larger_tiles_give_the_same(sizes: tuple[int, ...]) -> None:
    layer = _layer("int4", "bf16")
    index, weights = choice(20)
    x, work = layer.x(20), layer.work(index, weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "tile_sizes", lambda *_: sizes)
        plan = plan_of(layer.kernel, layer.pool, work, 20)
    assert layer.error(layer.run(plan, x), layer.expected(x, work)) <= tolerance(layer.kernel)


def test_a_plan_on_the_device_waits_for_nothing() -> None:
    """Tensors without data cannot tell the host anything."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    kernel = _layer("int4", "bf16").kernel
    with FakeTensorMode():
        index, weights = torch.zeros(300, 2, dtype=torch.int64), torch.zeros(300, 2)
        plan = plan_on_device(kernel, index, weights, torch.ones(8, 3, dtype=torch.int32))
    (part,) = plan.parts
    assert {rows: tiles.shape for rows, tiles in part.groups} == {
        16: (plans.most_tiles(600, 8, 64), 5),
        32: (600 // 17, 5),
        64: (600 // 33, 5),
    }


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2, 16, 60, 200])
def test_a_graph_is_replayed_with_other_routing(tokens: int) -> None:
    layer = _layer("int4", "fp16")
    index, weights = (part.to(DEVICE) for part in choice(tokens))
    x, table = layer.x(tokens), layer.table
    out = torch.empty(x.shape, device=DEVICE)

    def step() -> None:
        run_grouped(layer.kernel, layer.pool, plan_on_device(layer.kernel, index, weights, table), x, out, add=False)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        chosen, mass = choice(tokens)
        index.copy_(chosen)
        weights.copy_(mass)
        graph.replay()
        expected = layer.expected(x, layer.work(chosen, mass))
        assert layer.error(out.cpu(), expected) <= tolerance(layer.kernel)


def _math(**changes: object) -> ExpertMath:
    return replace(ExpertMath(ExpertShape(8, 64), FORMATS["bf16"], GATES["silu"]), **changes)


def test_what_is_not_covered_goes_to_the_twin() -> None:
    unknown: Callable[[Tensor | None, Tensor], Tensor] = lambda g, u: torch.tanh(g) * u  # noqa: E731
    assert kernel_of(_math(), torch.bfloat16, DEVICE) is not None
    assert kernel_of(_math(post_norm=torch.tanh), torch.bfloat16, DEVICE) is None
    assert kernel_of(_math(activation=unknown), torch.bfloat16, DEVICE) is None
    assert kernel_of(_math(), torch.float64, DEVICE) is None


def test_the_twin_agrees() -> None:
    layer = _layer("bf16", "bf16", has_bias=True)
    index, weights = choice(3)
    x = layer.x(3)
    twin = torch.zeros(x.shape, device=DEVICE)
    work = layer.work(index, weights)
    run_experts(layer.math, x, [w._replace(rows=w.rows.to(DEVICE), weights=w.weights.to(DEVICE)) for w in work], twin)
    assert layer.error(layer.run(plan_of(layer.kernel, layer.pool, work, 3), x), twin.cpu()) <= 5e-5


def test_bytes_that_are_in_no_slot_are_refused() -> None:
    layer = _layer("bf16", "bf16")
    index, weights = choice(1)
    with pytest.raises(ValueError, match="in none of its slots"):
        plan_of(layer.kernel, layer.pool[3:], layer.work(index, weights), 1)


def test_without_triton_everything_goes_to_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [name for name in sys.modules if name in ("moestro.compute.gpu.kernels", "moestro.compute.gpu.tiles")]
    for name in ["triton", "triton.language", *ours]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr(gpu, "kernels", raising=False)
    gpu.kernel.triton_kernels.cache_clear()
    try:
        assert kernel_of(_math(), torch.bfloat16, DEVICE) is None
    finally:
        gpu.kernel.triton_kernels.cache_clear()
