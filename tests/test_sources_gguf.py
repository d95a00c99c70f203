"""GGUF files read through their source: written here as llama.cpp's converter writes them, with the gguf package."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from typer.testing import CliRunner

from families import Family, build_model
from moestro.cli.main import app
from moestro.engine.families import expert_modules
from moestro.errors import CheckpointError, ModelError, MoestroError
from moestro.loading.sources import gguf_file, open_source
from raw_reader import read_raw
from test_sources_safetensors import compare

gguf = pytest.importorskip("gguf")

SIZES = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"shared_expert_intermediate_size": 32, "shared_intermediate_size": 32, "mlp_only_layers": []}
SIZES |= {"head_dim": 16, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}
MLA = {"num_key_value_heads": 4, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5, "head_dim": 4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False}
YARN |= {"rope_theta": 150000.0, "beta_fast": 32.0, "beta_slow": 1.0}
DEEPSEEK_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
DEEPSEEK_YARN |= {"mscale": 0.707, "mscale_all_dim": 0.707}
GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.25,
    "logits_scaling": 6.0,
}
ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("llama", {"sliding_window": None}),
    "qwen2_moe": ("qwen2moe", {}),
    "qwen3_moe": ("qwen3moe", {"norm_topk_prob": True}),
    "olmoe": ("olmoe", {}),
    "gpt_oss": ("gpt-oss", {"rope_parameters": YARN}),
    "deepseek_v2": ("deepseek2", MLA | {"topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("deepseek2", MLA),
    "deepseek_v3 in YaRN": ("deepseek2", MLA | {"rope_parameters": DEEPSEEK_YARN}),
    "glm4_moe": ("glm4moe", {"use_qk_norm": True, "attention_bias": True, **ROTARY}),
    "granitemoe": ("granitemoe", {**GRANITE}),
    "granitemoeshared": ("granitemoe", {**GRANITE}),
    "phimoe": ("phimoe", {"sliding_window": None, "attention_bias": True, "lm_head_bias": True}),
    "minimax_m2": ("minimax-m2", ROTARY),
}
Quantize = Callable[[str, np.ndarray], Any]  # name, float32 -> bytes


def by_package(kind: str) -> Quantize:
    return lambda name, weight: gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])


def random_blocks(kind: str) -> Quantize:
    """Random bytes are valid blocks of K-quants, IQ and TQ if their 16-bit scales are, of NVFP4 if scales have no sign.

    IQ1_M spreads its 16-bit scale over the high halves of four words.
    """
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "TQ1_0": (52,)}
    places |= {"TQ2_0": (64,), "NVFP4": (), "IQ1_M": ()}

    def quantize(name: str, weight: np.ndarray) -> np.ndarray:
        random = np.random.default_rng(len(name))
        blocks = random.integers(0, 256, (*weight.shape[:-1], weight.shape[-1] // block, size), np.uint8)
        if kind == "NVFP4":
            blocks[..., :4] = random.integers(8, 28, blocks[..., :4].shape)  # 2^-6 to 2^-4
            blocks[..., :4][random.random(blocks[..., :4].shape) < 0.02] = 127  # no number, which is read as 0
        if kind == "IQ1_M":
            blocks[..., 55] = blocks[..., 55] & 0x0F | 0x20
        for place in places.get(kind, (0,)):
            scale = (random.random(blocks.shape[:-1]) * 0.01).astype(np.float16)
            blocks[..., place : place + 2] = scale[..., None].view(np.uint8)
        return blocks.reshape(*weight.shape[:-1], -1)

    return quantize


def write_gguf(
    path: Path,
    model: nn.Module,
    arch: str,
    kind: str | Callable[[str], str],
    quantize: Quantize,
    parts: int = 0,
    stack: bool = True,
    more: Callable[[Any], None] = lambda _: None,
) -> None:
    """What llama.cpp's convert_hf_to_gguf does to such a model; the model then holds what the file stands for."""
    config: Any = model.config
    model.save_pretrained(path.parent / "saved")
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=parts)
    _metadata(writer, config, arch)
    more(writer)
    gguf_arch = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(gguf_arch, config.num_hidden_layers)
    tensors = load_file(path.parent / "saved" / "model.safetensors")
    for name, tensor in _stacked(tensors, config, arch).items():
        base, _, ending = name.rpartition(".")
        if name.endswith("e_score_correction_bias"):
            base, ending = name.removesuffix("_bias"), "bias"
        elif ending == "sinks":
            base, ending = name, "weight"
        written = f"{names.get_name(base)}.{ending}"
        assert "None" not in written, name
        weight = tensor.float().numpy()
        if not stack and "_exps" in written:  # as files of early 2024 have them
            for expert, matrix in enumerate(weight):
                writer.add_tensor(written.replace("_exps", f".{expert}"), matrix.copy())
            continue
        plain = weight.ndim < 2 or "ffn_gate_inp" in written or "_bias" in written or written.endswith(".bias")
        of_type = gguf.GGMLQuantizationType[kind if isinstance(kind, str) else kind(written)]
        if plain or weight.shape[-1] % gguf.GGML_QUANT_SIZES[of_type][0]:
            writer.add_tensor(written, np.ascontiguousarray(weight))
        else:
            writer.add_tensor(written, quantize(written, weight), raw_dtype=of_type)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _build(name: str, **more: Any) -> nn.Module:
    family = name.partition(" ")[0]
    fields = inspect.signature(CONFIG_MAPPING[family].__init__).parameters
    changes = SIZES | KNOWN[name][1] | more
    return build_model(Family(family, {name: value for name, value in changes.items() if name in fields}))


