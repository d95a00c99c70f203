"""Tiny random models of every Transformers family whose experts go through its experts interface.

This file decides, per family, the smallest configuration that still has what the family is known for: at
least two routed layers, a dense layer and a second kind of attention where the family mixes them, top-2 of
8 experts (top-1 where the family allows nothing else), an expert width that is no multiple of 64. It also
decides the weights: random and large enough that every expert counts in the logits. One table,
`FAMILIES`, feeds one runner; a new family is one more line.

It does not know Moestro, and knows nothing of a family's real sizes, its tokenizer, or its image and audio
inputs: multimodal families are built whole, with towers of one layer, and run on token ids alone. An entry
is named after its folder in `transformers.models`; a name with something appended is a second way to build
that family (its text part alone, or a layout that the first entry does not have).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

Values = Mapping[str, Any]

EXPERTS = 8
VOCABULARY = 128
CAUSAL = "AutoModelForCausalLM"
IMAGE_TEXT = "AutoModelForImageTextToText"

# Every spelling that the text configurations use; a configuration takes those that it has a field for.
COMMON: Values = {
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "topk_group"), 1),
    **dict.fromkeys(("intermediate_size", "dense_intermediate_size", "prefix_dense_intermediate_size"), 40),
    **dict.fromkeys(("shared_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("moe_hidden_size", "router_hidden_size", "rel_extent"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim", "swa_head_dim"), 8),
    **dict.fromkeys(("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim"), 8),
    **dict.fromkeys(("ssm_state_size", "mamba_d_state", "hidden_size_per_layer_input", "hc_lowrank"), 8),
    **dict.fromkeys(("num_attention_heads", "swa_num_attention_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("linear_num_value_heads", "qk_rope_head_dim", "rotary_dim", "d_rel"), 4),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "index_block_size", "gated_norm_rank"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("linear_num_heads", "index_n_heads", "n_group", "n_groups", "index_kpool"), 2),
    # Longer than the sequences of the tests: an indexer scores many positions exactly 0, and which of equal
    # scores it takes depends on the length that it is called with, so greedy tokens would not be comparable.
    "index_topk": 16,
    "index_topk_blocks": 1,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "mlp_only_layers": [0],
    "moe_intermediate_size": 24,
    "max_position_embeddings": 64,
    # Shorter than the sequences of the tests, so that the window is felt.
    **dict.fromkeys(("sliding_window", "sliding_window_size"), 6),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    **dict.fromkeys(("num_mtp_layers", "num_nextn_predict_layers"), 0),
}

# The same for vision and audio towers, which no test runs and every multimodal checkpoint has.
TOWER: Values = {
    **dict.fromkeys(("depth", "num_hidden_layers", "encoder_layers"), 1),
    **dict.fromkeys(("num_heads", "num_attention_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("hidden_size", "d_model", "intermediate_size", "encoder_ffn_dim", "mlp_dim"), 16),
    **dict.fromkeys(("adapter_in_dim", "adapter_input_size", "downsample_hidden_size"), 16),
    **dict.fromkeys(("projection_intermediate_size", "projection_hidden_dim"), 16),
    **dict.fromkeys(("output_proj_dims", "output_channels"), 16),
    **dict.fromkeys(("num_position_embeddings", "position_embedding_size", "moe_intermediate_size"), 16),
    **dict.fromkeys(("num_mel_bins", "feature_size", "mel_vocab_size"), 16),
    **dict.fromkeys(("out_hidden_size", "text_hidden_size", "adapter_out_dim", "output_dim"), 32),
    **dict.fromkeys(("head_dim", "n_mel_bins"), 8),
    **dict.fromkeys(("pos_emb_height", "pos_emb_width", "num_local_experts"), 4),
    **dict.fromkeys(("use_abs_pos", "use_rel_pos", "use_clipped_linears"), False),
    "image_size": 28,
    "patch_size": 14,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "downsample_channels": [16, 16],
    "deepstack_visual_indexes": [0],
}

SLIDING: Values = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LINEAR: Values = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
# Multi-head latent attention expands its latent to one key and value for each query head.
MLA: Values = {"num_key_value_heads": 4}
MROPE: Values = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
BLOCK_SPARSE: Values = {"layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]}
GEMMA4: Values = {"enable_moe_block": True, "pad_token_id": 0}
# These are not fields: dots3_note takes the shape of its sliding layers from checkpoint spellings.
DOTS3: Values = {
    **MLA,
    **SLIDING,
    **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 4),
    **dict.fromkeys(("swa_qk_nope_head_dim", "swa_v_head_dim"), 8),
    **dict.fromkeys(("swa_q_lora_rank", "swa_kv_lora_rank"), 16),
    "swa_head_dim": 12,
}
DEEPSEEK_V4: Values = {
    "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    "mlp_layer_types": ["hash_moe", "moe", "moe"],
    "num_key_value_heads": 1,
    "o_groups": 2,
    "o_lora_rank": 8,
}
QWEN4: Values = {
    **LINEAR,
    **dict.fromkeys(("indexer_n_heads", "indexer_compress_ratio", "heads_per_ngram", "split_ngram_parts"), 2),
    **dict.fromkeys(("indexer_head_dim", "ple_embed_dim", "make_ngram_vocab_size_divisible_by"), 8),
    "indexer_kv_heads": 1,
    "indexer_budget": 16,
    "ngram_vocab_size_base": 50,
    "ple_layer_ids": [1],
    # Its n-gram embeddings, which every token id goes through, need one.
    "eos_token_id": VOCABULARY - 1,
}
NEMOTRON: Values = {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"]}
DOTS3_TOWER: Values = {"mlp_layer_types": ["dense", "sparse"], "num_hidden_layers": 2}
# Its configuration has no field for this token id, which its generate reads.
OMNI: Values = {"vision_start_token_id": 1000}
MUSE: Values = {"out_hidden_size": 64, "projector_hidden_size": 16}
MUSE_TOWER: Values = {"patch_sizes": [4], "hidden_sizes": [16], "depths": [1]}


@dataclass(frozen=True)
class Family:
    """How one entry deviates from `COMMON` and `TOWER`."""

    name: str
    config: Values = field(default_factory=dict)  # of the text configuration
    auto: str = CAUSAL
    model_type: str = ""  # where it is not the name
    outer: Values = field(default_factory=dict)  # of the configuration around text and towers
    tower: Values = field(default_factory=dict)  # of those towers that have such a field
    idle: int = 0  # experts modules that token ids alone never reach


YARN: Values = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False}

FAMILIES: tuple[Family, ...] = (
    Family("afmoe", SLIDING),
    # Its default image token is an ordinary token of a vocabulary this small.
    Family("aria", auto=IMAGE_TEXT, outer={"image_token_index": 1000}),
    Family("aria_text"),
    Family("axk1", MLA),
    Family("axk2", MLA),
    Family("bailing_hybrid", {**MLA, **LINEAR}),
    Family("beam"),
    Family("cohere2_moe", SLIDING),
    Family("deepseek_ocr2", auto=IMAGE_TEXT),
    Family("deepseek_v2", MLA),
    Family("deepseek_v3", MLA),
    Family("deepseek_v32", MLA),
    Family("deepseek_v4", DEEPSEEK_V4),
    Family("dots1", SLIDING),
    Family("dots3_note", DOTS3, IMAGE_TEXT, tower=DOTS3_TOWER, idle=1),
    Family("dots3_note_text", DOTS3),
    Family("ernie4_5_moe"),
    Family("ernie4_5_vl_moe", {**MROPE, "moe_intermediate_size": [24, 16]}, IMAGE_TEXT, idle=2),
    Family("exaone_moe", SLIDING),
    Family("flex_olmo"),
    Family("flint", SLIDING),
    Family("gemma4", GEMMA4, IMAGE_TEXT),
    Family("gemma4_text", GEMMA4),
    Family("glm4_moe"),
    Family("glm4_moe_lite", MLA),
    Family("glm4v_moe", {**MROPE, "head_dim": 16}, IMAGE_TEXT),
    Family("glm5_next", {**MLA, **LINEAR, "qk_rope_head_dim": 0}, IMAGE_TEXT),
    Family("glm_moe_dsa", MLA),
    # As its checkpoints: YaRN, whose factor is in the length already.
    Family("gpt_oss", {"rope_parameters": {**YARN, "rope_theta": 150000.0}}),
    Family("granitemoe"),
    Family("granitemoe_swa"),
    Family("granitemoehybrid", {**LINEAR, "mamba_n_heads": 8}),
    Family("granitemoeshared"),
    Family("hunyuan_v1_moe"),
    Family("hy_v3"),
    Family("hy_v4"),
    # A vision tower with fewer layers than its patches have prime factors needs SciPy.
    Family("inkling", {}, IMAGE_TEXT, "inkling_mm_model", tower={"num_hidden_layers": 4, "patch_size": 4}),
    Family("inkling_text"),
    Family("inkling2", auto=IMAGE_TEXT),
    Family("inkling2_text"),
    Family("jamba", {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1}),
    Family("kimi_k25", MLA, IMAGE_TEXT),
    Family("kimi_linear", {**MLA, **LINEAR}),
    Family("kolibri1", SLIDING),
    Family("laguna", SLIDING),
    Family("lfm2_moe", {"layer_types": ["conv", "full_attention", "conv"]}),
    Family("mellum", SLIDING),
    Family("mimo_v2_flash"),
    Family("minimax"),
    Family("minimax_m2"),
    Family("minimax_m3_vl", BLOCK_SPARSE, IMAGE_TEXT, outer={"projector_hidden_size": 16}),
    Family("minimax_m3_vl_text", BLOCK_SPARSE),
    Family("mistral4", MLA, IMAGE_TEXT),
    Family("mistral_large4", MLA, IMAGE_TEXT, outer={"image_token_index": 1000}),
    Family("mixtral"),
    Family("muse_spark", {}, IMAGE_TEXT, outer=MUSE, tower=MUSE_TOWER),
    Family("nemotron_h", NEMOTRON),
    Family("nemotron_h_latent", {**NEMOTRON, "moe_latent_size": 16}, model_type="nemotron_h"),
    Family("olmoe"),
    Family("phimoe"),
    Family("qwen2_moe"),
    Family("qwen3_5_moe", LINEAR, IMAGE_TEXT),
    Family("qwen3_5_moe_text", LINEAR),
    Family("qwen3_moe"),
    Family("qwen3_next", LINEAR),
    Family("qwen3_omni_moe", {"sliding_window": None}, IMAGE_TEXT, "qwen3_omni_moe_thinker", OMNI),
    Family("qwen3_vl_moe", auto=IMAGE_TEXT),
    Family("qwen4_exp", QWEN4, IMAGE_TEXT),
    Family("qwen4_exp_text", QWEN4),
    Family("solar_open"),
    Family("unlimited_ocr", auto=IMAGE_TEXT),
    Family("zaya", {"num_experts_per_tok": 1, "router_hidden_size": 32}),
)

# The table is of the Transformers that constraints.txt pins. An older one lacks some, which are left out there.
CONSTRAINTS = (Path(__file__).parents[1] / "constraints.txt").read_text("utf-8")
TABLE_OF = Version(re.findall(r"^transformers==(\S+)", CONSTRAINTS, re.MULTILINE)[0])
INSTALLED = Version(transformers.__version__)
if INSTALLED < TABLE_OF:
    FAMILIES = tuple(family for family in FAMILIES if (family.model_type or family.name) in CONFIG_MAPPING)

# Their forward goes through the interface like any other, but they have no greedy text to compare.
FORWARD_ONLY: tuple[Family, ...] = (Family("openai_privacy_filter", auto="AutoModelForTokenClassification"),)

_UNDECORATED = "its experts class is not decorated with use_experts_implementation"
UNSUPPORTED: dict[str, str] = {
    "diffusion_gemma": "not autoregressive, and its encoder and decoder share their experts, which Moestro refuses",
    "openai_privacy_filter": "not autoregressive: it classifies tokens and has no generate",
    "qwen3_omni_moe with its talker": "the whole has no forward of its own, and its talker answers in audio",
    **dict.fromkeys(("dbrx", "doge", "jetmoe", "llama4", "longcat_flash"), _UNDECORATED),
    **dict.fromkeys(("nllb_moe", "step3p7", "switch_transformers", "vitpose_backbone"), _UNDECORATED),
}


def decorated_folders() -> set[str]:
    """The folders of the installed `transformers.models` that have an experts class behind the interface."""
    files = Path(inspect.getfile(transformers)).parent.glob("models/*/modeling_*.py")
    return {file.parent.name for file in files if "\n@use_experts_implementation" in file.read_text("utf-8")}


def _tiny(config_class: type[PreTrainedConfig], family: Family, text: bool) -> PreTrainedConfig:
    known = inspect.signature(config_class.__init__).parameters
    parts = config_class.sub_configs
    values = {key: value for key, value in (COMMON if text else TOWER).items() if key in known}
    for key, part in parts.items():
        # `AutoConfig` leaves the part's type open; what the whole takes by default is what checkpoints have.
        part_class = type(getattr(config_class(), key)) if part is AutoConfig else part
        values[key] = _tiny(part_class, family, text="text" in key)
    if text:
        return config_class(**{**values, **(family.outer if parts else family.config)})
    return config_class(**{**values, **{key: value for key, value in family.tower.items() if key in known}})


def build_config(family: Family) -> PreTrainedConfig:
    return _tiny(CONFIG_MAPPING[family.model_type or family.name], family, text=True)


@torch.no_grad()
def _randomize(model: PreTrainedModel, seed: int) -> None:
    """Redraws what Transformers leaves small or constant, where a lost expert or bias would not show."""
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            # The experts of each token id, where a router looks them up instead of scoring: distinct ones.
            experts = torch.rand(buffer.shape[0], EXPERTS, generator=generator).argsort(-1)
            buffer.copy_(experts[:, : buffer.shape[1]])
        elif "bias" in name.rpartition(".")[2]:
            # Correction biases of routers, well below the scores of a softmax over 8, or they alone decide.
            # Zaya's -1 stays: from_pretrained writes it over whatever the checkpoint has.
            noise = torch.empty_like(buffer).normal_(0, 0.03, generator=generator)
            buffer.copy_(torch.where(buffer == 0, noise, buffer))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            # Zaya scores through an MLP, whose outputs would otherwise be alike for all tokens.
            std = 0.6 if "router_mlp" in name else 0.2
            parameter.normal_(0, std, generator=generator)
        elif bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))


def build_model(family: Family, seed: int = 0) -> PreTrainedModel:
    """A random model in float32 and eval mode whose greedy text never ends early."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto = getattr(transformers, family.auto)
        model: PreTrainedModel = auto.from_config(build_config(family), dtype=torch.float32).eval()
    _randomize(model, seed)
    if model.can_generate():
        model.generation_config.eos_token_id = None
    return model


