"""`moestro bench decode` at toy size, through its real workers: ours and Transformers alone."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moestro.bench import decode
from moestro.bench.decode import PROMPTS, measure_decode
from moestro.bench.models import ALONE, OURS, Engine, ModelWorker, _transformers_alone
from moestro.cli.main import main as cli
from moestro.cli.numbers import numbers
from moestro.compute.cpu import best_level, levels
from moestro.decode.dense import PackedLinear
from moestro.errors import BudgetError, RequestError
from moestro.loading import plug  # noqa: F401  # registers the experts function
from moestro.loading.config import MoestroConfig
from moestro.loading.random_model import build_random_model, shape_config
from moestro.loading.random_stored import MIXES
from moestro.memory.formats import FLOAT_FORMATS, format_names
from moestro.planning.shapes import SHAPES

needs_kernels = pytest.mark.skipif(not levels(), reason="built without the kernels: no compiler was there")


@needs_kernels
def test_a_toy_model_from_end_to_end(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "READ_BYTES", 2**24)
    reports = []
    print_report = decode.DecodeReport.to_json
    monkeypatch.setattr(decode.DecodeReport, "to_json", lambda self: reports.append(self) or print_report(self))
    arguments = ["--shape", "tiny", "--bits", "8", "--layers", "2", "--rounds", "2", "-t", "1", "--json"]
    arguments += ["--batch", "1,3", "--beams", "3"]
    monkeypatch.setattr(sys, "argv", ["moestro", "bench", "decode", *arguments])
    torch_threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as end:
        cli()
    assert not end.value.code
    assert torch.get_num_threads() == torch_threads
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (printed["shape"], printed["layers"], printed["threads"]) == ("tiny", 2, 1)
    assert printed["level"] == best_level()
    assert printed["read_limit_gbps"] > 0.1
    assert 0 < printed["outside_us"] < 1e6 / min(row["decode_tok_s"] for row in printed["engines"]) / 2
    assert {"cpu", "commit"} <= printed.keys()
    ours, alone = printed["engines"]
    assert (ours["engine"], ours["bits"], alone["engine"], alone["bits"]) == (OURS, 8, ALONE, 16)
    for row in (ours, alone):
        assert [*row["prefill_tok_s"]] == [str(tokens) for tokens in PROMPTS]
        assert all(0 < value < 1e7 for value in [*row["prefill_tok_s"].values(), row["decode_tok_s"]])
    assert 0 < ours["share"] < 1.2  # such a model is no load for a memory
    assert alone["share"] is None
    assert printed["ratios"].keys() == {ALONE}
    assert printed["ratios"][ALONE].keys() == {"decode", *(f"prefill_{tokens}" for tokens in PROMPTS)}
    assert all(value > 0 for value in printed["ratios"][ALONE].values())
    assert [row["batch"] for row in printed["batches"]] == [1, 3]
    for row in printed["batches"]:
        assert 0 < row["tok_s"] < 1.2 * row["limit_tok_s"]
    (row,) = printed["beams"]
    assert row["beams"] == 3
    assert all(0 < row[name] < 1e7 for name in ("tok_s", "batch_tok_s", "alone_tok_s"))
    assert 0 < row["moved_bytes"] < row["whole_bytes"]
    reports[0].print()
    shown = capsys.readouterr().out
    assert "tokens per second" in shown
    assert "sequences a step" in shown
    assert "MiB moved a step" in shown


@pytest.mark.long
@needs_kernels
def test_other_engines_take_turns_with_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """As benchmarks/rivals has llama.cpp take them."""
    monkeypatch.setattr(decode, "READ_BYTES", 2**24)
    asked: list[tuple[str, int, int, int]] = []

    def start(shape: str, bits: int, layers: int, threads: int) -> ModelWorker:
        asked.append((shape, bits, layers, threads))
        return ModelWorker(ALONE, shape, bits=16, layers=layers, threads=threads)

    report = measure_decode("tiny", 4, layers=1, rounds=1, threads=1, alone=False, others={"another": start})
    assert asked == [("tiny", 4, 1, 1)]
    assert [(row.engine, row.bits) for row in report.engines] == [(OURS, 4), ("another", 4)]
    assert report.ratios.keys() == {"another"}


@pytest.mark.sample(8)
@pytest.mark.parametrize(
    "name", sorted({*MIXES, *format_names(), "int4g128", "int8row", "int4g32bf16z", "hqq2r16s128"})
)
def test_random_weights_in_each_form(name: str) -> None:
    """Every matrix but routers and the embedding is in the form's formats, finite, and of the size of other weights."""
    model: Any = build_random_model("tiny", MoestroConfig(device="cpu", threads=1), dtype="auto", seed=0, form=name)
    for layer, math in enumerate(model.moestro.math):
        assert {fmt.is_quantized for fmt in math.format.matrices.values()} == {name not in FLOAT_FORMATS.values()}
        packed = model.moestro.store[layer, 0]
        expert = math.format.unpack(packed, math.shape, range(math.shape.neurons), torch.float32)
        for weights in (expert.gate, expert.up, expert.down):
            assert weights is not None
            assert 1e-3 < float(weights.std()) < 1e-2
    projection = model.model.layers[0].self_attn.q_proj
    if levels() or name not in FLOAT_FORMATS.values():
        assert {"mxfp4": "q8_0", "q4_k_m": "q4_k"}.get(name, name) == projection.matrix.fmt.name
    assert 1e-3 < float(projection.weight.float().std()) < 1e-2
    assert bool(model(torch.arange(8)[None]).logits.isfinite().all())


