"""Random checkpoints of any size, quantized or not, written as fast as the disk takes them, to measure loading with.

    from benchmarks.checkpoints import KINDS, Sizes
    KINDS["fp8"](Path("folder"), Sizes(layers=8, experts=16, hidden=1024, neurons=1024))

Weights are random codes; scales are small, so that a model of them computes finite numbers. There is no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HEADS, HEAD, VOCABULARY = 2, 64, 256  # few, so that the experts are nearly all of a model


@dataclass(frozen=True, slots=True)
class Sizes:
    """Layers, experts of each, the model's width and an expert's neurons; the last two are multiples of 256."""

    layers: int
    experts: int
    hidden: int
    neurons: int

    def __post_init__(self) -> None:
        if min(self.layers, self.experts - 1) < 1 or self.hidden % 256 or self.neurons % 256:
            raise ValueError(f"{self}: at least 1 layer and 2 experts, and widths that are multiples of 256")

    @property
    def weights_of_expert(self) -> int:
        return 3 * self.hidden * self.neurons


def write_q4_k(path: Path, sizes: Sizes) -> Path:
    """A GGUF of Qwen3's architecture whose experts are Q4_K; returns the file, which is in the folder `path`."""
    gguf: Any = import_module("gguf")
    path.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path / "model.gguf", "qwen3moe")
    writer.add_block_count(sizes.layers)
    writer.add_context_length(512)
    writer.add_embedding_length(sizes.hidden)
    writer.add_feed_forward_length(sizes.neurons)
    writer.add_expert_feed_forward_length(sizes.neurons)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(sizes.experts)
    writer.add_expert_used_count(2)
    block_bytes = 144
    for layer in range(sizes.layers):
        for name, tensor in _dense(sizes).items():
            writer.add_tensor(f"blk.{layer}.{_GGUF_NAMES[name]}.weight", tensor.float().numpy())
        for part, (rows, columns) in _matrices(sizes).items():
            blocks = torch.randint(0, 256, (sizes.experts, rows, columns // 256, block_bytes), dtype=torch.uint8)
            blocks[..., :4] = torch.tensor([1e-4, 1e-4], dtype=torch.float16).view(torch.uint8)
            data = blocks.flatten(2).numpy()
            writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.weight", data, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.add_tensor("token_embd.weight", torch.randn(VOCABULARY, sizes.hidden).numpy())
    writer.add_tensor("output_norm.weight", torch.ones(sizes.hidden).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path / "model.gguf"


def write_fp8(path: Path, sizes: Sizes) -> Path:
    """A folder of Qwen3's architecture whose experts are FP8 e4m3, with a float32 scale for 128 x 128; returns it."""
    config = _qwen3_config(sizes)
    dense = ["lm_head", "model.embed_tokens", "self_attn", "mlp.gate"]
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": dense,
    }

    def experts(layer: str) -> Iterator[tuple[str, Tensor]]:
        for expert in range(sizes.experts):
            for part, (rows, columns) in _matrices(sizes).items():
                codes = torch.randint(0, 0x70, (rows, columns), dtype=torch.uint8)
                name = f"{layer}.mlp.experts.{expert}.{part}_proj.weight"
                yield name, codes.view(torch.float8_e4m3fn)
                yield f"{name}_scale_inv", torch.full((rows // 128, columns // 128), 1e-4)

    return _write_folder(path, sizes, config, experts)


def write_mxfp4(path: Path, sizes: Sizes) -> Path:
    """A folder of gpt-oss's architecture, whose experts are MXFP4 with biases; returns it."""
    config = _config(sizes, "gpt_oss", "GptOssForCausalLM", num_local_experts=sizes.experts, sliding_window=128)
    config |= {"layer_types": ["full_attention"] * sizes.layers, "attention_bias": True}
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "mlp.router"]}

    def experts(layer: str) -> Iterator[tuple[str, Tensor]]:
        yield f"{layer}.self_attn.sinks", torch.zeros(HEADS, dtype=torch.bfloat16)
        for part, rows in (("q", HEADS * HEAD), ("k", HEADS * HEAD), ("v", HEADS * HEAD), ("o", sizes.hidden)):
            yield f"{layer}.self_attn.{part}_proj.bias", torch.zeros(rows, dtype=torch.bfloat16)
        yield f"{layer}.mlp.router.bias", torch.zeros(sizes.experts, dtype=torch.bfloat16)
        shapes = {"gate_up": (2 * sizes.neurons, sizes.hidden), "down": (sizes.hidden, sizes.neurons)}
        for part, (rows, columns) in shapes.items():
            name, groups = f"{layer}.mlp.experts.{part}_proj", columns // 32
            yield f"{name}_blocks", torch.randint(0, 256, (sizes.experts, rows, groups, 16), dtype=torch.uint8)
            yield f"{name}_scales", torch.full((sizes.experts, rows, groups), 120, dtype=torch.uint8)
            yield f"{name}_bias", torch.zeros(sizes.experts, rows, dtype=torch.bfloat16)

    return _write_folder(path, sizes, config, experts)


def write_bf16(path: Path, sizes: Sizes) -> Path:
    """A folder of Qwen3's architecture in bf16, as published: a tensor for each matrix of an expert; returns it."""

    def experts(layer: str) -> Iterator[tuple[str, Tensor]]:
        for expert in range(sizes.experts):
            for part, shape in _matrices(sizes).items():
                yield f"{layer}.mlp.experts.{expert}.{part}_proj.weight", _random_bf16(*shape)

    return _write_folder(path, sizes, _qwen3_config(sizes), experts)


def write_bf16_fused(path: Path, sizes: Sizes) -> Path:
    """The same under Transformers' own names: the experts of a layer in two tensors; returns it."""

    def experts(layer: str) -> Iterator[tuple[str, Tensor]]:
        yield f"{layer}.mlp.experts.gate_up_proj", _random_bf16(sizes.experts, 2 * sizes.neurons, sizes.hidden)
        yield f"{layer}.mlp.experts.down_proj", _random_bf16(sizes.experts, sizes.hidden, sizes.neurons)

    return _write_folder(path, sizes, _qwen3_config(sizes), experts)


def _random_bf16(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.03, 0.03)


KINDS: Mapping[str, Callable[[Path, Sizes], Path]] = {
    "q4_k": write_q4_k,
    "fp8": write_fp8,
    "mxfp4": write_mxfp4,
    "bf16": write_bf16,
    "bf16-fused": write_bf16_fused,
}


_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}


def _matrices(sizes: Sizes) -> dict[str, tuple[int, int]]:
    wide = (sizes.neurons, sizes.hidden)
    return {"gate": wide, "up": wide, "down": (sizes.hidden, sizes.neurons)}


def _dense(sizes: Sizes) -> dict[str, Tensor]:
    """All of a layer of Qwen3 but its experts."""
    hidden, rows = sizes.hidden, HEADS * HEAD

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape) * 0.03).bfloat16()

    tensors = {f"self_attn.{name}_proj": random(rows, hidden) for name in "qkv"}
    tensors |= {"self_attn.o_proj": random(hidden, rows), "mlp.gate": random(sizes.experts, hidden)}
    tensors |= {f"self_attn.{name}_norm": torch.ones(HEAD).bfloat16() for name in "qk"}
    norms = ("input_layernorm", "post_attention_layernorm")
    return tensors | {name: torch.ones(hidden).bfloat16() for name in norms}