def _permute(weight: Tensor, heads: int) -> Tensor:
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _stacked(tensors: dict[str, Tensor], config: Any, arch: str) -> dict[str, Tensor]:
    """Published tensors with experts stacked and the architecture's changes made, under names that the tables know."""
    done: dict[str, Any] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(.*experts)\.(\d+)\.(\w+)\.weight", name)
        if found:
            done.setdefault(f"{found[1]}.{found[3]}.weight", {})[int(found[2])] = tensor
        elif name.endswith(("experts.gate_up_proj", "experts.gate_up_proj_bias")):  # gpt-oss
            stem, ending = (name.removesuffix("_bias"), "bias") if name.endswith("_bias") else (name, "weight")
            rows = tensor if ending == "bias" else tensor.transpose(1, 2)
            for part, offset in (("gate", 0), ("up", 1)):
                done[f"{stem.replace('gate_up', part)}.{ending}"] = rows[:, offset::2].contiguous()
        elif name.endswith("experts.down_proj"):
            done[f"{name}.weight"] = tensor.transpose(1, 2).contiguous()
        elif name.endswith("experts.down_proj_bias"):
            done[name.replace("_bias", ".bias")] = tensor
        elif name.endswith("block_sparse_moe.input_linear.weight"):  # Granite
            gate, up = tensor.chunk(2, 1)
            done |= {name.replace("input_linear", "experts.w1"): gate, name.replace("input_linear", "experts.w3"): up}
        elif name.endswith("shared_mlp.input_linear.weight"):
            gate, up = tensor.chunk(2, 0)
            stem = name.replace("shared_mlp.input_linear", "mlp.shared_expert.{}_proj")
            done |= {stem.format("gate"): gate, stem.format("up"): up}
        elif name.endswith("kv_b_proj.weight"):
            heads = config.num_attention_heads
            both = tensor.view(heads, -1, tensor.shape[1]).split([config.qk_nope_head_dim, config.v_head_dim], 1)
            done[name.replace("kv_b", "k_b")] = both[0].transpose(1, 2).contiguous()
            done[name.replace("kv_b", "v_b")] = both[1].contiguous()
        elif arch in ("llama", "granitemoe") and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            done[name] = _permute(tensor, heads)
        elif name.endswith("shared_expert_gate.weight"):
            done[name] = tensor[0]
        else:
            done[name] = tensor
    return {
        name: torch.stack([value[i] for i in sorted(value)]) if isinstance(value, dict) else value
        for name, value in done.items()
    }


def _metadata(writer: Any, config: Any, arch: str) -> None:
    rope = config.rope_parameters
    heads = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(heads * rope.get("partial_rotary_factor", 1)))
    writer.add_expert_used_count(config.num_experts_per_tok)
    experts = ("num_local_experts", "num_experts", "n_routed_experts")
    writer.add_expert_count(next(getattr(config, name) for name in experts if hasattr(config, name)))
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if arch in ("qwen3moe", "gpt-oss", "glm4moe", "minimax-m2"):
        writer.add_key_length(heads)
    if arch == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if arch == "gpt-oss":
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if arch in ("deepseek2", "glm4moe"):
        writer.add_leading_dense_block_count(config.first_k_dense_replace)
        writer.add_expert_shared_count(config.n_shared_experts)
        writer.add_expert_weights_scale(config.routed_scaling_factor)
        writer.add_expert_weights_norm(bool(config.norm_topk_prob))
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
        is_v2 = config.model_type == "deepseek_v2"
        kinds = gguf.ExpertGatingFuncType
        writer.add_expert_gating_func(kinds.SOFTMAX if is_v2 else kinds.SIGMOID)
    if arch == "deepseek2":
        writer.add_head_count_kv(1)
        writer.add_q_lora_rank(config.q_lora_rank)
        writer.add_kv_lora_rank(config.kv_lora_rank)
        writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
        writer.add_value_length(config.kv_lora_rank)
        writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
        writer.add_value_length_mla(config.v_head_dim)
        writer.add_rope_dimension_count(config.qk_rope_head_dim)
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    if arch == "granitemoe":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_logit_scale(config.logits_scaling)
        if hasattr(config, "shared_intermediate_size"):
            writer.add_expert_shared_feed_forward_length(config.shared_intermediate_size)


