from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

CAUSAL = "AutoModelForCausalLM"
IMAGE_TEXT = "AutoModelForImageTextToText"

COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "sliding_window": 6,
    "sliding_window_size": 6,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2,
    "moe_intermediate_size": 24,
    "intermediate_size": 40, "dense_intermediate_size": 40, "prefix_dense_intermediate_size": 40,
    "shared_intermediate_size": 16, "shared_expert_intermediate_size": 16, "shared_experts_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "mlp_only_layers": [0], "moe_layer_start_index": 1,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "n_group": 2, "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "index_n_heads": 2, "index_head_dim": 8, "index_topk": 16,
    "linear_head_dim": 8, "linear_num_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128,
    "unpadded_vocab_size": 128, "rel_extent": 16, "d_rel": 4,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
    "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 4,
    "moe_hidden_size": 16, "router_hidden_size": 16, "hc_lowrank": 8, "rotary_dim": 4, "gated_norm_rank": 4,
    "index_block_size": 4, "index_topk_blocks": 1, "index_kpool": 2,
    "num_mtp_layers": 0, "num_nextn_predict_layers": 0,
}
VISION = {
    "depth": 1, "num_hidden_layers": 1, "hidden_size": 16, "num_heads": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 16, "out_hidden_size": 32,
    "text_hidden_size": 32, "image_size": 28, "patch_size": 14, "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0], "initializer_range": 0.2,
    "adapter_in_dim": 16, "adapter_out_dim": 32, "adapter_input_size": 16, "downsample_hidden_size": 16,
    "output_proj_dims": 16, "use_clipped_linears": False, "position_embedding_size": 16, "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "output_dim": 32, "num_mel_bins":16,"feature_size":16,
    "n_mel_bins": 8, "mel_vocab_size": 16, "projection_intermediate_size": 16, "projection_hidden_dim": 16,
    "mlp_dim": 16, "output_channels": 16, "downsample_channels": [16, 16], "vocab_size": 128,
    "use_abs_pos": False, "use_rel_pos": False,
}

SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
MLA = {"num_key_value_heads": 4}
QWEN4 = LINEAR | {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4, "indexer_compress_ratio": 2, "eos_token_id": 127, "ple_layer_ids": [1], "ple_embed_dim": 8, "heads_per_ngram": 2, "split_ngram_parts": 2, "ngram_vocab_size_base": 50, "make_ngram_vocab_size_divisible_by": 8}
DOTS3 = MLA | SLIDING | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 12, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}

@dataclass(frozen=True)
class Family:
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    auto: str = CAUSAL
    type: str | None = None
    outer: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    idle: int = 0


