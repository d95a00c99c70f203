"""Routing as parameters: traces made of them have them, and replays answer for shapes without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moestro.cli.main import app
from moestro.errors import RequestError
from moestro.planning.contract import LayerSpec, ModelSpec, Phase
from moestro.planning.machines import costs_of, machine_named
from moestro.planning.shapes import SHAPES, spec_of_shape
from moestro.planning.spelling import as_flags
from moestro.simulate.expand import expanded
from moestro.simulate.fit import shortfall
from moestro.simulate.reshape import at_bits
from moestro.simulate.routing import PARAMETERS, Routing, routed_shapes, routing_of
from moestro.simulate.trace_summary import lru_hit_rate, popularity, recall
from test_replay import GB, _machine

NEAR = 0.02  # and recall with its noise drawn anew
# Published, of Mixtral: h39s/mlsys, an LRU of so many slots a layer (see simulate/routing.json).
MIXTRAL_HITS = {2: 0.341, 3: 0.467, 4: 0.590}
QUICK = ("mixtral-8x7b", "gpt-oss-20b")


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes cut to a few layers: experts, top-k and parameters are as in the whole."""
    for name, config in list(SHAPES.items()):
        dense = config.get("first_k_dense_replace", 0)
        monkeypatch.setitem(SHAPES, name, config | {"num_hidden_layers": dense + 3})


def test_all_real_shapes_have_parameters_with_sources() -> None:
    assert {*routed_shapes()} == {*SHAPES} - {"tiny"}
    for name in routed_shapes():
        routing = routing_of(name)
        for parameter in PARAMETERS:
            low, high = getattr(routing.low, parameter), getattr(routing.high, parameter)
            assert 0 < low <= high < 1
            source = routing.sources[parameter]
            assert source.startswith("assumed") or "https://" in source or "same" in source
            assert (parameter in routing.assumed) or not source.startswith("assumed")
    with pytest.raises(RequestError, match="nothing is known of how tiny routes; there are: mixtral-8x7b, olmoe"):
        routing_of("tiny")


def test_the_page_has_the_parameters() -> None:
    page = (Path(__file__).parents[1] / "docs/policies.md").read_text("utf-8")
    for name in routed_shapes():
        routing, cells = routing_of(name), []
        for parameter in PARAMETERS:
            low, high = getattr(routing.low, parameter), getattr(routing.high, parameter)
            ends = f"{low:g} to {high:g}" if low < high else f"{low:g}"
            cells.append(ends if parameter in routing.assumed else f"{ends} (published)")
        assert f"| `{name}` | {' | '.join(cells)} |" in page


@pytest.mark.parametrize("end", ["low", "high"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in routed_shapes()]
)
@pytest.mark.usefixtures("shallow")
def test_a_trace_has_the_parameters_that_it_is_made_of(name: str, end: str) -> None:
    routing: Routing = routing_of(name)
    wanted = getattr(routing, end)
    trace = expanded(name, wanted, seed=routing.seed, tokens=512)
    assert trace.tokens(Phase.DECODE) == 512
    assert popularity(trace)["hottest_quarter"] == pytest.approx(wanted.hottest_quarter, abs=NEAR)
    assert lru_hit_rate(trace, trace.top_k) == pytest.approx(wanted.repeat, abs=NEAR)
    one, two = (recall(trace, ahead, trace.top_k) for ahead in (1, 2))
    assert one == pytest.approx(wanted.recall, abs=NEAR)
    assert one is not None
    assert two is not None
    assert trace.top_k / trace.spec.layers[0].experts < two < one


@pytest.mark.usefixtures("shallow")
def test_mixtral_hits_as_published() -> None:
    routing = routing_of("mixtral-8x7b")
    traces = [expanded("mixtral-8x7b", of, seed=routing.seed, tokens=512) for of in (routing.low, routing.high)]
    for slots, published in MIXTRAL_HITS.items():
        low, high = sorted(lru_hit_rate(trace, slots) for trace in traces)
        assert low <= published <= high
        assert high - low < 0.06


@pytest.mark.usefixtures("shallow")
def test_a_trace_is_the_same_each_time_and_another_with_another_seed(tmp_path: Any) -> None:
    made = [expanded("gpt-oss-20b", routing_of("gpt-oss-20b").low, seed=seed, tokens=8) for seed in (4, 4, 5)]
    written = []
    for number, trace in enumerate(made):
        trace.save(tmp_path / str(number))
        written.append((tmp_path / str(number)).read_bytes())
        for one in trace.passes:
            assert [step.layer for step in one.steps] == list(range(3))
            assert all(sum(step.tokens.values()) == 4 * one.tokens for step in one.steps)
    assert written[0] == written[1] != written[2]


# ---- what does not fit


@pytest.mark.parametrize(
    ("gpu_gb", "ram_gb", "asked_gb", "needed_gb", "there_gb"),
    [
        (10, 100, None, None, 0),  # 5 + 40 of 10 + 90
        (10, 30, None, 45, 37),
        (10, 39, None, None, 0),  # 45 of 45.1
        (10, 39, 9, 45, 44.1),  # not all of the GPU may be used
        (4, 1000, None, 5, 4),  # the dense part has to be on the GPU
        (0, 100, None, None, 0),
        (0, 45, None, 45, 40.5),
    ],
)
def test_what_a_machine_does_not_hold(
    gpu_gb: float, ram_gb: float, asked_gb: float | None, needed_gb: float | None, there_gb: float
) -> None:
    spec = ModelSpec((LayerSpec(4, 640, 5 * GB, hidden=1024),) * 2, dense_bytes=5 * GB)
    costs = costs_of(cpu_gbps=10) if not gpu_gb else costs_of(cpu_gbps=10, link_gbps=1, gpu_gbps=100)
    lacks = shortfall(spec, _machine(costs, gpu_gb, ram_gb), None if asked_gb is None else int(asked_gb * GB))
    assert (lacks is None) is (needed_gb is None)
    if lacks is not None:
        assert (lacks.needed_bytes / GB, lacks.there_bytes / GB) == pytest.approx((needed_gb, there_gb))
        assert lacks.in_words().startswith("does not fit: dense weights")