def test_forms_that_do_not_divide_a_shape_are_refused() -> None:
    with pytest.raises(RequestError, match="groups of 256 rows, which do not divide all matrices"):
        build_random_model("tiny", MoestroConfig(device="cpu"), dtype="auto", seed=0, form="hqq2r256s8")


@needs_kernels
def test_forms_that_do_not_exist_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("q9", "int4g128@order", "q4_k+q9", ""):
        with pytest.raises(RequestError, match=f"no format '{re.escape(name)}'; there are: fp32"):
            measure_decode("tiny", name)
    monkeypatch.setattr(sys, "argv", ["moestro", "bench", "decode", "--format", "q8_0", "--bits", "4"])
    with pytest.raises(SystemExit) as ended:
        cli()
    assert ended.value.code == 2


@pytest.mark.parametrize("shape", ["mixtral-8x7b", "olmoe-1b-7b", "qwen3-30b-a3b"])
def test_transformers_alone_has_the_rotary_tables_of_its_shape(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"vocab_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32, "hidden_size": 256}
    monkeypatch.setitem(SHAPES, shape, SHAPES[shape] | small)
    buffers = dict(_transformers_alone(shape, layers=1).named_buffers())
    expected = dict(AutoModelForCausalLM.from_config(shape_config(shape, 1)).named_buffers())
    assert any(name.endswith("inv_freq") for name in buffers)
    assert buffers.keys() == expected.keys()
    for name, buffer in buffers.items():
        assert torch.equal(buffer, expected[name]), name


@needs_kernels
def test_what_cannot_be_measured_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="no shape 'huge'; there are: mixtral-8x7b"):
        measure_decode("huge", 4)
    monkeypatch.setattr(decode, "available_ram_bytes", lambda: 9 * 2**30)
    with pytest.raises(BudgetError, match=r"engines with 16 layers of olmoe-1b-7b needs .*; --layers \d would fit"):
        measure_decode("olmoe-1b-7b", 4)


@pytest.mark.parametrize("given", ["0", "1,x", "", "2,,4", "-1"])
def test_batches_that_are_none(given: str) -> None:
    for flag, least in (("--batch", 1), ("--beams", 2)):
        with pytest.raises(RequestError, match=f"{flag} .*is no number from {least} on; give some like"):
            numbers(flag, given, least)
    assert numbers("--beams", None, 2) == ()
    with pytest.raises(RequestError, match="'1' is no number from 2 on"):
        numbers("--beams", "4,1", 2)


@needs_kernels
def test_what_a_step_of_sequences_takes() -> None:
    """The bytes and operations of its limit, against sums over the model's own tensors."""
    engine = Engine(OURS, "tiny", 16, 2, 1)
    model = engine._model
    _, (experts, dense, attention) = engine.batch(3, 5, 2)
    config, spec = model.config, model.moestro.spec
    expert = 3 * config.hidden_size * config.intermediate_size
    assert experts[1] == 2 * 3 * config.num_experts_per_tok * config.num_hidden_layers * expert
    most = min(3 * config.num_experts_per_tok, config.num_local_experts) * config.num_hidden_layers
    assert config.num_experts_per_tok * config.num_hidden_layers <= experts[0] / spec.layers[0].expert_bytes <= most
    projections = [m.matrix for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(projections) == 4 * config.num_hidden_layers + 1
    routers = config.num_local_experts * config.hidden_size * config.num_hidden_layers
    assert dense[1] == 2 * 3 * (sum(m.rows * m.columns for m in projections) + routers)
    assert dense[0] == spec.dense_bytes - config.vocab_size * config.hidden_size * 2
    heads, kept = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size // heads
    assert attention == (3 * 6 * 2 * kept * width * 2 * 2, 3 * 6 * 4 * heads * width * 2)