FAMILIES: tuple[Family, ...] = (
    Family("afmoe", SLIDING),
    Family("aria", auto=IMAGE_TEXT, outer={"image_token_index": 1000}),
    Family("aria_text"),
    Family("axk1", MLA),
    Family("axk2", MLA),
    Family("bailing_hybrid", MLA | LINEAR),
    Family("beam"),
    Family("cohere2_moe", SLIDING),
    Family("deepseek_ocr2", auto=IMAGE_TEXT),
    Family("deepseek_v2", MLA),
    Family("deepseek_v3", MLA),
    Family("deepseek_v32", MLA),
    Family("deepseek_v4", {"mlp_layer_types": ["hash_moe", "moe", "moe"], "num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 8, "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"], "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}}),
    Family("diffusion_gemma", auto=IMAGE_TEXT),
    Family("dots1", SLIDING),
    Family("dots3_note", DOTS3, auto=IMAGE_TEXT, vision={"mlp_layer_types": ["dense", "sparse"], "num_hidden_layers": 2, "num_local_experts": 4, "moe_intermediate_size": 16}, idle=1),
    Family("dots3_note_text", DOTS3),
    Family("ernie4_5_moe"),
    Family("ernie4_5_vl_moe", MROPE | {"moe_intermediate_size": [24, 16]}, auto=IMAGE_TEXT, idle=2),
    Family("exaone_moe", SLIDING),
    Family("flex_olmo"),
    Family("flint", SLIDING),
    Family("gemma4", {"enable_moe_block": True, "pad_token_id": 0}, auto=IMAGE_TEXT),
    Family("gemma4_text", {"enable_moe_block": True}),
    Family("glm4_moe"),
    Family("glm4_moe_lite", MLA),
    Family("glm4v_moe", MROPE | {"head_dim": 16}, auto=IMAGE_TEXT),
    Family("glm5_next", MLA | LINEAR | {"qk_rope_head_dim": 0}, auto=IMAGE_TEXT),
    Family("glm_moe_dsa", MLA),
    Family("gpt_oss"),
    Family("granitemoe"),
    Family("granitemoe_swa"),
    Family("granitemoehybrid", LINEAR | {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_chunk_size": 4}),
    Family("granitemoeshared"),
    Family("hunyuan_v1_moe"),
    Family("hy_v3"),
    Family("hy_v4"),
    Family("inkling", type="inkling_mm_model", auto=IMAGE_TEXT, vision={"num_hidden_layers": 4, "patch_size": 4}),
    Family("inkling_text"),
    Family("inkling2", auto=IMAGE_TEXT),
    Family("inkling2_text"),
    Family("jamba", {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1}),
    Family("kimi_linear", MLA | LINEAR),
    Family("kimi_k25", MLA, auto=IMAGE_TEXT),
    Family("kolibri1", SLIDING),
    Family("laguna", SLIDING),
    Family("lfm2_moe", {"layer_types": ["conv", "full_attention", "conv"]}),
    Family("mellum", SLIDING),
    Family("mimo_v2_flash"),
    Family("minimax"),
    Family("minimax_m2"),
    Family("minimax_m3_vl", {"layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]}, auto=IMAGE_TEXT, outer={"projector_hidden_size": 16}),
    Family("minimax_m3_vl_text", {"layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]}),
    Family("mistral4", MLA, auto=IMAGE_TEXT),
    Family("mistral_large4", MLA, auto=IMAGE_TEXT),
    Family("mixtral"),
    Family("muse_spark", auto=IMAGE_TEXT, vision={"patch_sizes": [4], "hidden_sizes": [16], "depths": [1], "pos_emb_height": 4, "pos_emb_width": 4}, outer={"out_hidden_size": 64, "projector_hidden_size": 16}),
    Family("nemotron_h", {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"]}),
    Family("nemotron_h_latent", {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "moe_latent_size": 16}, type="nemotron_h"),
    Family("olmoe"),
    Family("phimoe"),
    Family("qwen2_moe"),
    Family("qwen3_5_moe", LINEAR, auto=IMAGE_TEXT),
    Family("qwen3_5_moe_text", LINEAR),
    Family("qwen3_moe"),
    Family("qwen3_next", LINEAR),
    Family("qwen3_omni_moe", type="qwen3_omni_moe_thinker", auto=IMAGE_TEXT, outer={"vision_start_token_id": 1000}),
    Family("qwen3_vl_moe", auto=IMAGE_TEXT),
    Family("qwen4_exp", QWEN4, auto=IMAGE_TEXT),
    Family("qwen4_exp_text", QWEN4),
    Family("solar_open"),
    Family("step3p7", {"pad_token_id": 0}, auto=IMAGE_TEXT),
    Family("unlimited_ocr", auto=IMAGE_TEXT),
    Family("zaya", {"num_experts_per_tok": 1, "router_hidden_size": 64}),
)

def _tiny(cls: type[PreTrainedConfig], family: Family, text: bool) -> PreTrainedConfig:
    known = inspect.signature(cls.__init__).parameters
    values = {k: v for k, v in (COMMON if text else VISION).items() if k in known}
    for key, sub in cls.sub_configs.items():
        sub = type(getattr(cls(), key)) if sub is AutoConfig else sub
        values[key] = _tiny(sub, family, "text" in key)
    if not text:
        return cls(**values | {k: v for k, v in family.vision.items() if k in known})
    return cls(**values | dict(family.outer if cls.sub_configs else family.config))


def build_config(family):
    return _tiny(CONFIG_MAPPING[family.type or family.name], family, True)


def experts_modules(model):
    return [m for m in model.modules() if hasattr(m,"has_gate") and hasattr(m,"is_transposed") and hasattr(m,"num_experts")]

@torch.no_grad()
def randomize(model, seed):
    g = torch.Generator().manual_seed(seed)
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        leaf = name.rsplit(".",1)[-1]
        if leaf == "tid2eid":
            t.copy_(torch.rand(t.shape[0], 8, generator=g).argsort(-1)[:, :t.shape[1]])
        if not t.is_floating_point(): continue
        if name in dict(model.named_buffers()) and not "bias" in leaf: continue
        if t.dim() >= 2:
            t.normal_(0, 0.2, generator=g)
        elif t.numel() and (t == t.flatten()[0]).all():
            t.add_(torch.empty_like(t).normal_(0, 0.1, generator=g))

def build_model(family, seed=0):
    cfg = build_config(family)
    torch.manual_seed(seed)
    model = getattr(transformers, family.auto).from_config(cfg, dtype=torch.float32).eval()
    randomize(model, seed)
    model.generation_config.eos_token_id = None
    return model