def _config(sizes: Sizes, model_type: str, architecture: str, **more: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "vocab_size": VOCABULARY,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.neurons,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    } | more


def _qwen3_config(sizes: Sizes) -> dict[str, Any]:
    config = _config(sizes, "qwen3_moe", "Qwen3MoeForCausalLM", num_experts=sizes.experts, norm_topk_prob=True)
    return config | {"moe_intermediate_size": sizes.neurons, "mlp_only_layers": [], "decoder_sparse_step": 1}


def _write_folder(
    path: Path, sizes: Sizes, config: dict[str, Any], experts: Callable[[str], Iterator[tuple[str, Tensor]]]
) -> Path:
    """A file for each layer, one for the ends, their index and the config."""
    path.mkdir(parents=True, exist_ok=True)
    places: dict[str, str] = {}

    def save(file: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, path / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, file))

    is_gpt_oss = config["model_type"] == "gpt_oss"
    for index in range(sizes.layers):
        layer = f"model.layers.{index}"
        tensors = dict(experts(layer))
        for name, tensor in _dense(sizes).items():
            if not is_gpt_oss or not name.startswith(("self_attn.q_norm", "self_attn.k_norm")):
                name = name.replace("mlp.gate", "mlp.router") if is_gpt_oss else name
                tensors[f"{layer}.{name}.weight"] = tensor
        save(f"model-{index:03}.safetensors", tensors)
    ends = {"model.norm.weight": torch.ones(sizes.hidden).bfloat16()}
    save(
        "model-ends.safetensors", ends | {"model.embed_tokens.weight": torch.randn(VOCABULARY, sizes.hidden).bfloat16()}
    )
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (path / "config.json").write_text(json.dumps(config))
    return path
