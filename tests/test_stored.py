"""Quantized checkpoints run: logits and tokens are those of Transformers with the dequantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from moestro import MoestroError, load, load_tokenizer
from moestro.cli.main import app
from moestro.compute.cpu import levels
from moestro.compute.repack import format_of, pack_stored
from moestro.decode.capture import StepCache
from moestro.decode.dense import Packed, PackedLinear
from moestro.engine.families import FamilyLayout, expert_modules
from moestro.engine.gates import find_router
from moestro.loading.sources import ExpertWeights, Part, open_source
from moestro.loading.stored import _format_of
from moestro.memory.formats import Coded, ExpertFormat, ExpertShape, expert_format_named, format_named
from moestro.memory.formats.raw import GGUF_BLOCKS, RawMatrix
from raw_reader import read_raw
from survey_checks import same_bytes
from test_sources_gguf import KNOWN, TYPES, _build, write_gguf
from test_sources_safetensors import CASES, FAMILY, write_checkpoint

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
GGUF_FAMILIES = ("mixtral", "gpt_oss", "deepseek_v3")
OF_GPT_OSS = ("MXFP4", "Q8_0", "Q5_1", "Q4_K")  # those that its files have
DEVICES: tuple[dict[str, Any], ...] = (
    {"device": "cpu"},
    {"device": "emulated", "gpu_memory": "32MiB", "policy": "lru", "link": None},
)


def _same(found: Any, expected: Any) -> None:
    """Each layer's experts within 1e-3 of what Transformers computes of the same input; so is the whole model.

    In a random model two experts may be level for some tokens, whose logits then jump where a hidden state changes by
    some 1e-5. So a fifth of the tokens that are not seen to jump may differ, and of the clear choices.
    """
    mine, theirs = expert_modules(found), expert_modules(expected)
    with torch.no_grad():
        for name, module in theirs.items():
            layer = mine[name]._moestro
            x = torch.randn(5, layer.layout.shape.hidden)
            index = torch.rand(5, layer.layout.experts).topk(2).indices
            got, wanted = (each(x, index, torch.full((5, 2), 0.5)) for each in (mine[name], module))
            assert float((got - wanted).abs().max()) <= 1e-3 * float(wanted.abs().max())
        ids = torch.arange(3, 40)[None]
        got, wanted = found(ids).logits.float(), expected(ids).logits.float()
        bound = 1e-3 * float(wanted.abs().max())
        x, moved = expected.get_input_embeddings()(ids), torch.zeros(ids.shape[1])
        for _ in range(8):
            noisy = expected(inputs_embeds=x * (1 + 3e-5 * torch.randn_like(x))).logits.float()
            moved = torch.maximum(moved, (noisy - wanted).abs().amax((0, 2)))
        near = (got - wanted).abs().amax((0, 2)) <= bound
        assert _most(near[moved < bound])
        tokens = found.generate(ids[:, :6], **GREEDY)[0]
        scores = expected(tokens[None, :-1]).logits[0, 5:].float()
    best = scores.topk(2).values
    assert _most((tokens[6:] == scores.argmax(-1))[best[:, 0] - best[:, 1] > 2 * bound])


def _most(holds: Tensor) -> bool:
    return holds.numel() == 0 or float(holds.float().mean()) >= 0.8


def _kept(found: Any, formats: set[str]) -> None:
    """Experts are as large as their formats say, and in no other one."""
    assert {fmt.name for math in found.moestro.math for fmt in math.format.matrices.values()} == formats


def _dense_kept(found: Any, expected: Any, path: Path) -> None:
    """Every linear layer, head and embedding but the routers computes in the form that the file has it in, exactly."""
    values, kept = dict(open_source(str(path)).weights(expected).dense()), list[str]()
    routers = {id(find_router(found, name)) for name in expert_modules(found)}
    for name, module in found.named_modules():
        value = values.get(f"{name}.weight")
        if value is None or id(module) in routers or not isinstance(module, nn.Linear | nn.Embedding):
            continue
        raw = value if isinstance(value, Tensor) else value.raw
        if isinstance(module, nn.Embedding) and isinstance(raw, Tensor):
            continue  # rows of floats are looked up in torch
        if isinstance(raw, Tensor) and found.moestro.device.accelerator is not None:
            continue  # floats are multiplied by torch there
        assert isinstance(module, Packed), name
        assert module.matrix.fmt is format_of(raw), name
        tolerance = 2**-20 if module.matrix.fmt.name == "nvfp4" else 0
        wanted = expected.get_submodule(name).weight.detach()
        torch.testing.assert_close(module.matrix.unpack(torch.float32), wanted, rtol=tolerance, atol=0)
        kept.append(name)
    assert len(kept) > 2 * len(routers)


@pytest.mark.sample(18)
@pytest.mark.parametrize("options", DEVICES, ids=lambda options: options["device"])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_quantized_safetensors(family: str, kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    expected = write_checkpoint(tmp_path, FAMILY[family], kind)
    model = load(str(tmp_path), dtype="float32", threads=2, **options)
    assert all(fmt.is_quantized for math in model.moestro.math for fmt in math.format.matrices.values())
    _dense_kept(model, expected, tmp_path)
    same_bytes(tmp_path, model, **options)
    _same(model, expected)


@pytest.mark.sample(12)
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        pytest.param(family, kind, marks=[pytest.mark.long] if family == "gpt_oss" and kind not in OF_GPT_OSS else [])
        for family in GGUF_FAMILIES
        for kind in TYPES
    ],
)
def test_gguf(family: str, kind: str, tmp_path: Path) -> None:
    arch, width = KNOWN[family][0], 256 if kind.endswith(("K", "XS")) else 64
    model = _build(family, hidden_size=width, intermediate_size=width, moe_intermediate_size=width)
    path = tmp_path / "m.gguf"
    write_gguf(path, model, arch, kind, TYPES[kind](kind))
    found = load(str(path), dtype="float32", threads=2)
    _kept(found, {{"F16": "fp16"}.get(kind, kind.lower())})
    expected = _as_stored(path, model)
    _dense_kept(found, expected, path)
    same_bytes(path, found)
    _same(found, expected)


def _as_stored(path: Path, model: nn.Module, transcode: int | None = None) -> nn.Module:
    """The model with the weights of the file, by the tests' own reader."""
    weights = open_source(str(path), transcode=transcode).weights(model)
    for name, module in expert_modules(model).items():
        layout = FamilyLayout.of(name, module)
        for expert in range(layout.experts):
            stored = weights.expert(name, expert)
            for parameter in layout.parameters:
                for part, value in layout.parts(parameter, getattr(module, parameter).data[expert]).items():
                    if part in stored.matrices:
                        one = stored.matrices[part]
                        value.copy_(read_raw(one.raw, one.rows, one.columns))
                    else:
                        value.copy_(stored.biases[part])
    state = model.state_dict()
    for name, value in weights.dense():
        floats = value if isinstance(value, Tensor) else read_raw(value.raw, value.rows, value.columns)
        state[name].copy_(floats)
    return model.eval()


