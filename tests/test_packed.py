"""Packed folders: the model that comes out is the one that went in, bit for bit."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from families import FAMILIES, Family, build_model, random_ids
from hub_server import Repo, hub_server, run_python
from moestro import load, load_tokenizer
from moestro.compute.checksum import _twin, combined, crc32c
from moestro.decode.dense import Packed
from moestro.errors import CheckpointError
from moestro.loading.contents import inspect_model
from moestro.loading.pack import pack
from moestro.loading.packed.manifest import MANIFEST, slow_crc32c
from moestro.loading.packed.read import read_manifest, runs_of, verify_packed
from moestro.memory.formats import FORMATS, ExpertShape
from moestro.planning.options import ModelOptions, Options
from test_sources_gguf import KNOWN, TYPES, _build, write_gguf
from test_sources_safetensors import FAMILY, gptq, write_checkpoint

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
EMULATED = {"device": "emulated", "gpu_memory": "32MiB", "policy": "lru", "link": None}


def packed(model: str, target: Path, source: dict[str, Any] | None = None, **options: Any) -> Path:
    pack(model, target, ModelOptions(**source or {}), Options(threads=2, **options))
    return target


def logits(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        prompt = model(ids).logits
    return prompt, model.generate(ids[:, :5], **GREEDY)


def same(found: Any, expected: Any, ids: torch.Tensor) -> None:
    for one, other in zip(logits(found, ids), logits(expected, ids), strict=True):
        assert torch.equal(one, other)


def test_checksums() -> None:
    """Of the known text (RFC 3720), by instruction, by tables and by the twin; in parts, and joined."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"") == 0
    for size in (1, 7, 8, 9, 4096, 3 * 4096, 3 * 4096 + 5, 100_003):
        data = torch.randint(0, 256, (size,), dtype=torch.uint8)
        whole, cut = crc32c(data), size // 3
        bits = [reversed(f"{byte:08b}") for byte in data.tolist()] if size < 100 else None
        assert bits is None or whole == _by_division([int(bit) for byte in bits for bit in byte])
        assert whole == _twin(data.numpy(), 0)
        assert whole == crc32c(data[cut:], crc32c(data[:cut])) == _twin(data[cut:].numpy(), crc32c(data[:cut]))
        assert whole == combined(crc32c(data[:cut]), crc32c(data[cut:]), size - cut)
        assert whole != zlib.crc32(data.numpy().tobytes())


def _by_division(bits: list[int]) -> int:
    """The checksum as the remainder that it is defined as, bit by bit."""
    remainder = 0xFFFFFFFF
    for bit in bits:
        remainder = remainder >> 1 ^ (0x82F63B78 if (remainder ^ bit) & 1 else 0)
    return remainder ^ 0xFFFFFFFF


def test_checksums_without_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.randint(0, 256, (10_000,), dtype=torch.uint8)
    wanted = crc32c(data), combined(1, 2, 10**10)
    monkeypatch.setattr("moestro.compute.checksum._kernels", None)
    assert (crc32c(data), combined(1, 2, 10**10)) == wanted


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 16},
        {"bits": 8},
        pytest.param({"bits": 4}, marks=pytest.mark.long),
        pytest.param({"bits": 2}, marks=pytest.mark.long),
        {"expert_bits": 4, "dense_bits": 8, "head_bits": 16},
        pytest.param({"expert_bits": 3, "head_bits": 4}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_the_demo_is_packed_exactly(options: dict[str, Any], tmp_path: Path) -> None:
    folder = packed("demo", tmp_path / "demo", **options)
    expected, found = load("demo", threads=2, **options), load(str(folder), threads=2)
    ids = torch.arange(3, 40)[None]
    same(found, expected, ids)
    for layer, expert in expected.moestro.store.experts:
        assert torch.equal(found.moestro.store[layer, expert], expected.moestro.store[layer, expert])
    mine, theirs = (
        {name: m.matrix for name, m in model.named_modules() if isinstance(m, Packed)} for model in (found, expected)
    )
    assert {name: one.fmt for name, one in mine.items()} == {name: one.fmt for name, one in theirs.items()}
    assert all(torch.equal(one.packed, theirs[name].packed) for name, one in mine.items())
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()
    text = "Once upon a time"
    assert load_tokenizer(str(folder))(text).input_ids == load_tokenizer("demo")(text).input_ids
    same(load(str(folder), threads=2, **options), expected, ids)  # options that say the same


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.long), "float16"])
def test_another_dtype(dtype: str, tmp_path: Path) -> None:
    folder = packed("demo", tmp_path / "demo", {"dtype": dtype})
    found = load(str(folder), threads=2)
    assert found.dtype == getattr(torch, dtype)
    same(found, load("demo", dtype=dtype, threads=2), torch.arange(3, 40)[None])


