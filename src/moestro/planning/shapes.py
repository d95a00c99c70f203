"""Shapes of real models, as data: what `--shape` builds and what a replay can be stretched to.

Each entry is what the model's own config.json says of its size, in that family's own words; what is left
out is the family's default in Transformers.
"""

from __future__ import annotations

from typing import Any

from ..errors import RequestError
from .contract import LayerSpec, ModelSpec

SHAPES: dict[str, dict[str, Any]] = {
    # mistralai/Mixtral-8x7B-v0.1
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    # allenai/OLMoE-1B-7B-0924
    "olmoe-1b-7b": {
        "model_type": "olmoe",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    # Qwen/Qwen3-30B-A3B
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    # no real model: small enough for a test
    "tiny": {
        "model_type": "mixtral",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 2048,
    },
}

REAL_SHAPES = tuple(name for name in SHAPES if name != "tiny")


def shape_named(name: str) -> dict[str, Any]:
    """What a shape's config.json says.

    Raises:
        RequestError: no such shape.
    """
    if name not in SHAPES:
        raise RequestError(f"no shape {name!r}; there are: {', '.join(SHAPES)}")
    return SHAPES[name]


def top_k_of_shape(name: str) -> int:
    """To how many experts a router sends each token."""
    return int(shape_named(name)["num_experts_per_tok"])


def spec_of_shape(name: str, layers: int | None = None) -> ModelSpec:
    """A shape as the planner sees it, in bf16: attention, norms, routers, embedding and head are its dense part.

    Args:
        layers: the depth to cut the model to; None for all layers.
    """
    shape = shape_named(name)
    width, vocab, layers = shape["hidden_size"], shape["vocab_size"], layers or shape["num_hidden_layers"]
    heads, key_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    head = shape.get("head_dim", width // heads)
    experts = shape.get("num_local_experts") or shape["num_experts"]
    neurons = shape.get("moe_intermediate_size", shape["intermediate_size"])
    norms = 2 * width
    if shape["model_type"] == "olmoe":  # q and k are normalized over all heads
        norms += (heads + key_heads) * head
    elif shape["model_type"] == "qwen3_moe":  # over each head
        norms += 2 * head
    attention = 2 * width * (heads + key_heads) * head
    weights = layers * (attention + norms + width * experts) + width + 2 * vocab * width
    layer = LayerSpec(experts, neurons, 2 * 3 * width * neurons, hidden=width)
    return ModelSpec((layer,) * layers, dense_bytes=2 * weights, dense_weights=weights)
