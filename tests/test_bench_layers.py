"""`python -m benchmarks.rivals kernels`, at toy size: what is computed, what is drawn, and the rows in the JSON."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from benchmarks.rivals import __main__ as command
from benchmarks.rivals import kt_kernel, layers
from benchmarks.rivals.layer_engines import OurLayer, TorchExperts
from benchmarks.rivals.layers import measure_rivals
from benchmarks.rivals.steps import FORWARDS, draw_steps
from moestro.bench import kernels
from moestro.bench import report as reports
from moestro.bench.kernels import moe_layer
from moestro.compute.cpu import levels
from moestro.compute.experts import ExpertWork, run_experts
from moestro.errors import BudgetError, RequestError
from moestro.planning.shapes import REAL_SHAPES, SHAPES

pytestmark = pytest.mark.skipif(not levels(), reason="built without the kernels: no compiler was there")
TOY = SHAPES["tiny"] | {"hidden_size": 256, "intermediate_size": 512}  # 8 experts, top-2


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "toy", TOY)
    monkeypatch.setattr(layers, "last_level_cache_bytes", lambda: 2**20)
    monkeypatch.setattr(layers, "KT_BITS", {"int4": 4})  # a worker takes seconds of importing torch
    monkeypatch.setattr(layers, "TORCH_FORMATS", ("fp32",))


def test_the_shapes_are_those_that_models_are_built_of() -> None:
    for name in (*REAL_SHAPES, "tiny"):
        config = SHAPES[name]
        expert, experts, top_k = moe_layer(name)
        assert expert.hidden == config["hidden_size"]
        assert expert.neurons == config.get("moe_intermediate_size", config["intermediate_size"])
        assert experts == (config.get("num_experts") or config["num_local_experts"])
        assert top_k == config["num_experts_per_tok"]


def test_a_draw_is_of_distinct_experts_and_the_same_for_the_same_seed() -> None:
    draws = draw_steps(tokens=50, hidden=32, experts=8, top_k=3, seed=4)
    assert len(draws) == 1 + FORWARDS
    for draw, again in zip(draws, draw_steps(50, 32, 8, 3, seed=4), strict=True):
        assert draw.routes.shape == (50, 3)
        assert all(len(set(row)) == 3 for row in draw.routes.tolist())
        assert np.array_equal(draw.routes, again.routes)
        assert np.array_equal(draw.hidden, again.hidden)
    assert not np.array_equal(draws[0].routes, draws[1].routes)
    assert {*draws[0].routes.flatten().tolist()} == set(range(8))


@pytest.mark.parametrize("format_name", ["bf16", "int4"])
@pytest.mark.parametrize("tokens", [1, 70])
def test_a_timed_step_is_the_whole_layer(format_name: str, tokens: int) -> None:
    layer = OurLayer(128, 192, 8, 2, format_name, threads=1)
    x, index, weights = layer.tensors(draw_steps(tokens, 128, 8, 2, seed=0)[0])
    expected = torch.zeros(tokens, 128)
    for expert in range(8):
        rows, column = (index == expert).nonzero(as_tuple=True)
        work = ExpertWork(layer.store[0, expert], range(192), rows, weights[rows, column])
        run_experts(layer.math, x, [work], expected)
    out = layer.step(x, index, weights)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=1e-3 * float(expected.abs().max()))


def test_the_experts_of_torch_take_turns() -> None:
    theirs = TorchExperts(64, 96, experts=3, format_name="bf16", threads=1)
    assert theirs._weights.isfinite().all()
    seen: list[int] = []
    theirs._products = lambda x, h, weights: seen.append(weights.data_ptr())  # type: ignore[method-assign]
    theirs.expert_s(4)
    theirs.expert_s(4)
    assert seen == [theirs._weights[i % 3].data_ptr() for i in range(2 * (1 + FORWARDS))]


@pytest.mark.long
@pytest.mark.usefixtures("toy")
def test_rows_beside_the_rivals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["kernels", "--shape", "toy", "--tokens", "1", "--tokens", "5", "--rounds", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmarks.rivals", *arguments, "--json"])
    command.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    engines = [("torch fp32", "fp32")]
    if kt_kernel.available() is not None:
        engines.insert(0, ("kt-kernel", "int4"))
    found = [(row["shape"], row["engine"], row["format"], row["tokens"]) for row in rows]
    assert found == [("toy", *engine, tokens) for engine in engines for tokens in (1, 5)]
    for row in rows:
        assert 0 < row["seconds"] < 10
        assert 0 < row["ours_seconds"] < 10
        assert row["ratio"] == pytest.approx(row["seconds"] / row["ours_seconds"])  # of a single round
        assert row["in_cache"] == (row["caches"] < 8)
        assert row["in_cache"] == (row["format"] == "int4")
        assert row["backend"]
    layers.print_rivals([layers.RivalRow(**row) for row in rows])
    assert "how many times faster ours is" in capsys.readouterr().out


def test_torch_alone_is_measured_without_kt_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kt_kernel, "available", lambda: None)
    monkeypatch.setattr(layers, "_beside_torch", lambda name, fmt, tokens, *_: [(name, fmt, tokens)])
    rows = measure_rivals(shapes=["olmoe-1b-7b"], threads=1)
    assert rows == tuple(("olmoe-1b-7b", fmt, layers.TORCH_TOKENS) for fmt in ("bf16", "fp32"))


def test_what_cannot_be_measured_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for measure in (measure_rivals, kernels.measure_kernels):
        with pytest.raises(RequestError, match="no shape 'huge'; there are: mixtral-8x7b"):
            measure(shapes=["huge"])
    monkeypatch.setattr(layers, "available_ram_bytes", lambda: 2**30)
    with pytest.raises(BudgetError, match=r"beside a rival needs .* but 1\.0 GiB are free; .*--shape"):
        measure_rivals()
    monkeypatch.setattr(reports, "levels", dict)
    with pytest.raises(RequestError, match="built without its kernels"):
        measure_rivals()
