"""Traces: the file, the summary, other sizes, and what a recorded model chose."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro import load, load_tokenizer
from moestro.errors import RequestError
from moestro.loading.random_model import shape_config
from moestro.memory.formats import FORMATS, ExpertShape
from moestro.planning.contract import LayerSpec, ModelSpec, Phase, Step
from moestro.planning.shapes import SHAPES, spec_of_shape
from moestro.simulate.reshape import FORMAT_OF_BITS, as_shape, at_bits
from moestro.simulate.trace import Pass, Trace
from moestro.simulate.trace_summary import lru_hit_rate, popularity, recall, reuse, summarize
from moestro.text.tracing import listening, trace_ids, trace_text

SPEC = ModelSpec((LayerSpec(8, 64, 1000, hidden=16),) * 3, dense_bytes=100, dense_weights=50)
LAYERS = 5  # more than any of them that is dense
TEXT = "Once upon a time there was a king who had a daughter, and she was so beautiful that the sun was glad. " * 12


def _decode(chosen: list[list[int]], guesses: dict[int, dict[int, dict[int, float]]] | None = None) -> Pass:
    steps = [
        Step(
            i, Phase.DECODE, dict.fromkeys(e, 1), {e: 1.0 - k / 4 for k, e in enumerate(e)}, (guesses or {}).get(i, {})
        )
        for i, e in enumerate(chosen)
    ]
    return Pass(Phase.DECODE, 1, tuple(steps))


steps = st.builds(
    lambda layer, counts, masses, scores: (layer, counts, masses, scores),
    st.integers(0, 1),
    st.dictionaries(st.integers(0, 7), st.integers(1, 5000), max_size=8),
    st.lists(st.floats(0, 100, width=32), min_size=8, max_size=8),
    st.dictionaries(st.integers(0, 7), st.integers(0, 65535), max_size=8),
)


@settings(max_examples=60, deadline=None)
@given(passes=st.lists(st.tuples(st.booleans(), st.integers(1, 9000), st.lists(steps, max_size=4)), max_size=4))
def test_a_trace_comes_back_as_it_was_written(passes: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    made = []
    for is_decode, tokens, found in passes:
        phase = Phase.DECODE if is_decode else Phase.PREFILL
        layers = tuple(
            Step(
                layer,
                phase,
                counts,
                dict(zip(counts, masses, strict=False)),
                {layer + 1: {e: s / 65535 for e, s in scores.items()}} if scores else {},
            )
            for layer, counts, masses, scores in found
        )
        made.append(Pass(phase, tokens, layers))
    trace = Trace("made", SPEC, 2, "ab" * 32, made, lookahead=1, agreement=(1.0, None, 0.5))
    path = tmp_path_factory.mktemp("traces") / "made.trace"
    trace.save(path)
    assert Trace.load(path) == trace


def test_what_is_no_trace_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.trace"
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        Trace.load(path)
    path.write_bytes(b"Once upon a time")
    with pytest.raises(RequestError, match="is no trace of Moestro's; make one with: moestro trace"):
        Trace.load(path)
    Trace("made", SPEC, 2, None, [_decode([[0], [1], [2]])]).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"version": 1', b'"version": 9'))
    with pytest.raises(RequestError, match="a trace of version 9, but this"):
        Trace.load(path)
    for damaged in (whole[:-5], whole[:-20] + b"x" * 20, whole.replace(b'"lookahead"', b'"lookabout"')):
        path.write_bytes(damaged)
        with pytest.raises(RequestError, match=r"is damaged \(.*\); record it anew"):
            Trace.load(path)


def test_the_summary_counts_what_was_chosen() -> None:
    guesses = {0: {1: {2: 0.6, 5: 0.3, 3: 0.1}}, 1: {2: {7: 0.9, 4: 0.1}}}
    passes = [
        _decode([[0, 1], [2, 3], [4, 5]], guesses),
        _decode([[0, 2], [2, 6], [4, 5]]),
        _decode([[1, 0], [2, 3], [6, 7]]),
    ]
    trace = Trace("by hand", SPEC, 2, None, passes, lookahead=1)
    assert recall(trace, 1, 1) == pytest.approx(1 / 4)  # 2 of {2, 3}; 7 not of {4, 5}
    assert recall(trace, 1, 3) == pytest.approx(3 / 4)  # 2 and 3; 4
    assert recall(trace, 2, 1) is None
    # Layer 0 uses 0, 0, 1 again after 1, 1, 2 tokens; layer 1 uses 2, 2, 3 so; layer 2 uses 4 and 5 after 1.
    assert reuse(trace)[1] == pytest.approx(6 / 8)
    assert reuse(trace)[2] == 1.0
    assert lru_hit_rate(trace, 2) == pytest.approx((2 + 2 + 2) / 18)
    assert lru_hit_rate(trace, 8) == pytest.approx(8 / 18)
    hottest = popularity(trace)["hottest"]
    assert hottest == pytest.approx((3 + 3 + 2) / 3 / (6 / 8))


def test_a_deeper_shape_chooses_as_the_recorded_layers_do_in_turn() -> None:
    recorded = ModelSpec((LayerSpec(8, 64, 1000, hidden=16),) * 3, dense_bytes=100)
    guesses = {0: {1: {2: 0.6, 5: 0.3}}, 1: {2: {4: 0.9, 0: 0.05, 5: 0.05}}}
    trace = Trace("small", recorded, 2, None, [_decode([[0, 1], [2, 3], [4, 5]], guesses)], lookahead=1)
    deep = as_shape(trace, "mixtral-8x7b")
    found = deep.passes[0].steps
    assert [sorted(step.tokens) for step in found] == [[[0, 1], [2, 3], [4, 5]][i % 3] for i in range(32)]
    assert found[3].guesses == {4: guesses[0][1]}
    # A seam: layer 5 repeats layer 2, layer 6 layer 0. The last recorded guess had its first and third rank right.
    assert found[5].guesses == {6: {0: 0.9, 2: 0.05, 1: 0.05}}
    assert found[31].guesses == {}
    assert deep.spec.layers[0].expert_bytes == 2 * 3 * 4096 * 14336
    with pytest.raises(RequestError, match="qwen3-30b-a3b has 128 experts, top-8, but the trace of small has 8, top-2"):
        as_shape(trace, "qwen3-30b-a3b")
    with pytest.raises(RequestError, match="no shape 'small'"):
        as_shape(trace, "small")


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_shape_as_the_planner_sees_it_is_the_model(name: str) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_config(name, LAYERS), dtype=torch.bfloat16)
    experts = {key: p for key, p in model.named_parameters() if ".experts." in key}
    spec = spec_of_shape(name, LAYERS)
    assert spec.dense_weights == sum(p.numel() for key, p in model.named_parameters() if key not in experts)
    assert spec.expert_bytes == sum(2 * p.numel() for p in experts.values())


@pytest.mark.parametrize("bits", sorted(FORMAT_OF_BITS))
def test_bits_are_those_of_the_formats(bits: int) -> None:
    formats = {32: "fp32", 16: "bf16", 8: "int8", 4: "hqq4", 3: "hqq3", 2: "hqq2"}
    for shape, size in {"mixtral-8x7b": (4096, 14336), "gpt-oss-20b": (2880, 2880)}.items():  # one of whole blocks
        layer = at_bits(spec_of_shape(shape), bits).layers[0]
        assert layer.expert_bytes == FORMATS[formats[bits]].expert_bytes(ExpertShape(*size))
    with pytest.raises(RequestError, match="bits=5"):
        at_bits(SPEC, 5)


def test_a_recorded_text_has_what_the_routers_chose() -> None:
    model, tokenizer = load("demo", device="cpu"), load_tokenizer("demo")
    trace = trace_text(model, tokenizer, "demo", TEXT, tokens=40, prompt_tokens=16, decode_tokens=30)
    assert (trace.top_k, trace.lookahead, len(trace.spec.layers)) == (2, 3, 6)
    assert trace.text_sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    assert [one.phase for one in trace.passes].count(Phase.PREFILL) == 2
    assert trace.tokens(Phase.DECODE) == 40
    assert trace.agreement == (1.0,) * 6
    for one in trace.passes:
        assert [step.layer for step in one.steps] == list(range(6))
        for step in one.steps:
            assert sum(step.tokens.values()) == 2 * one.tokens
            assert sum(step.mass.values()) == pytest.approx(one.tokens, rel=1e-2)
            assert set(step.guesses) == {layer for layer in range(step.layer + 1, step.layer + 4) if layer < 6}
            assert all(sum(g.values()) == pytest.approx(1, abs=1e-3) for g in step.guesses.values())
    summary = summarize(trace)
    assert json.loads(json.dumps(summary))["decode_tokens"] == 40
    assert summary["recall"][1][2] > summary["recall"][3][2] > 2 / 8  # better than chance, and worse farther ahead
    # And the recorder was only listening.
    assert model.moestro.listener is None


def test_recording_changes_no_token_and_sees_layers_that_run_in_one_call() -> None:
    model, tokenizer = load("demo", device="cpu"), load_tokenizer("demo")
    ids = tokenizer("Once upon a time", return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=12, do_sample=False)
    before = model.moestro.counters.misses
    with listening(model) as recorder:
        found = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(found, expected)
    trace = recorder.trace(model, "demo", None)
    assert sum(len(one.steps) for one in trace.passes) == 12 * 6
    assert sum(sum(s.tokens.values()) for s in trace.steps(Phase.DECODE)) == model.moestro.counters.misses - before


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        ({"tokens": 9, "prompt_tokens": 500, "decode_tokens": 100}, "are 600, more than the context of 512"),
        ({"tokens": 9, "prompt_tokens": 60, "decode_tokens": 9}, "the text has 20 tokens, but a prompt takes 60"),
    ],
)
def test_a_text_that_does_not_fit_is_refused(pieces: dict[str, int], says: str) -> None:
    model = load("demo", device="cpu")
    with pytest.raises(RequestError, match=says):
        trace_ids(model, "demo", torch.arange(3, 23), **pieces)