def _run(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.usefixtures("shallow")
def test_a_replay_of_a_shape_is_a_range() -> None:
    asked = ("replay", "--shape", "mixtral-8x7b", "--bits", "4", "--gpu-memory", "2GiB", "--policy", "lru")
    found = json.loads(_run(*asked, "--json"))
    assert found["does_not_fit"] is None
    for name in ("prefill_tok_s", "decode_tok_s", "hit_rate"):
        low, high = found[name]
        assert 0 < low <= high
        assert {low, high} == {found[end][name] for end in ("low_routing", "high_routing")}
    assert found["routing"]["recall"]["assumed"]
    assert not found["routing"]["repeat"]["assumed"]
    assert found["decode_tok_s"][0] < found["decode_tok_s"][1]
    text = _run(*asked)
    assert f"decode   {found['decode_tok_s'][0]:.2f} to {found['decode_tok_s'][1]:.2f} tok/s" in text
    assert "recall 0.7 to 0.9, assumed" in text


@pytest.mark.parametrize("command", [("replay",), ("bench", "policies")])
def test_what_does_not_fit_has_no_speed(command: tuple[str, ...]) -> None:
    """Whole Mixtral in 16 bits on 24 + 64 GiB."""
    asked = (*command, "--shape", "mixtral-8x7b", "--machine", "rtx4090")
    found = json.loads(_run(*asked, "--json").splitlines()[-1])
    for row in found.get("rows", [found]):
        assert row["does_not_fit"] is not None
        assert row["decode_tok_s"] is None
    text = _run(*asked)
    assert "tok/s" not in text
    spec, machine = spec_of_shape("mixtral-8x7b"), machine_named("rtx4090")
    with as_flags():
        lacks = shortfall(spec, machine)
    assert lacks is not None
    assert lacks.in_words() in " ".join(text.split())
    assert shortfall(at_bits(spec, 8), machine) is None


def test_a_trace_at_a_size_that_does_not_fit_has_no_speed(tmp_path: Path) -> None:
    path = str(tmp_path / "small.trace")
    statistics = routing_of("mixtral-8x7b").low
    expanded("tiny", statistics, seed=1, tokens=6, prompt_tokens=4, decode_tokens=2).save(Path(path))
    size = ("--as-shape", "mixtral-8x7b", "--machine", "rtx4090")
    for bits, fits in (("16", False), ("4", True)):
        found = json.loads(_run("replay", path, *size, "--bits", bits, "--json"))
        assert (found["does_not_fit"] is None, found["decode_tok_s"] is not None) == (fits, fits)
        told = _run("bench", "policies", "--trace", path, *size, "--bits", bits, "--policy", "lru", "--json")
        (row,) = json.loads(told.splitlines()[-1])["rows"]
        assert (row["does_not_fit"] is None, row["decode_tok_s"] is not None) == (fits, fits)
    told = _run("replay", path, *size, "--bits", "16")
    assert told.startswith("tiny, routing by parameters as mixtral-8x7b on rtx4090 does not fit: dense weights and")


@pytest.mark.usefixtures("shallow")
def test_policies_of_a_shape_are_compared_without_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moestro.loading.random_model.build_random_model", None)
    pieces = ("--tokens", "24", "--prompt-tokens", "8", "--decode-tokens", "6")
    asked = ("bench", "policies", "--shape", "mixtral-8x7b", "--bits", "8", "--machine", "t4-colab", *pieces)
    found = json.loads(_run(*asked, "--policy", "lru", "--policy", "fiddler", "--json").splitlines()[-1])
    assert [row["policy"] for row in found["rows"]] == ["lru", "fiddler"]
    for row, low, high in zip(found["rows"], found["low"], found["high"], strict=True):
        assert row["does_not_fit"] is None
        assert row["decode_tok_s"] == sorted((low["decode_tok_s"], high["decode_tok_s"]))
        assert row["decode_tok_s"][0] > 0
    assert found["routing"]["repeat"]["range"] == [0.32, 0.35]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["replay"], "name a TRACE that moestro trace wrote, or a real shape (--shape mixtral-8x7b)"),
        (["replay", "a.trace", "--shape", "olmoe-1b-7b"], "both TRACE (a.trace) and --shape (olmoe-1b-7b)"),
        (["replay", "--shape", "olmoe-1b-7b", "--as-shape", "tiny"], "--as-shape is for a trace; leave it out"),
        (["replay", "--shape", "tiny"], "nothing is known of how tiny routes"),
        (["bench", "policies", "--shape", "olmoe-1b-7b", "--as-shape", "tiny"], "--as-shape is for a trace"),
    ],
)
def test_bad_requests_are_one_line(arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, RequestError)
    assert says in str(done.exception)
    assert "\n" not in str(done.exception)