def _read_back(path: Path, model: nn.Module) -> nn.Module:
    """The model with the weights that the file stands for, by an independent reader of it."""
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    source = open_source(str(path))
    config = source.config()
    again = type(model)(config)
    for name, value in vars(model.config).items():
        if name.endswith(("size", "heads", "layers", "experts", "rank", "dim", "multiplier")) or "topk" in name:
            if name in ("num_mtp_layers", "num_nextn_predict_layers"):
                continue
            assert getattr(config, name) == value, name
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    return again


@pytest.mark.parametrize("family", KNOWN)
def test_a_converted_model_is_read_as_it_was(family: str, tmp_path: Path) -> None:
    arch = KNOWN[family][0]
    model = _build(family)
    write_gguf(tmp_path / "m.gguf", model, arch, "F32", by_package("F32"))
    _read_back(tmp_path / "m.gguf", model)
    compare(tmp_path / "m.gguf", model)


TYPES: dict[str, Callable[[str], Quantize]] = {
    **dict.fromkeys(("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"), by_package),
    **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "NVFP4"), random_blocks),
}


@pytest.mark.sample(24)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_each_type_is_read_as_the_gguf_package_reads_it(family: str, kind: str, tmp_path: Path) -> None:
    arch, width = KNOWN[family][0], 256 if kind.endswith(("K", "XS")) else 64
    model = _build(family, hidden_size=width, intermediate_size=width, moe_intermediate_size=width)
    write_gguf(tmp_path / "m.gguf", model, arch, kind, TYPES[kind](kind))
    expected = {
        one.name: torch.from_numpy(gguf.dequantize(one.data, one.tensor_type).copy())
        for one in gguf.GGUFReader(tmp_path / "m.gguf").tensors
    }
    weights = open_source(str(tmp_path / "m.gguf")).weights(model)
    modules = expert_modules(model)
    for name, module in modules.items():
        layer = name.split(".")[2]
        for expert in range(module.num_experts):
            for part, one in weights.expert(name, expert).matrices.items():
                stored = expected[f"blk.{layer}.ffn_{part}_exps.weight"][expert]
                assert torch.equal(read_raw(one.raw, one.rows), stored)
                assert isinstance(one.raw, Tensor) is (kind in ("F16", "BF16"))
    dense = {
        name: value.float() if isinstance(value, Tensor) else read_raw(value.raw, value.rows)
        for name, value in weights.dense()
    }
    query = dense["model.layers.0.self_attn.q_proj.weight" if arch != "deepseek2" else "model.norm.weight"]
    if arch == "llama":
        assert torch.equal(_permute(query, model.config.num_attention_heads), expected["blk.0.attn_q.weight"])
    assert torch.equal(dense["model.embed_tokens.weight"], expected["token_embd.weight"])


def test_experts_of_old_files_are_not_stacked(tmp_path: Path) -> None:
    model = _build("mixtral")
    write_gguf(tmp_path / "m.gguf", model, "llama", "F32", by_package("F32"), stack=False)
    compare(tmp_path / "m.gguf", model)


def test_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    model = _build("mixtral")
    write_gguf(tmp_path / "m.gguf", model, "llama", "Q8_0", by_package("Q8_0"))
    source = open_source(str(tmp_path / "m.gguf"))
    raws = [source.weights(model).expert("model.layers.0.mlp.experts", 2).matrices["up"].raw for _ in range(2)]
    assert len({raw.tensors["weight"].data_ptr() for raw in raws}) == 1


