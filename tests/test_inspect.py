"""What `moestro inspect` says of a checkpoint, by its headers alone: here and, by ranged requests, on the hub."""

from __future__ import annotations

import json
import struct
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from hub_server import Repo, hub_server, run_python
from moestro.errors import MoestroError
from moestro.loading.contents import inspect_model
from moestro.loading.gguf_header import GGML_TYPES, NeedMore, parse_gguf
from moestro.loading.headers import read_header
from moestro.loading.hub import Wanted

DEMO = Path(str(files("moestro") / "demo"))


def text(words: str) -> bytes:
    return struct.pack("<Q", len(words)) + words.encode()


def gguf_file(vocabulary: int = 4) -> bytes:
    """A small GGUF file, by the format's own description: two tensors and a tokenizer."""
    entries = [
        text("general.architecture") + struct.pack("<I", 8) + text("qwen3moe"),
        text("qwen3moe.context_length") + struct.pack("<II", 4, 4096),
        text("qwen3moe.expert_count") + struct.pack("<II", 4, 8),
        text("tokenizer.ggml.model") + struct.pack("<I", 8) + text("gpt2"),
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, vocabulary) + text("token") * vocabulary,
        text("tokenizer.ggml.scores") + struct.pack("<IIQ", 9, 6, 2) + struct.pack("<ff", 1.0, 2.0),
    ]
    tensors = [
        text("blk.0.ffn_gate_exps.weight") + struct.pack("<IQQQIQ", 3, 256, 4, 8, 12, 0),  # Q4_K
        text("output_norm.weight") + struct.pack("<IQIQ", 1, 256, 0, 32 * 144),  # F32
    ]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries)) + b"".join(entries + tensors)
    return head + bytes(-len(head) % 32) + bytes(32 * 144 + 1024)


def header_of(folder: Path, name: str, data: bytes) -> object:
    (folder / name).write_bytes(data)
    return read_header(Wanted("m", folder, {name: len(data)}, (name,)), name)


def test_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "m-Q4_K_M.gguf"
    path.write_bytes(gguf_file())
    found = inspect_model(str(path))
    assert (found.architecture, found.context, found.experts, found.tokenizer) == ("qwen3moe", 4096, 8, True)
    assert found.parts["experts"].formats == {"Q4_K": 32 * 144}
    assert found.parts["experts"].bits == 4.5
    assert found.parts["router and norms"].weights == 256


def test_types_are_as_the_gguf_package_has_them() -> None:
    gguf = pytest.importorskip("gguf")
    theirs = {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    assert {number: GGML_TYPES[number] for number in theirs if number in GGML_TYPES} == theirs


def test_the_gguf_package_writes_what_is_read(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "olmoe")
    writer.add_context_length(512)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", torch.ones(6, 64).numpy())
    writer.add_tensor("blk.0.attn_q.weight", torch.ones(5, 32).half().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = inspect_model(str(path))
    assert (found.architecture, found.context) == ("olmoe", 512)
    assert (found.parts["embeddings"].weights, found.parts["attention"].n_bytes) == (6 * 64, 5 * 32 * 2)


def test_packed_weights_count_with_their_scales(tmp_path: Path) -> None:
    config = {
        "architectures": ["GptOssForCausalLM"],
        "max_position_embeddings": 128,
        "quantization_config": {"quant_method": "mxfp4"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {
        "model.layers.0.mlp.experts.down_proj_blocks": torch.zeros(2, 64, 1, 16, dtype=torch.uint8),
        "model.layers.0.mlp.experts.down_proj_scales": torch.zeros(2, 64, 1, dtype=torch.uint8),
        "lm_head.weight": torch.zeros(8, 4, dtype=torch.bfloat16),
    }
    (tmp_path / "model.safetensors").write_bytes(save(tensors))
    found = inspect_model(str(tmp_path))
    assert (found.parts["experts"].bits, found.parts["experts"].weights) == (4.25, 2 * 64 * 32)
    assert found.parts["head"].formats == {"BF16": 64}
    assert not found.tokenizer


def test_on_the_hub_only_headers_are_read(tmp_path: Path) -> None:
    repo = {path.name: path.read_bytes() for path in DEMO.iterdir() if path.is_file()}
    long_header = gguf_file(vocabulary=100_000)
    with hub_server() as hub:
        hub.repos["org/demo"], hub.repos["org/gguf"] = Repo(repo), Repo({"m.gguf": long_header + bytes(1 << 24)})
        done = run_python(hub, tmp_path, "-m", "moestro.cli.main", "inspect", "org/demo", "--json")
        here = inspect_model(str(DEMO))
        assert json.loads(done.stdout)["parts"] == here.to_json()["parts"], done
        done = run_python(hub, tmp_path, "-m", "moestro.cli.main", "inspect", "hf.co/org/gguf")
        assert "qwen3moe, 0 layers, 8 experts" in done.stdout, done
        assert "Q4_K" in done.stdout
        assert all(asked for method, path, asked in hub.requests if path.startswith("/cdn/"))
        last = max(int(asked.split("-")[1]) for _, path, asked in hub.requests if path.endswith("/m.gguf") and asked)
        assert last < 1 << 23
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_part_of_a_header_asks_for_what_it_needs() -> None:
    """However many of its bytes there are: never for more than the header, nor for what is there."""
    whole = gguf_file()
    header = parse_gguf("m", whole, len(whole))
    header_bytes = whole.index(b"output_norm.weight") + len("output_norm.weight") + struct.calcsize("<IQIQ")
    for here in range(len(whole) + 1):
        if here >= header_bytes:
            assert parse_gguf("m", whole[:here], len(whole)) == header
            continue
        with pytest.raises(NeedMore) as more:
            parse_gguf("m", whole[:here], len(whole))
        assert here < more.value.need <= header_bytes
    assert [entry.start % 32 for entry in header.tensors] == [0, 0]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("m.gguf", b"GGML" + bytes(60), "begins with b'GGML' instead of b'GGUF'"),
        ("m.gguf", b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1"),
        ("m.gguf", b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "it says that 1152921504606846976 things follow"),
        ("m.gguf", gguf_file()[:200], "is damaged or cut short at byte 200 (it ends too early)"),
        ("m.gguf", gguf_file()[:-1], "is damaged or cut short: output_norm.weight ends beyond it"),
        ("m.gguf", b"", "is no GGUF file: it has 0 bytes"),
        ("m.safetensors", b"", "is damaged or cut short (0 bytes)"),
        ("m.safetensors", b"\xff" * 100, "it says that it is"),
        ("m.safetensors", struct.pack("<Q", 2) + b"[]", "has no header that can be read"),
        ("m.safetensors", (DEMO / "model.safetensors").read_bytes()[:-1], "it may be cut short"),
    ],
)
def test_damaged_headers(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    with pytest.raises(MoestroError) as error:
        header_of(tmp_path, name, data)
    assert says in str(error.value)


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_mutated_files_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp()
    name = data.draw(st.sampled_from(["m.gguf", "m.safetensors"]))
    whole = gguf_file() if name == "m.gguf" else save({"a.weight": torch.ones(4, 4), "b.weight": torch.ones(2)})
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, min(len(whole), 600) - 1))] = data.draw(st.integers(0, 255))
    try:
        header_of(folder, name, bytes(changed))
    except MoestroError as error:
        if "\n" in str(error):
            raise
