"""From a GGUF file's metadata to the values of a config.json. Needs the standard library alone.

llama.cpp's converter writes down what llama.cpp needs to run a model; a table here turns each architecture's keys
into the config that Transformers computes the same with. What a file leaves to llama.cpp's code (Qwen3 and GLM norm
their top-k weights, say) is in the table too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ..errors import CheckpointError, ModelError, MoestroError, first_line
from ..planning.spelling import spelled


def name_config() -> str:
    """What to do about a file that has no config that can be read."""
    return f"name a checkpoint with the same config by {spelled('config', 'ORG/REPO')}"


class GgufLike(Protocol):
    """A file's metadata, and its tensors by name, each with a shape; small ones also with their numbers, `data`."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the file says of the model, by keys."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Its tensors by name."""


class _Keys:
    """The metadata of one architecture, by keys without its name."""

    def __init__(self, file: GgufLike, architecture: str) -> None:
        self.file, self._prefix = file, architecture

    def __getitem__(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"the file's metadata has no {self._prefix}.{key}; {name_config()}")
        return value

    def get(self, key: str, default: Any = None) -> Any:
        value = self.file.metadata.get(f"{self._prefix}.{key}", default)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:  # one for each layer
            raise CheckpointError(
                f"{self._prefix}.{key} differs between layers, which Moestro does not read; {name_config()}"
            )
        return value[0]

    def has(self, tensor: str) -> bool:
        """Whether any layer has a tensor of that name."""
        return any(name.endswith(f".{tensor}") for name in self.file.tensors)


def _common(keys: _Keys) -> dict[str, Any]:
    tokens = keys.file.metadata
    config = {
        "hidden_size": keys["embedding_length"],
        "num_hidden_layers": keys["block_count"] - keys.get("nextn_predict_layers", 0),
        "num_attention_heads": keys["attention.head_count"],
        "num_key_value_heads": keys.get("attention.head_count_kv", keys["attention.head_count"]),
        "max_position_embeddings": keys["context_length"],
        "rms_norm_eps": keys.get("attention.layer_norm_rms_epsilon", keys.get("attention.layer_norm_epsilon", 1e-5)),
        "num_experts_per_tok": keys["expert_used_count"],
        "vocab_size": keys.file.tensors["token_embd.weight"].shape[0]
        if "token_embd.weight" in keys.file.tensors
        else 0,
        "tie_word_embeddings": "output.weight" not in keys.file.tensors,
        "rope_parameters": _rope(keys),
        "attention_bias": keys.has("attn_q.bias"),
    }
    if keys.get("attention.key_length") is not None:
        config["head_dim"] = keys["attention.key_length"]
    for token in ("bos", "eos", "pad"):
        found = tokens.get(f"tokenizer.ggml.{'padding' if token == 'pad' else token}_token_id")
        config[f"{token}_token_id"] = found
    return config


def _rope(keys: _Keys) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base", 10000.0)}
    kind = keys.get("rope.scaling.type", "none")
    if kind == "none":
        if "rope_freqs.weight" in keys.file.tensors:
            raise ModelError(f"the file scales its positions by a table (rope_freqs.weight); {name_config()}")
        return rope
    rope |= {"rope_type": kind, "factor": keys.get("rope.scaling.factor", 1.0)}
    if kind == "linear":
        return rope
    rope["original_max_position_embeddings"] = keys["rope.scaling.original_context_length"]
    for name, key in (
        ("beta_fast", "yarn_beta_fast"),
        ("beta_slow", "yarn_beta_slow"),
        ("mscale", "yarn_log_multiplier"),
    ):
        if keys.get(f"rope.scaling.{key}") is not None:
            rope[name] = keys[f"rope.scaling.{key}"]
    if "mscale" in rope:  # DeepSeek's two are equal; the file has a tenth of them
        rope["mscale"] = rope["mscale_all_dim"] = round(rope["mscale"] * 10, 6)
    return rope