@pytest.mark.parametrize("size", [None, 1, 8])
def test_nvfp4_has_the_scale_of_a_matrix_beside_it(size: int | None, tmp_path: Path) -> None:
    """As llama.cpp's converter writes ModelOpt's second scale: one for each stacked expert, one for a dense layer."""
    model, path = _build("mixtral", intermediate_size=128), tmp_path / "m.gguf"
    scales = torch.rand(size or 1) + 0.5

    def more(writer: Any) -> None:
        for part in ("gate", "up", "down"):
            writer.add_tensor(f"blk.1.ffn_{part}_exps.scale", scales.numpy())
        writer.add_tensor("blk.0.attn_v.scale", scales[:1].numpy())

    write_gguf(path, model, "llama", "NVFP4", random_blocks("NVFP4"), more=more if size else lambda _: None)
    stored = {
        one.name: torch.from_numpy(gguf.dequantize(one.data, one.tensor_type).copy())
        for one in gguf.GGUFReader(path).tensors
    }
    weights = open_source(str(path)).weights(model)
    for expert in range(8):
        for part, one in weights.expert("model.layers.1.mlp.experts", expert).matrices.items():
            scale = scales[min(expert, len(scales) - 1)] if size else 1.0
            wanted = stored[f"blk.1.ffn_{part}_exps.weight"][expert] * scale
            torch.testing.assert_close(read_raw(one.raw), wanted, rtol=2**-20, atol=0)
    dense = dict(weights.dense())["model.layers.0.self_attn.v_proj.weight"]
    wanted = stored["blk.0.attn_v.weight"] * (scales[0] if size else 1.0)
    torch.testing.assert_close(read_raw(dense.raw), wanted, rtol=2**-20, atol=0)


def test_scales_beside_a_matrix_are_not_passed_over(tmp_path: Path) -> None:
    model, path = _build("mixtral"), tmp_path / "m.gguf"

    def beside(size: int, kind: str) -> None:
        scale = np.ones(size, np.float32)
        write_gguf(
            path, model, "llama", kind, TYPES[kind](kind), more=lambda w: w.add_tensor("blk.1.ffn_up_exps.scale", scale)
        )

    beside(3, "NVFP4")
    with pytest.raises(CheckpointError, match=r"has scales of \[3\] in F32, where it needs 8 in F32"):
        _open_all(path, model)
    beside(8, "Q8_0")
    with pytest.raises(ModelError, match="is of type Q8_0 and has a scale beside it, which Moestro reads for NVFP4"):
        _open_all(path, model)


def test_split_files_are_one(tmp_path: Path) -> None:
    model = _build("mixtral")
    write_gguf(tmp_path / "m.gguf", model, "llama", "F32", by_package("F32"), parts=9)
    files = sorted(tmp_path.glob("m-0*.gguf"))
    assert len(files) > 2
    compare(files[1], model)
    compare(tmp_path, model)
    files[2].unlink()
    with pytest.raises(CheckpointError, match=f"{files[2].name} is missing beside"):
        open_source(str(files[0]))


def _open_all(path: Path, model: nn.Module) -> None:
    source = open_source(str(path))
    source.config()
    weights = source.weights(model)
    for name in expert_modules(model):
        weights.expert(name, 0)
    for _ in weights.dense():
        pass


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    path, bad = tmp_path / "m.gguf", tmp_path / "bad.gguf"
    model = _build("mixtral")
    write_gguf(path, model, "llama", "Q8_0", by_package("Q8_0"))
    whole = path.read_bytes()
    for data, match in (
        (b"GGML" + whole[4:], "begins with b'GGML' instead of b'GGUF'"),
        (whole[:4] + b"\x07" + whole[5:], "version 7"),
        (whole[:12], "no GGUF file: it has 12 bytes"),
        (whole[:600], "damaged or cut short"),
        (whole[:-70], "ends beyond it"),
        (whole[:8] + b"\xff" * 8 + whole[16:], "damaged or cut short"),
        (whole.replace(b"llama.block_count", b"llama.block_czzzz"), "no llama.block_count"),
        (whole.replace(b"general.architecture", b"general.architecturX"), "no general.architecture"),
        (whole.replace(b"blk.1.ffn_up_exps", b"blk.1.ffn_up_expz"), "no blk.1.ffn_up_exps.weight; it is incomplete"),
    ):
        bad.write_bytes(data)
        with pytest.raises(CheckpointError, match=match) as caught:
            _open_all(bad, model)
        assert "\n" not in str(caught.value)


