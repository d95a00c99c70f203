"""A choice that is no expert of ours is skipped on every path, whatever its index and weight, and all count it so."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from families import save_model
from moestro import load
from moestro.compute.cpu import CpuExperts
from moestro.devices import make_device
from moestro.devices.emulated import EmulatedDevice
from moestro.devices.host import HostDevice
from moestro.engine.conductor import Conductor
from moestro.engine.gates import Gate
from moestro.engine.routing import group_by_expert
from moestro.memory.slots import SlotPool
from moestro.planning.contract import Phase, StepInfo
from pretended_cuda import pretended_cuda
from small_conductor import EXPERTS, LAYERS, SHAPE, ByPort, Drawn, reference_of, small_conductor

SKIPPED = (-1, EXPERTS, EXPERTS + 5, -(2**31), 2**31 - 1, -(2**62), 2**62, 2**32 + 1, -(2**32) + 2, 2**31 + 1, 256 + 1)
WEIGHTS = (0.5, 1.0, -0.25, 0.0, float("nan"), float("inf"), -float("inf"))


def _routing(random: torch.Generator, tokens: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """index [T, K], with choices in any column that are skipped, and weights float32 [T, K], where these have any."""
    limits = torch.iinfo(dtype)
    skipped = [value for value in SKIPPED if limits.min <= value <= limits.max]
    index = torch.randint(0, EXPERTS, (tokens, k), generator=random)
    weights = torch.rand(tokens, k, generator=random) + 0.1
    is_skipped = torch.rand(tokens, k, generator=random) < 0.4
    some = torch.randint(0, len(skipped), (tokens, k), generator=random)
    index = torch.where(is_skipped, torch.tensor(skipped)[some], index)
    any_weight = torch.tensor(WEIGHTS)[torch.randint(0, len(WEIGHTS), (tokens, k), generator=random)]
    return index.to(dtype), torch.where(is_skipped, any_weight, weights)


def _used(index: Tensor, weights: Tensor) -> dict[int, list[tuple[int, float]]]:
    """By expert, its tokens and weights, ascending."""
    found: dict[int, list[tuple[int, float]]] = {}
    for token, (row, masses) in enumerate(zip(index.tolist(), weights.tolist(), strict=True)):
        for expert, mass in zip(row, masses, strict=True):
            if 0 <= expert < EXPERTS and mass != 0:
                found.setdefault(expert, []).append((token, mass))
    return dict(sorted(found.items()))


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.sampled_from([0, 1, 1, 2, 9]),
    k=st.integers(1, 4),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]),
    is_strided=st.booleans(),
)
def test_grouping(seed: int, tokens: int, k: int, dtype: torch.dtype, is_strided: bool) -> None:
    index, weights = _routing(torch.Generator().manual_seed(seed), tokens, k, dtype)
    wanted = _used(index, weights)
    if is_strided:
        index, weights = index.T.contiguous().T, weights.repeat(1, 2)[:, ::2] if k == 1 else weights.T.contiguous().T
    routed = group_by_expert(index, weights, EXPERTS)
    assert routed.tokens == {expert: len(pairs) for expert, pairs in wanted.items()}
    assert routed.mass == pytest.approx({expert: sum(mass for _, mass in pairs) for expert, pairs in wanted.items()})
    for expert, pairs in wanted.items():
        rows, masses = routed.work(expert, torch.empty(0), range(0)).routed()
        assert list(zip(rows.tolist(), masses.tolist(), strict=True)) == pairs


def test_an_index_too_narrow_for_the_number_of_experts() -> None:
    index = torch.tensor([[255, 3], [0, 255]], dtype=torch.uint8)
    for rows in (slice(0, 1), slice(0, 2)):
        routed = group_by_expert(index[rows], torch.ones(2, 2)[rows], 256)
        assert routed.tokens == ({3: 1, 255: 1} if rows.stop == 1 else {0: 1, 3: 1, 255: 2})


# Every path of a layer step.


@contextmanager
def _conductor_of(path: str, seed: int) -> Iterator[tuple[Conductor, list[list[dict[str, Tensor]]]]]:
    with (
        pretended_cuda() if "cuda" in path and not torch.cuda.is_available() else nullcontext((None, None)) as pretended
    ):
        device: Any = HostDevice()
        if "cuda" in path:
            device = pretended[0] or make_device("cuda")
        elif "emulated" in path:
            device = EmulatedDevice(link_gbps=None)
        is_held = "held" in path
        slots = LAYERS * EXPERTS if is_held else 4 if device.accelerator else 0
        conductor, parts = small_conductor(Drawn(seed), slots, device)
        if path == "cpu, torch":
            conductor.cpu = CpuExperts(1, level="torch")
        if is_held:
            everything = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
            conductor.slots = SlotPool(conductor.slots.memory, everything)
            for expert in everything:
                conductor.slots[expert].copy_(conductor.store[expert])
        graphs = mock.patch("moestro.devices.cuda.CudaGraphs")
        sorts = mock.patch("moestro.compute.gpu.plan.PAIRS_AT_ONCE", 0) if "sorted" in path else nullcontext()
        captured = mock.patch("moestro.devices.cuda_slots.captured", lambda _, work: mock.Mock(replay=lambda: work()))
        with graphs, sorts, captured if pretended[0] is not None else nullcontext():
            yield conductor, parts
            conductor.close()


CHEAP = ["cpu", "cpu, torch", "emulated", "emulated by port"]


@pytest.mark.sample(5)
@pytest.mark.parametrize("path", [*CHEAP, "cuda", "cuda by port", "cuda, held", "cuda, held, sorted by torch"])
def test_every_path_skips_and_counts_the_same(path: str) -> None:
    random = torch.Generator().manual_seed(torch.initial_seed())
    sizes = (1, 1, 1, 2, 7) if path in CHEAP else (1, 1, 3)
    with _conductor_of(path, torch.initial_seed() % 1000) as (conductor, parts):
        at, pairs, choices, steps = conductor.device.torch_device, 0, 0, 0
        for number, tokens in enumerate(sizes):
            for dtype in (torch.int64, torch.int32):
                phase = Phase.DECODE if (number + steps) % 3 else Phase.PREFILL
                conductor.begin(StepInfo.alike(phase, tokens))
                run_layer = ByPort(conductor).run_layer if "port" in path else conductor.run_layer
                for layer in range(LAYERS):
                    index, weights = _routing(random, tokens, 3, dtype)
                    x = torch.randn(tokens, SHAPE.hidden, generator=random)
                    out = run_layer(layer, x.to(at), index.to(at), weights.to(at)).cpu()
                    wanted = reference_of(parts[layer], x, index, weights)
                    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
                    used = _used(index, weights)
                    choices += sum(map(len, used.values()))
                    pairs += len(used) if phase is Phase.DECODE else 0
                    steps += 1
        counters = conductor.counters
        assert (counters.layer_steps, counters.tokens) == (steps, choices)
        assert counters.hits + counters.joined + counters.misses == pairs
        assert conductor.counters == counters  # reading them adds nothing
        assert "held" not in path or counters.hits == pairs


def test_held_layers_count_what_all_threads_choose() -> None:
    with _conductor_of("cuda, held", 1) as (conductor, _):
        at = conductor.device.torch_device
        x, weights = torch.randn(2, SHAPE.hidden, device=at), torch.ones(2, 2, device=at)
        index = torch.tensor([[0, 1], [1, -1]], device=at)

        def decode() -> None:
            conductor.begin(StepInfo.alike(Phase.DECODE, 2))
            conductor.run_layer(0, x, index, weights)

        for number in (1, 2):
            thread = threading.Thread(target=decode)
            thread.start()
            thread.join()
            decode()
            counters = conductor.counters
            assert (counters.layer_steps, counters.tokens, counters.hits) == (2 * number, 6 * number, 4 * number)


@pytest.mark.parametrize("pairs_at_once", [0, 256])
@pytest.mark.parametrize("limit_bytes", [None, 1])
def test_plans_on_the_device_count_choices_and_experts(pairs_at_once: int, limit_bytes: int | None) -> None:
    """Sorted by one program, by torch, and in several parts, for which an expert of two parts counts once."""
    from moestro.compute import gpu
    from moestro.compute.experts import ExpertMath
    from moestro.memory.formats import FORMATS

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernel = gpu.kernel_of(
        ExpertMath(SHAPE, FORMATS["fp32"], lambda g, u: g * torch.sigmoid(g) * u), torch.float32, device
    )
    if kernel is None:
        pytest.skip("no Triton here")
    table = gpu.table_of(kernel, range(EXPERTS), device)
    random, counts = torch.Generator().manual_seed(5), torch.zeros(2, dtype=torch.int64, device=device)
    more = {} if limit_bytes is None else {"limit_bytes": limit_bytes}
    choices = pairs = 0
    with mock.patch("moestro.compute.gpu.plan.PAIRS_AT_ONCE", pairs_at_once):
        for tokens in (1, 4, 5):
            index, weights = _routing(random, tokens, 3, torch.int64)
            gpu.plan_on_device(kernel, index.to(device), weights.to(device), table, counts=counts, **more)
            used = _used(index, weights)
            choices, pairs = choices + sum(map(len, used.values())), pairs + len(used)
            assert counts.tolist() == [choices, pairs]


@pytest.mark.parametrize("tokens", [1, 6])
def test_a_gate_learns_from_experts_alone(tokens: int) -> None:
    router = nn.Linear(SHAPE.hidden, EXPERTS, bias=False)
    x = torch.randn(tokens, SHAPE.hidden)
    index = router(x).topk(3).indices
    for skipped in SKIPPED:
        gate = Gate(router)
        gate.learn(x, torch.full_like(index, skipped))
        assert gate.agreement is None  # nothing to learn from
        some = index.clone()
        some[:, 1] = skipped
        gate.learn(x, some)
        assert gate.agreement == 1.0


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_an_experts_module_skips_as_well(device: str, tmp_path: Path) -> None:
    """As a model calls it: index and weights in any layout, hidden states of two or three dimensions."""
    reference = save_model("olmoe", tmp_path)
    random = torch.Generator().manual_seed(1)
    model = load(str(tmp_path), device=device, dtype="float32", threads=1, policy="lru", seed=0)
    with torch.no_grad():
        for tokens in (1, 5):
            x = torch.randn(tokens, model.config.hidden_size, generator=random)
            index = torch.stack([torch.randperm(8, generator=random)[:3] for _ in range(tokens)])
            weights = torch.rand(tokens, 3, generator=random)
            wanted = reference.model.layers[1].mlp.experts(x, index[:, :2], weights[:, :2])
            for skipped in (-1, 8, 13, 2**40):
                index[:, 2] = skipped
                weights[:, 2] = float("nan")
                given = index.T.contiguous().T, weights.T.contiguous().T
                experts = model.model.layers[1].mlp.experts
                torch.testing.assert_close(experts(x, *given), wanted, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(experts(x[None], *given)[0], wanted, rtol=1e-4, atol=1e-5)
        nothing = experts(x[:0], index[:0], weights[:0])
        assert nothing.shape == (0, model.config.hidden_size)
    model.moestro.close()