def _mixtral(keys: _Keys) -> dict[str, Any]:
    config = {"model_type": "mixtral", "num_local_experts": keys["expert_count"]}
    if keys.get("attention.key_length") is None and keys.get("rope.dimension_count") is not None:
        config["head_dim"] = keys["rope.dimension_count"]
    return config | {"intermediate_size": keys.get("expert_feed_forward_length", keys["feed_forward_length"])}


def _qwen(keys: _Keys, model_type: str, **more: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "num_experts": keys["expert_count"],
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "intermediate_size": keys.get("feed_forward_length", keys["expert_feed_forward_length"]),
        **more,
    }


def _qwen2moe(keys: _Keys) -> dict[str, Any]:
    shared = keys.get("expert_shared_feed_forward_length")
    if shared is None and "blk.0.ffn_up_shexp.weight" in keys.file.tensors:
        shared = keys.file.tensors["blk.0.ffn_up_shexp.weight"].shape[0]
    return _qwen(keys, "qwen2_moe", shared_expert_intermediate_size=shared, qkv_bias=keys.has("attn_q.bias"))


def _olmoe(keys: _Keys) -> dict[str, Any]:
    return {
        "model_type": "olmoe",
        "num_experts": keys["expert_count"],
        "intermediate_size": keys.get("expert_feed_forward_length", keys["feed_forward_length"]),
        "clip_qkv": keys.get("attention.clamp_kqv"),
    }


def _gpt_oss(keys: _Keys) -> dict[str, Any]:
    rope = _rope(keys)
    if rope["rope_type"] == "yarn":  # llama.cpp's code has the rest
        rope |= {"truncate": False, "beta_fast": 32.0, "beta_slow": 1.0}
    return {
        "model_type": "gpt_oss",
        "num_local_experts": keys["expert_count"],
        "intermediate_size": keys.get("expert_feed_forward_length", keys["feed_forward_length"]),
        "sliding_window": keys["attention.sliding_window"],
        "rope_parameters": rope,
    }


def _shared_experts(keys: _Keys) -> dict[str, Any]:
    """What DeepSeek's and GLM's configs have in common."""
    return {
        "n_routed_experts": keys["expert_count"],
        "n_shared_experts": keys.get("expert_shared_count", 0),
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "intermediate_size": keys["feed_forward_length"],
        "first_k_dense_replace": keys.get("leading_dense_block_count", 0),
        "routed_scaling_factor": keys.get("expert_weights_scale", 1.0),
        "norm_topk_prob": bool(keys.get("expert_weights_norm", False)),
        "n_group": keys.get("expert_group_count", 1),
        "topk_group": keys.get("expert_group_used_count", 1),
    }


def _deepseek2(keys: _Keys) -> dict[str, Any]:
    is_v3 = keys.get("expert_gating_func", 1) == 2  # sigmoid
    rotary = keys["rope.dimension_count"]
    config = _shared_experts(keys) | {
        "model_type": "deepseek_v3" if is_v3 else "deepseek_v2",
        "num_key_value_heads": keys["attention.head_count"],  # 1 where a file has its keys absorbed
        "q_lora_rank": keys.get("attention.q_lora_rank"),
        "kv_lora_rank": keys["attention.kv_lora_rank"],
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": keys.get("attention.key_length_mla", keys["attention.key_length"]) - rotary,
        "v_head_dim": keys.get("attention.value_length_mla", keys["attention.value_length"]),
        "head_dim": rotary,
    }
    if not is_v3:
        config["topk_method"] = "group_limited_greedy" if config["n_group"] > 1 else "greedy"
    return config


def _glm4moe(keys: _Keys) -> dict[str, Any]:
    part = keys["rope.dimension_count"] / keys["attention.key_length"]
    return _shared_experts(keys) | {
        "model_type": "glm4_moe",
        "norm_topk_prob": bool(keys.get("expert_weights_norm", True)),
        "use_qk_norm": keys.has("attn_q_norm.weight"),
        "rope_parameters": _rope(keys) | {"partial_rotary_factor": part},
    }