def test_types_and_architectures_that_are_not_read_are_named(tmp_path: Path) -> None:
    model = _build("mixtral", hidden_size=256, intermediate_size=256)
    path = tmp_path / "m.gguf"
    blocks = np.zeros((1,), np.uint8)

    def quantize(name: str, weight: np.ndarray) -> np.ndarray:
        return np.resize(blocks, (*weight.shape[:-1], weight.shape[-1] // 256 * 98))

    write_gguf(path, model, "llama", "IQ3_XXS", quantize)
    weights = open_source(str(path)).weights(model)
    with pytest.raises(ModelError, match=r"IQ3_XXS, which Moestro does not keep: transcode=8 .* use a file of Q4_K_M"):
        weights.expert("model.layers.0.mlp.experts", 0)
    write_gguf(path, model, "llama", "F32", by_package("F32"))
    path.write_bytes(path.read_bytes().replace(b"llama", b"bloom"))
    with pytest.raises(ModelError, match="of the architecture bloom, which Moestro does not read"):
        open_source(str(path))


def test_a_config_that_contradicts_the_tensors_is_one_line(tmp_path: Path) -> None:
    model = _build("mixtral")
    write_gguf(tmp_path / "m.gguf", model, "llama", "F32", by_package("F32"))
    weights = open_source(str(tmp_path / "m.gguf")).weights(_build("mixtral", intermediate_size=64))
    with pytest.raises(CheckpointError, match=r"is \[8, 96, 64\], where the file's metadata needs \[8, 64, 64\]"):
        weights.expert("model.layers.0.mlp.experts", 0)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutated_files_never_crash(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp()
    path, bad = folder / "whole.gguf", folder / "mutated.gguf"
    model = _build("mixtral")
    if not path.exists():
        write_gguf(path, model, "llama", "Q8_0", by_package("Q8_0"))
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, 3000))] = data.draw(st.integers(0, 255))
    bad.write_bytes(whole[: data.draw(st.sampled_from([len(whole), 3000, 700]))])
    with suppress(MoestroError):
        _open_all(bad, model)


def _with_tokenizer(path: Path, model: nn.Module, pre: str) -> None:
    """The demo's tokenizer, as the converter writes byte-level ones."""
    tokenizer = json.loads((files("moestro") / "demo" / "tokenizer.json").read_text("utf-8"))
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    special = {one["content"] for one in tokenizer["added_tokens"]}

    def more(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in special else 1 for token in tokens])
        writer.add_token_merges(merges)
        writer.add_eos_token_id(0)

    write_gguf(path, model, "llama", "F32", by_package("F32"), more=more)


def test_its_tokenizer_splits_text_as_the_original(tmp_path: Path) -> None:
    original = AutoTokenizer.from_pretrained(str(files("moestro") / "demo"))
    model = _build("mixtral")
    _with_tokenizer(tmp_path / "m.gguf", model, "gpt-2")
    tokenizer = open_source(str(tmp_path / "m.gguf")).tokenizer()
    for text in ("Once upon a time, there were 12 naïve kings.", "  two  spaces\n\nand lines", "don't"):
        assert tokenizer(text).input_ids == original(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    _with_tokenizer(tmp_path / "m.gguf", model, "unheard-of")
    with pytest.raises(CheckpointError, match=r"splits text as 'unheard-of', .* tokenizer='ORG/REPO'"):
        open_source(str(tmp_path / "m.gguf")).tokenizer()
    other = open_source(str(tmp_path / "m.gguf"), tokenizer=str(files("moestro") / "demo"))
    assert other.tokenizer()("don't").input_ids == original("don't").input_ids
    write_gguf(tmp_path / "m.gguf", model, "llama", "F32", by_package("F32"))
    with pytest.raises(CheckpointError, match=r"has no tokenizer; name a checkpoint .* tokenizer='ORG/REPO'"):
        open_source(str(tmp_path / "m.gguf")).tokenizer()


def test_a_run_opens_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For its tokenizer and for its model; a later load looks again."""
    opened = []
    parse = gguf_file.parse_gguf
    monkeypatch.setattr(gguf_file, "parse_gguf", lambda *given: opened.append(given[0]) or parse(*given))
    path = tmp_path / "m.gguf"
    _with_tokenizer(path, _build("mixtral", vocab_size=4096), "gpt-2")
    for runs in (1, 2):
        done = CliRunner().invoke(app, ["run", str(path), "Once", "-n", "2", "--device", "cpu", "-t", "1"])
        assert done.exit_code == 0, done
        assert opened == [str(path)] * runs


def test_without_the_gguf_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf", _build("mixtral"), "llama", "F32", by_package("F32"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"needs the gguf package: pip install 'moestro\[gguf\]'"):
        open_source(str(tmp_path / "m.gguf"))