@pytest.mark.sample(1)
@pytest.mark.parametrize("bits", [pytest.param(None, marks=pytest.mark.long), 4])
def test_on_a_device(bits: int | None, tmp_path: Path) -> None:
    """There floats are unpacked and quantized dense layers keep their form; the experts are the same bytes."""
    folder = packed("demo", tmp_path / "demo", {"dtype": "float32"}, expert_bits=bits)
    found, ids = load(str(folder), threads=2, **EMULATED), torch.arange(3, 40)[None]
    same(found, load("demo", dtype="float32", expert_bits=bits, threads=2, **EMULATED), ids)
    quantized = load(str(packed("demo", tmp_path / "q", {"dtype": "float32"}, bits=8)), threads=2, **EMULATED)
    on_cpu = load("demo", dtype="float32", bits=8, threads=2)
    wanted = logits(on_cpu, ids)[0]
    assert float((logits(quantized, ids)[0] - wanted).abs().max()) <= 1e-3 * float(wanted.abs().max())
    unpacked = load(str(tmp_path / "q"), threads=2, pack_dense=False)
    assert not any(isinstance(module, Packed) for module in unpacked.modules())
    assert float((logits(unpacked, ids)[0] - wanted).abs().max()) <= 1e-3 * float(wanted.abs().max())


@pytest.mark.parametrize(
    ("family", "kind"),
    [("qwen3_moe", "fp8-bf16"), ("deepseek_v3", "fp8"), ("olmoe", "awq"), ("mixtral", "gptq-act-order")],
)
def test_quantized_safetensors(family: str, kind: str, tmp_path: Path) -> None:
    source = tmp_path / "source"

    def act_order(name: str) -> Any:  # gate and up of an expert each with an order of its own, and dense layers too
        return gptq(act_order=True, seed=zlib.crc32(name.encode()) % 1000)[0]

    writer_of = {"writer_of": act_order} if kind == "gptq-act-order" else {}
    write_checkpoint(source, FAMILY[family], kind, **writer_of)
    folder = packed(str(source), tmp_path / "packed", {"dtype": "float32"})
    expected, found = load(str(source), dtype="float32", threads=2), load(str(folder), threads=2)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    if kind == "gptq-act-order":
        assert any(math.format.orders == 2 for math in found.moestro.math)
        assert any(one.order for one in read_manifest(folder).dense)
    same(found, expected, torch.arange(3, 40)[None])


@pytest.mark.parametrize(("family", "kind"), [("mixtral", "Q4_K"), ("gpt_oss", "MXFP4"), ("deepseek_v3", "Q8_0")])
def test_gguf(family: str, kind: str, tmp_path: Path) -> None:
    """The second has biases; of the first, matrices of an expert are in several formats."""
    width = 256 if kind.endswith("K") else 64
    model = _build(family, hidden_size=width, intermediate_size=width, moe_intermediate_size=width)
    path = tmp_path / "m.gguf"

    def kind_of(name: str) -> str:
        return "Q6_K" if kind == "Q4_K" and "down" in name else kind

    write_gguf(
        path, model, KNOWN[family][0], kind_of, lambda name, weight: TYPES[kind_of(name)](kind_of(name))(name, weight)
    )
    expected = load(str(path), dtype="float32", threads=2)
    found = load(str(packed(str(path), tmp_path / "packed", {"dtype": "float32"})), threads=2)
    if kind == "Q4_K":
        assert any("+" in math.format.name for math in found.moestro.math)
    assert all(m.shape.has_bias == (family == "gpt_oss") for m in found.moestro.math)
    same(found, expected, torch.arange(3, 40)[None])


