"""Rates of a CPU by format and tokens, machines as files, and what is forecast from them. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.errors import RequestError
from moestro.loading.outlook import work_of
from moestro.loading.survey.sizes import sized
from moestro.loading.survey.survey import survey_shape
from moestro.planning.contract import Costs
from moestro.planning.costs import LayerSpec, seconds_per_gb
from moestro.planning.formats import descriptor_named, format_names
from moestro.planning.machine_file import machine_of, machine_values, parse_machine, read_machine
from moestro.planning.machines import Machine, costs_of, machine_named, named_machines
from moestro.planning.options import ModelOptions, Options
from moestro.planning.policies import POLICIES, make_policy
from moestro.planning.rates import COUNTS, MEASURED, NEURONS, WIDE_NEURONS, Curve, Rates, assumed_rates, measured_for
from moestro.planning.shapes import FORECAST_SHAPES
from moestro.planning.text_shape import text_shape
from moestro.simulate.forecast import StepModel

RATES = assumed_rates(20.0, 250.0)
GIB = 2**30


def measured_machine(**costs: float) -> Machine:
    """A machine without a GPU whose rates count as measured."""
    return Machine("this", "a box", 0, 64 * GIB, costs_of(**{"cpu_gbps": 20.0, "cpu_gflops": 250.0, **costs}), RATES)


def steps_of(shape: str, bits: int, machine: Machine, policy: str = "cpu-only", layers: int | None = None) -> StepModel:
    found = survey_shape(shape, ModelOptions(shape=shape), layers)
    sizes = sized(found, Options(bits=bits, device="cpu"), on_gpu=False)
    decider = make_policy(policy)
    decider.place(sizes.spec, 0, {})
    return StepModel(sizes.spec, decider, machine, work_of(found, sizes), slots=0)


# ---- curves


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0.1, 500)), min_size=1, max_size=6, unique_by=lambda p: p[0]))
def test_a_curve_goes_through_its_points_and_never_falls_beyond_them(points: list[tuple[int, float]]) -> None:
    points.sort()
    # A rate per token that falls, as measured ones do.
    falling = [(tokens, min(gbps for _, gbps in points[: at + 1])) for at, (tokens, gbps) in enumerate(points)]
    curve = Curve("int8", tuple(falling))
    for tokens, gbps in falling:
        assert curve.seconds(1e9, tokens) == pytest.approx(1 / gbps)
    counts = [0.5, *range(1, 1200, 37)]
    seconds = [curve.seconds(1e9, tokens) for tokens in counts]
    assert all(more >= less * (1 - 1e-9) for less, more in pairwise(seconds))


NAMES = [*format_names(), "int4g128", "q4_k+q4_k+q6_k", "int4g128@order", "hqq2r16s128"]


def _of(curves: tuple[Curve, ...], times: float = 1.0) -> tuple[Curve, ...]:
    """The curves, faster with many tokens."""
    return tuple(Curve(one.format, tuple((n, g * times if n >= 64 else g) for n, g in one.points)) for one in curves)


@pytest.mark.parametrize("name", NAMES)
def test_curves_are_taken_from_those_that_measured_for_names(name: str) -> None:
    names = measured_for([name])
    few = {kind: tuple(one for one in getattr(RATES, kind) if one.format in names) for kind in ("experts", "dense")}
    only = replace(RATES, **few, wide_experts=few["experts"])
    assert only.expert_curve(name) == RATES.expert_curve(name)
    assert only.dense_curve(name) == RATES.dense_curve(name)
    assert 1 <= len(names) <= 3
    assert measured_for([None]) == ("bf16",)


@given(st.sampled_from(NAMES), st.floats(0.6, 3.0), st.lists(st.integers(16, 10**6), min_size=2, max_size=6))
def test_rates_of_an_expert_lie_between_those_of_narrow_and_wide_ones_or_beyond(
    name: str, times: float, widths: list[int]
) -> None:
    rates = replace(RATES, wide_experts=_of(RATES.experts, times))
    assert rates.expert_curve(name) == RATES.expert_curve(name)
    wide = rates.expert_curve(name, WIDE_NEURONS)
    expected_s = 0.0
    for tokens in COUNTS:  # more of them are never faster
        expected_s = max(expected_s, RATES.expert_curve(name).seconds(1e9, tokens) / (times if tokens >= 64 else 1))
        assert wide.seconds(1e9, tokens) == pytest.approx(expected_s) or name not in MEASURED  # which is read no faster
        seconds = [rates.expert_curve(name, width).seconds(1e9, tokens) for width in sorted(widths)]
        assert all((b - a) * (1 - times) + 1e-6 > 0 for a, b in pairwise(seconds))  # wider is as much faster, or slower
        assert min(seconds) > 0.49 * min(expected_s, RATES.expert_curve(name).seconds(1e9, tokens))
    assert NEURONS < WIDE_NEURONS


def test_a_file_without_wide_experts_takes_them_for_the_others() -> None:
    values = machine_values(replace(measured_machine(), rates=replace(RATES, wide_experts=_of(RATES.experts, 2.0))))
    found = parse_machine(json.dumps(values)).cpu_rates
    assert found.wide_experts[0].points[-1][1] == pytest.approx(2 * found.experts[0].points[-1][1], rel=1e-3)
    table = values["wide_experts_gbps"]
    part = {"int8": {"256": table["int8"]["256"]}}
    some = parse_machine(json.dumps(values | {"wide_experts_gbps": part})).cpu_rates
    for own, narrow, wide in zip(some.wide_experts, found.experts, found.wide_experts, strict=True):
        assert own.points[:-1] == narrow.points[:-1]
        assert own.points[-1] == (wide if own.format == "int8" else narrow).points[-1]
    for empty in ({"wide_experts_gbps": None}, {}):
        values.pop("wide_experts_gbps", None)
        without = parse_machine(json.dumps(values | empty)).cpu_rates
        assert without.wide_experts == without.experts == found.experts
    with pytest.raises(RequestError, match="wide_experts_gbps needs formats"):
        parse_machine(json.dumps(values | {"wide_experts_gbps": {"int9": {"1": 3}}}))
    older = asdict(RATES)
    older.pop("wide_experts")
    assert Rates.from_values(json.loads(json.dumps(older))) == RATES


@pytest.mark.parametrize("name", NAMES)
def test_a_format_that_was_not_measured_is_like_the_nearest(name: str) -> None:
    curve = RATES.expert_curve(name)
    seconds = [curve.seconds(1e9, tokens) for tokens in COUNTS]
    assert all(more >= less * (1 - 1e-9) > 0 for less, more in pairwise(seconds))
    parts = [descriptor_named(part) for part in name.partition("@")[0].split("+")]
    least, most = (of(part.bits_per_weight for part in parts) for of in (min, max))
    of_weight = curve.seconds(sum(part.bits_per_weight for part in parts) / len(parts) / 8, 1)
    fewer = [one for one in RATES.experts if descriptor_named(one.format).bits_per_weight < 0.6 * least]
    more = [one for one in RATES.experts if descriptor_named(one.format).bits_per_weight > 1.8 * most]
    for one in fewer:
        assert of_weight > one.seconds(descriptor_named(one.format).bits_per_weight / 8, 1)
    for one in more:
        assert of_weight < one.seconds(descriptor_named(one.format).bits_per_weight / 8, 1)


def test_experts_cost_what_was_measured_of_their_format() -> None:
    layer = LayerSpec(8, 1024, 10**9, hidden=2048)
    costs = Costs(cpu_gbps=20.0, cpu_beside_link_gbps=5.0, cpu_points=((1, 20.0), (16, 4.0)))
    assert costs.cpu_s(layer, 1) == pytest.approx(0.05)
    assert costs.cpu_s(layer, 16, 512) == pytest.approx(0.125)
    assert costs.cpu_s(layer, 1, beside_link=True) == pytest.approx(0.2)
    assert costs.cpu_s(layer, 16, beside_link=True) == pytest.approx(0.25)  # products bind, whatever the link does
    assert seconds_per_gb(costs.cpu_points, 1) == pytest.approx(0.05)


# ---- forecasts


@pytest.mark.parametrize("shape", FORECAST_SHAPES)
def test_forecasts_follow_bits_tokens_and_depth(shape: str) -> None:
    machine = measured_machine()
    by_bits = [steps_of(shape, bits, machine) for bits in (16, 8, 4)]
    assert all(more.decode_s(0) > less.decode_s(0) for more, less in pairwise(by_bits))
    assert len({round(one.prefill_s(512), 6) for one in by_bits}) == 3  # they are not computed alike
    one = by_bits[-1]
    assert one.decode_s(10**9) > one.decode_s(0)
    assert one.prefill_s(1024) > one.prefill_s(512) > one.prefill_s(128)
    two, four = (steps_of(shape, 4, machine, layers=layers).decode_s(0) for layers in (2, 4))
    assert two < four < 2 * two  # the head is there once


def test_a_prompt_meets_the_head_once() -> None:
    steps = steps_of("qwen3-30b-a3b", 4, measured_machine(), layers=2)
    head = sum(part.n_bytes for part in steps.work.dense if part.is_head)
    without = replace(steps.work, dense=tuple(part for part in steps.work.dense if not part.is_head))
    bare = StepModel(steps.spec, steps.policy, steps.machine, without, slots=0)
    wanted = RATES.dense_curve("hqq4").seconds(head, 1)
    assert steps.prefill_s(512) - bare.prefill_s(512) == pytest.approx(wanted)
    assert steps.decode_s(0) - bare.decode_s(0) == pytest.approx(wanted)


def test_plain_attention_is_slower_and_known_by_its_family() -> None:
    assert steps_of("gpt-oss-20b", 4, measured_machine()).work.is_plain
    steps = steps_of("olmoe-1b-7b", 4, measured_machine())
    assert not steps.work.is_plain
    plain = StepModel(steps.spec, steps.policy, steps.machine, replace(steps.work, is_plain=True), slots=0)
    assert plain.decode_s(10**8) > steps.decode_s(10**8)
    assert plain.prefill_s(512) > steps.prefill_s(512)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_gpu_machine_of_a_file_is_forecast_for_each_policy(policy: str) -> None:
    machine = replace(machine_named("rtx4090"), rates=RATES)
    assert 0 < steps_of("mixtral-8x7b", 4, machine, policy).decode_s(0) < 10


def test_kv_bytes_of_cut_shapes_are_of_so_many_layers() -> None:
    two, four = (text_shape(survey_shape("gpt-oss-20b", ModelOptions(), n).config, 2).kv_bytes(100) for n in (2, 4))
    assert two * 2 == four


# ---- files


@pytest.mark.parametrize("name", named_machines())
def test_a_machine_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    for machine in (machine_named(name), replace(machine_named(name), rates=RATES)):
        (tmp_path / "m.json").write_text(json.dumps(machine_values(machine)))
        found = machine_of(str(tmp_path / "m.json"))
        assert (found.name, found.text, found.gpu_bytes) == (machine.name, machine.text, machine.gpu_bytes)
        for one in ("cpu_gbps", "link_gbps", "gpu_gflops", "disk_gbps", "cpu_beside_link_gbps"):
            assert getattr(found.costs, one) == pytest.approx(getattr(machine.costs, one), rel=1e-4)
        assert (found.rates is None) == (machine.rates is None)
        if found.rates is not None:
            for mine, theirs in zip(found.rates.experts, RATES.experts, strict=True):
                assert mine.format == theirs.format
                assert dict(mine.points) == pytest.approx(dict(theirs.points), rel=1e-4)
        assert parse_machine(json.dumps(machine_values(found))) == found


def test_a_machine_of_a_few_numbers_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "box.json"
    path.write_text('{"name": "box", "ram_bytes": 68719476736, "cpu_gbps": 40, "cpu_gflops": 900}')
    machine = read_machine(path)
    assert machine.rates is None
    assert machine.cpu_rates.expert_curve("hqq4").seconds(10**9, 1) < 1 / 20
    assert not machine.costs.gpu_gbps


FEW = {"ram_bytes": 2**36, "cpu_gbps": 40, "cpu_gflops": 900}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ("", "is no JSON"),
        ("[1]", "no JSON object"),
        ({}, "it lacks ram_bytes"),
        ({**FEW, "cpu_gbps": 0}, "cpu_gbps is 0, but a number above 0 is needed"),
        ({**FEW, "cpu_gbps": "40"}, "cpu_gbps is '40'"),
        ({**FEW, "cpu_gbps": True}, "cpu_gbps is True"),
        ({**FEW, "cpu_gflops": float("inf")}, "cpu_gflops is inf"),
        ({**FEW, "cpu_gbs": 3}, "it has 'cpu_gbs', which nothing reads; there are cpu_gbps"),
        ({**FEW, "schema": 9}, "its schema is 9, but 1 is known"),
        ({**FEW, "name": 3}, "name is 3, but a text is needed"),
        ({**FEW, "gpu_bytes": 2**33}, "it lacks gpu_gbps"),
        ({**FEW, "experts_gbps": {"int9": {"1": 3}}, "dense_gbps": {}}, "experts_gbps needs formats"),
        ({**FEW, "experts_gbps": {"int8": {"1": -3}}, "dense_gbps": {}}, "experts_gbps needs formats"),
        ({**FEW, "experts_gbps": {"int8": {"1": 3}}, "dense_gbps": {}}, "dense_gbps needs formats"),
        ({**FEW, "experts_gbps": {"int8": {"x": 3}}, "dense_gbps": {}}, "experts_gbps needs formats"),
        ({**FEW, "experts_gbps": [1], "dense_gbps": {}}, "experts_gbps needs formats"),
    ],
)
def test_files_that_are_no_machines_are_one_line(values: Any, says: str, tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    for read in (lambda: machine_of(str(path)), lambda: Options(machine=str(path))):
        with pytest.raises(RequestError) as error:
            read()
        assert says in str(error.value)
        assert f"{path} is no machine: " in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", ["abacus", "", "rtx4091", "nothing.json", "."])
def test_machines_that_are_not_there_are_one_line(given: str) -> None:
    with pytest.raises(RequestError) as error:
        Options(machine=given)
    said = str(error.value)
    assert "\n" not in said
    assert ("rtx4090" in said and "moestro machine -o FILE" in said) or "cannot be read: No such file" in said


def test_rates_of_a_class_are_slower_for_more_bits_and_more_tokens() -> None:
    for curve in (*RATES.experts, *RATES.dense):
        assert [tokens for tokens, _ in curve.points] == list(COUNTS)
        assert all(more >= less for more, less in pairwise(gbps for _, gbps in curve.points))
    of_weight = {
        name: RATES.expert_curve(name).seconds(descriptor_named(name).bits_per_weight / 8, 1) for name in MEASURED
    }
    assert of_weight["bf16"] > of_weight["int8"] > of_weight["hqq4"] > of_weight["hqq2"]