def random_ids(batch: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    """Token ids that are special in no family here."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY - 28, (batch, length), generator=generator)


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """By name, the modules whose class `use_experts_implementation` decorates."""
    marks = ("has_gate", "is_transposed", "num_experts")
    return {name: module for name, module in model.named_modules() if all(hasattr(module, m) for m in marks)}


def experts_calls(family: Family, model: nn.Module) -> int:
    """How often one forward on token ids goes through the experts interface."""
    return len(experts_modules(model)) - family.idle


@torch.no_grad()
def reference_logits(family: Family, model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits by the loop over experts in each family's own file; it works in every family of this table.

    The model is left with that implementation, so give it a model of its own.
    """
    model.set_experts_implementation("eager")
    logits: torch.Tensor = model(input_ids).logits
    return logits


def save_model(name: str, path: Path, sizes: dict[str, int] | None = None, **changes: Any) -> Any:
    """A small random model of a family saved at `path`, and the same in memory.

    sizes, changes: of its config, before it is built and after.
    """
    family = next(f for f in FAMILIES if f.name == name)
    model = build_model(replace(family, config={**family.config, **(sizes or {})}))
    for key, value in changes.items():
        setattr(model.config, key, value)
    model.tie_weights()
    model.save_pretrained(path)
    return model.eval()