@pytest.mark.sample(20)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_each_family(family: Family, tmp_path: Path) -> None:
    """All tensors are the same. So are logits, once the tensors of both models lie as torch lays them.

    Transformers leaves them where the file is mapped, and torch's convolutions of unaligned numbers differ in the last
    bit (jamba, inkling2).
    """
    build_model(family).save_pretrained(tmp_path / "source")
    folder = packed(str(tmp_path / "source"), tmp_path / "packed", expert_bits=8)
    expected = load(str(tmp_path / "source"), expert_bits=8, threads=2)
    found = load(str(folder), threads=2)
    mine, theirs = (dict((*m.named_parameters(), *m.named_buffers())) for m in (found, expected))
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert value.dtype == mine[name].dtype, name
        assert torch.equal(value, mine[name]), name
    for tensor in (*mine.values(), *theirs.values()):
        tensor.data = tensor.data.clone()
    with torch.no_grad():
        assert torch.equal(found(random_ids()).logits, expected(random_ids()).logits)


@pytest.mark.long
def test_from_the_hub(tmp_path: Path) -> None:
    """A folder that was shared there is fetched whole, and answers as the model that it was made of."""
    folder = packed("demo", tmp_path / "packed", bits=4)
    arguments = ["-m", "moestro.cli.main", "run", "org/packed", "Once upon a time", "-n", "6", "--temperature", "0"]
    with hub_server() as hub:
        hub.repos["org/packed"] = Repo({path.name: path.read_bytes() for path in folder.iterdir()})
        done = run_python(hub, tmp_path / "home", *arguments)
    tokenizer = load_tokenizer("demo")
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    wanted = load("demo", bits=4, threads=2, cache=False).generate(ids, **GREEDY)[0]
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(tokenizer.decode(wanted, skip_special_tokens=True)), done.stdout


def test_what_a_packed_folder_is_by_its_headers(tmp_path: Path) -> None:
    """As many weights of each part as the checkpoint has, and the bits that were asked for."""
    folder = packed("demo", tmp_path / "packed", expert_bits=4, dense_bits=8)
    found, plain = inspect_model(str(folder)), inspect_model("demo")
    assert found.kind == "packed"
    assert (found.architecture, found.layers, found.experts) == (plain.architecture, plain.layers, plain.experts)
    assert found.parts["experts"].weights == plain.parts["experts"].weights
    assert found.parts["attention"].weights == plain.parts["attention"].weights
    bits = 8 * FORMATS["hqq4"].expert_bytes(ExpertShape(192, 384)) / (3 * 192 * 384)
    assert (found.parts["experts"].bits, found.parts["attention"].bits) == (pytest.approx(bits), 8.25)
    assert found.n_bytes == sum(
        path.stat().st_size for path in folder.iterdir() if path.suffix in (".bin", ".safetensors")
    )
    assert safetensors.torch.load_file(folder / "rest.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert slow_crc32c(b"123456789") == 0xE3069283
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes().replace(b"hqq4", b"hqq3", 1))
    with pytest.raises(CheckpointError, match="is damaged"):
        inspect_model(str(folder))


def test_each_layer_has_a_file_of_experts(tmp_path: Path) -> None:
    folder = packed("demo", tmp_path / "packed", bits=8)
    layers = verify_packed(folder, 2).layers
    files = [path.name for path in sorted(folder.glob("experts-*.bin"))]
    assert [{run.file for run in layer.experts} for layer in layers] == [{name} for name in files]
    assert {run.offset % 4096 for _, run, _ in runs_of(verify_packed(folder, 2))} == {0}
    same(load(str(folder), threads=2), load("demo", bits=8, threads=2, cache=False), torch.arange(3, 40)[None])


def test_large_runs_are_read_in_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By several threads, in pieces, where the system reads at a place of its own and where it does not."""
    folder = packed("demo", tmp_path / "packed", bits=4)
    expected = load(str(folder), threads=2)
    monkeypatch.setattr("moestro.loading.packed.runs._SHARE_BYTES", 10_000)
    monkeypatch.setattr("moestro.loading.packed.runs._PIECE_BYTES", 3_000)
    for has_preadv in (True, False):
        if not has_preadv:
            monkeypatch.delattr(os, "preadv", raising=False)
        found = load(str(folder), threads=2)
        for key in expected.moestro.store.experts:
            assert torch.equal(found.moestro.store[key], expected.moestro.store[key])
