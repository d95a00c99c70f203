"""Shapes of real models, as data: what `--shape` builds and what a replay can be stretched to.

Each entry is what the model's own config.json says of its size, in that family's own words; what is left
out is the family's default in Transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import RequestError
from .contract import LayerSpec, ModelSpec
from .model_config import completed, experts_of
from .spelling import spelled

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
    # openai/gpt-oss-20b
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 131072,
        "sliding_window": 128,
    },
    # openai/gpt-oss-120b
    "gpt-oss-120b": {
        "model_type": "gpt_oss",
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 131072,
        "sliding_window": 128,
    },
    # zai-org/GLM-4.5-Air
    "glm-4.5-air": {
        "model_type": "glm4_moe",
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 46,
        "first_k_dense_replace": 1,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": True,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
    },
    # deepseek-ai/DeepSeek-V3, without its layer for multi-token prediction
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 163840,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
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

REAL_SHAPES = ("mixtral-8x7b", "olmoe-1b-7b", "qwen3-30b-a3b")  # that kernels and rivals are measured with
# What `moestro bench attention` and `plan` measure where no shape is named.
ATTENTION_SHAPES = ("qwen3-30b-a3b", "olmoe-1b-7b")
FORECAST_SHAPES = ("olmoe-1b-7b", "qwen3-30b-a3b", "mixtral-8x7b", "gpt-oss-20b")


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
    return experts_of(completed(shape_named(name)))[1]


@dataclass(frozen=True, slots=True)
class ShapeParts:
    """What a shape is made of. linears: rows and columns of the dense part's linear layers, by name.

    rest: weights of norms, routers and biases. expert: weights of one expert. has_bias: whether experts have biases.
    """

    experts: int
    neurons: int
    hidden: int
    moe_layers: int
    linears: dict[str, tuple[int, int]]
    rest: int
    expert: int
    has_bias: bool


def parts_of_shape(name: str, layers: int | None = None) -> ShapeParts:
    """What a shape is made of.

    Args:
        layers: the depth to cut the model to; None for all layers.
    """
    config = completed(shape_named(name))
    width, layers = config["hidden_size"], layers or config["num_hidden_layers"]
    experts, _ = experts_of(config)
    has_bias = config["model_type"] == "gpt_oss"
    neurons = config.get("moe_intermediate_size") or config["intermediate_size"]
    dense = min(layers, config.get("first_k_dense_replace") or 0)
    attention, others = _attention(config)
    found: dict[str, tuple[int, int]] = {}
    for layer in range(layers):
        found |= {f"{layer}.{part}": size for part, size in attention.items()}
        inner = config["intermediate_size"] if layer < dense else neurons * (config.get("n_shared_experts") or 0)
        if inner:
            found |= {f"{layer}.gate_proj": (inner, width), f"{layer}.up_proj": (inner, width)}
            found[f"{layer}.down_proj"] = (width, inner)
    rest = layers * (2 * width + others) + width + (layers - dense) * experts * (width + has_bias)
    expert = 3 * width * neurons + has_bias * (2 * neurons + width)
    return ShapeParts(experts, neurons, width, layers - dense, found, rest, expert, has_bias)


def _attention(config: dict[str, Any]) -> tuple[dict[str, tuple[int, int]], int]:
    """Rows and columns of attention's linear layers, and its other weights: norms of heads, biases and sinks."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if latent := config.get("kv_lora_rank"):
        queries, positions = config["q_lora_rank"], config["qk_rope_head_dim"]
        key, value = config["qk_nope_head_dim"], config["v_head_dim"]
        sizes = {
            "q_a_proj": (queries, width),
            "q_b_proj": (heads * (key + positions), queries),
            "kv_a_proj_with_mqa": (latent + positions, width),
            "kv_b_proj": (heads * (key + value), latent),
            "o_proj": (width, heads * value),
        }
        return sizes, queries + latent
    key_heads, kind = config["num_key_value_heads"], config["model_type"]
    head = config.get("head_dim") or width // heads
    rows = {"q": heads * head, "k": key_heads * head, "v": key_heads * head}
    others = 0
    if kind == "olmoe":  # q and k are normalized over all heads
        others = rows["q"] + rows["k"]
    elif kind == "qwen3_moe":  # over each head
        others = 2 * head
    elif kind == "gpt_oss":  # biases, and a sink for each head
        others = sum(rows.values()) + width + heads
    elif config.get("attention_bias"):
        others = sum(rows.values())
    sizes = {f"{part}_proj": (count, width) for part, count in rows.items()}
    return sizes | {"o_proj": (width, heads * head)}, others


def depth_of_shape(name: str, layers: int | None = None) -> int:
    """How many layers a shape has that is cut to so many, dense ones included; None for all.

    Raises:
        RequestError: there are fewer, or none of those has experts.
    """
    depth, least = int(shape_named(name)["num_hidden_layers"]), least_depth(name)
    if layers is None:
        return depth
    given = spelled("layers", layers)
    if not 1 <= layers <= depth:
        raise RequestError(f"{given}: {name} has {depth}; give fewer, or leave it out for all of them")
    if layers < least:
        raise RequestError(f"{given}: the first {least - 1} of {name} have no experts; give at least {least}")
    return layers


def least_depth(name: str) -> int:
    """To how many layers a shape can be cut so that one of them has experts."""
    return 1 + (completed(shape_named(name)).get("first_k_dense_replace") or 0)


def spec_of_shape(name: str, layers: int | None = None) -> ModelSpec:
    """A shape as the planner sees it, in bf16: all but the routed experts is its dense part.

    Args:
        layers: the depth to cut the model to; None for all layers.
    """
    parts = parts_of_shape(name, layers)
    table = 2 * completed(shape_named(name))["vocab_size"] * parts.hidden  # embedding and head
    weights = sum(rows * columns for rows, columns in parts.linears.values()) + parts.rest + table
    layer = LayerSpec(parts.experts, parts.neurons, 2 * parts.expert, hidden=parts.hidden)
    return ModelSpec((layer,) * parts.moe_layers, dense_bytes=2 * weights, dense_weights=weights)