def test_mixed_formats_within_an_expert_and_odd_sizes() -> None:
    """Repacked by the kernels, byte for byte what the twin writes: rows in any order, blocks that are not full."""
    for gate, up, down, (hidden, neurons) in (
        ("q4_k", "q4_k", "q6_k", (256, 512)),
        ("q4_k", "q6_k", "q5_0", (512, 96)),
        ("iq4_xs", "iq4_xs", "q8_0", (256, 160)),
        ("q2_k", "q3_k", "q3_k", (256, 256)),
        ("mxfp4", "mxfp4", "q5_1", (96, 224)),
    ):
        shape = ExpertShape(hidden, neurons)
        fmt = ExpertFormat(format_named(down), gate=format_named(gate), up=format_named(up))
        parts: dict[str, Any] = {}
        for name, kind in {"gate": gate, "up": up, "down": down}.items():
            rows, columns = shape.parts[name]
            size, n_bytes = GGUF_BLOCKS[kind]
            stored = torch.randint(0, 256, (rows, columns // size * n_bytes), dtype=torch.uint8)
            raw = RawMatrix("gguf", rows, columns, {"weight": stored}, format_named(kind))
            parts[name] = raw, None if name == "down" else torch.randperm(rows), None
        found, twin = (torch.full((fmt.expert_bytes(shape),), 0xA5, dtype=torch.uint8) for _ in range(2))
        pack_stored(found, fmt, shape, parts, threads=2)
        if levels():
            from moestro.memory.formats import raw as formats

            fmt.pack_coded(twin, shape, {name: formats.read_raw(raw, rows) for name, (raw, rows, _) in parts.items()})
            used = fmt.blocks(shape) * fmt.block_bytes(shape)
            assert torch.equal(found[:used], twin[:used]), (gate, up, down)


def test_bits_cannot_be_asked_for(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, FAMILY["mixtral"], "mxfp4")
    with pytest.raises(MoestroError, match="quantized already, and its experts keep their own bits"):
        load(str(tmp_path), bits=4)


@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_bits_of_dense_weights_that_are_quantized_are_said_to_change_nothing(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_gguf(tmp_path / "m.gguf", _build("mixtral"), "llama", kind, TYPES[kind](kind))
    load(str(tmp_path / "m.gguf"), device="cpu", threads=1, dense_bits=8, head_bits=8)
    said = [line.split(":")[0] for line in caplog.messages if "keep their own bits" in line]
    expected = [f"{name}_bits=8 changes nothing here" for name in ("dense", "head")]
    assert said == (expected if kind == "Q8_0" else [])


def test_config_and_tokenizer_of_another_model(tmp_path: Path) -> None:
    """A GGUF whose tokenizer cannot be made from the file says what to name, and runs with it."""
    model = _build("mixtral", vocab_size=4096)
    write_gguf(tmp_path / "m.gguf", model, "llama", "Q8_0", TYPES["Q8_0"]("Q8_0"))
    with pytest.raises(MoestroError, match="tokenizer='ORG/REPO'"):
        load_tokenizer(str(tmp_path / "m.gguf"))
    given = [str(tmp_path / "m.gguf"), "Once", "-n", "2", "--tokenizer", "demo", "--device", "cpu"]
    assert CliRunner().invoke(app, ["run", *given]).exit_code == 0
    model.config.save_pretrained(tmp_path / "other")
    found = load(str(tmp_path / "m.gguf"), config=str(tmp_path / "other"), device="cpu")
    assert found.config.vocab_size == 4096


@pytest.mark.skipif(not levels(), reason="the twin computes NaN as NaN")
def test_fp8_that_a_panel_cannot_hold_is_refused() -> None:
    """Wherever a block of 128 rows begins within 16 that are packed together, and wherever a weight is a NaN."""
    shape = ExpertShape(128, 64)
    fmt = ExpertFormat(format_named("fp8"))
    codes = torch.randint(0, 0x7F, (256, 128), dtype=torch.uint8)
    scales = torch.rand(2, 1) + 0.5
    down = RawMatrix(
        "fp8", 128, 64, {"weight": codes[:128, :64].contiguous(), "scales": scales[:1]}, format_named("fp8")
    )

    def pack(first: int, codes: Tensor) -> None:
        raw = RawMatrix("fp8", 256, 128, {"weight": codes, "scales": scales}, format_named("fp8"))
        rows = torch.arange(first, first + 64)
        packed = torch.zeros(fmt.expert_bytes(shape), dtype=torch.uint8)
        parts = {"gate": (raw, rows, None), "up": (raw, rows, None), "down": (down, None, None)}
        pack_stored(packed, fmt, shape, parts, threads=2)

    for first in range(0, 192, 4):
        straddles = any(row // 128 != (row + 15) // 128 for row in range(first, first + 64, 16))
        if straddles:
            with pytest.raises(MoestroError, match="two blocks of 128"):
                pack(first, codes)
        else:
            pack(first, codes)
    for code in (0x7F, 0xFF):
        spoiled = codes.clone()
        spoiled[37, 101] = code
        with pytest.raises(MoestroError, match="not a number"):
            pack(0, spoiled)
        pack(128, spoiled)


def test_formats_of_one_size_are_told_apart() -> None:
    """Experts of one layer in two of these are refused: their bytes would pass for each other."""
    one, other = (
        _format_of(ExpertWeights(dict.fromkeys(("gate", "up", "down"), Part(_blocks(kind)))))
        for kind in ("q4_0", "iq4_nl")
    )
    assert one is expert_format_named("q4_0") is not other
    assert one.expert_bytes(ExpertShape(64, 64)) == other.expert_bytes(ExpertShape(64, 64))


def _blocks(kind: str) -> RawMatrix:
    return RawMatrix("gguf", 64, 64, {"weight": torch.zeros(64, 36, dtype=torch.uint8)}, format_named(kind))


def test_quantized_layers_on_a_device_are_captured(tmp_path: Path) -> None:
    """Decode steps of a checkpoint in FP8 replay what was captured, with the same logits as without."""
    write_checkpoint(tmp_path, FAMILY["mixtral"], "fp8")
    outputs = []
    for fuse in (True, False):
        model = load(str(tmp_path), dtype="float32", threads=2, fuse=fuse, **DEVICES[1])
        given = GREEDY | {"output_logits": True, "return_dict_in_generate": True}
        cache = StepCache(model.config, 32)
        outputs.append(model.generate(torch.arange(3, 9)[None], past_key_values=cache, **given))
        if fuse:
            assert model.forward.figures.replays >= 5
            assert type(model.model.layers[0].self_attn.q_proj) is PackedLinear
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert torch.equal(torch.cat(outputs[0].logits), torch.cat(outputs[1].logits))


def test_packed_operations_are_torch_operations() -> None:
    """Checked by torch's own rules for operations: shapes without values, no input changed, no output that is one."""
    fmt = format_named("q8_0")
    weight = fmt.write(_random_q8(96, 64)).flatten()
    for dtype in (torch.float32, torch.bfloat16):
        x, bias = torch.randn(3, 2, 64, dtype=dtype), torch.randn(96)
        torch.library.opcheck(torch.ops.moestro.packed_linear.default, (x, weight, bias, "q8_0", 96, 1))
        ids = torch.randint(0, 96, (2, 5))
        torch.library.opcheck(torch.ops.moestro.packed_rows.default, (ids, weight, "q8_0", 96, 64, dtype, 1))


def _random_q8(rows: int, columns: int) -> Coded:
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    return Coded(codes, torch.rand(rows, columns // 32).half())