def _granitemoe(keys: _Keys) -> dict[str, Any]:
    shared = keys.get("expert_shared_feed_forward_length")
    return {
        "model_type": "granitemoe" if shared is None else "granitemoeshared",
        "num_local_experts": keys["expert_count"],
        "intermediate_size": keys.get("expert_feed_forward_length", keys["feed_forward_length"]),
        "embedding_multiplier": keys.get("embedding_scale", 1.0),
        "residual_multiplier": keys.get("residual_scale", 1.0),
        "attention_multiplier": keys["attention.scale"],
        "logits_scaling": keys.get("logit_scale", 1.0),
    } | ({} if shared is None else {"shared_intermediate_size": shared})


def _phimoe(keys: _Keys) -> dict[str, Any]:
    rope, tensors = _rope(keys), keys.file.tensors
    if "rope_factors_long.weight" in tensors:
        factor = keys.get("rope.scaling.attn_factor", 1.0)
        rope |= {"rope_type": "longrope", "short_mscale": factor, "long_mscale": factor}
        rope |= {f"{name}_factor": tensors[f"rope_factors_{name}.weight"].data.tolist() for name in ("short", "long")}
        rope["original_max_position_embeddings"] = keys["rope.scaling.original_context_length"]
    return {
        "model_type": "phimoe",
        "num_local_experts": keys["expert_count"],
        "intermediate_size": keys.get("expert_feed_forward_length", keys["feed_forward_length"]),
        "lm_head_bias": "output.bias" in tensors,
        "sliding_window": keys.get("attention.sliding_window"),
        "rope_parameters": rope,
    }


def _minimax_m2(keys: _Keys) -> dict[str, Any]:
    part = keys["rope.dimension_count"] / keys["attention.key_length"]
    return {
        "model_type": "minimax_m2",
        "num_local_experts": keys["expert_count"],
        "intermediate_size": keys.get("expert_feed_forward_length", keys["feed_forward_length"]),
        "rope_parameters": _rope(keys) | {"partial_rotary_factor": part},
    }


ARCHITECTURES: Mapping[str, Callable[[_Keys], dict[str, Any]]] = {
    "llama": _mixtral,
    "qwen2moe": _qwen2moe,
    "qwen3moe": lambda keys: _qwen(keys, "qwen3_moe", norm_topk_prob=True),
    "olmoe": _olmoe,
    "gpt-oss": _gpt_oss,
    "deepseek2": _deepseek2,
    "glm4moe": _glm4moe,
    "granitemoe": _granitemoe,
    "phimoe": _phimoe,
    "minimax-m2": _minimax_m2,
}


def architecture_of(file: GgufLike) -> str:
    """The architecture that a file says.

    Raises:
        CheckpointError: it says none. ModelError: it has no experts, or none that Moestro reads.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise CheckpointError("the file's metadata has no general.architecture; it is no model, or damaged")
    if not file.metadata.get(f"{name}.expert_count"):
        raise ModelError(f"the file holds a dense model ({name}): there are no experts to conduct")
    if name not in ARCHITECTURES:
        raise ModelError(
            f"the file is of the architecture {name}, which Moestro does not read from GGUF; it reads "
            f"{', '.join(sorted(ARCHITECTURES))}; use the model's safetensors"
        )
    return name


def values_of(file: GgufLike) -> dict[str, Any]:
    """What a config.json for a file would say.

    Raises:
        MoestroError: the file's metadata lacks something.
    """
    architecture = architecture_of(file)
    keys = _Keys(file, architecture)
    try:
        values = _common(keys) | ARCHITECTURES[architecture](keys)
    except MoestroError:
        raise
    except Exception as error:  # metadata may hold anything
        raise CheckpointError(f"the file's metadata makes no config ({first_line(error)}); {name_config()}") from error
    # What a file does not say is the class's default, but not where that default means something else than nothing.
    kept = ("q_lora_rank", "bos_token_id", "eos_token_id", "pad_token_id")
    return {name: value for name, value in values.items() if value is not None or name in kept}
