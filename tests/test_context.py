"""The model's context: for every kind of RoPE scaling, as a table and as text at its edge, against Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from families import FAMILIES, build_config, random_ids, save_model
from moestro import MoestroError, load
from moestro.loading.context import model_context
from moestro.text.generation import check_context

LENGTH, FACTOR = 64, 3.0
HALF = 4  # frequencies of a head of 8
KINDS = sorted({"default", *ROPE_INIT_FUNCTIONS})

# What a kind needs beside its factor.
MORE: dict[str, dict[str, Any]] = {
    "longrope": {"short_factor": [1.0] * HALF, "long_factor": [2.0] * HALF},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


def _rope(kind: str, original: int | None) -> dict[str, Any]:
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": FACTOR, **MORE.get(kind, {})}
    if kind == "default":
        del rope["factor"]
    return rope if original is None else {**rope, "original_max_position_embeddings": original}


def _mixtral(**values: Any) -> Any:
    base = {"model_type": "mixtral", "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8}
    return AutoConfig.for_model(**{**base, "max_position_embeddings": LENGTH, **values})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    ("named", "original"),
    [(LENGTH, LENGTH), (LENGTH, None), (LENGTH * 3, LENGTH), (LENGTH * 5, LENGTH), (LENGTH, LENGTH // 4)],
    ids=["not written in", "no original", "written in", "longer by itself", "an original far below"],
)
def test_every_kind_of_scaling(kind: str, key: str, named: int, original: int | None) -> None:
    rope = _rope(kind, original)
    values = {key: rope, "max_position_embeddings": named}
    if key == "rope_scaling":
        values["rope_theta"] = rope.pop("rope_theta")
    scaled = int((original or named) * FACTOR) if kind != "default" else named
    assert model_context(_mixtral(**values)) == max(named, scaled)


@pytest.mark.parametrize("kind", KINDS)
def test_scaling_of_one_type_of_layer_and_of_a_text_model_within(kind: str) -> None:
    """Layers with a window have their own RoPE, which limits nothing."""
    nested = {"full_attention": _rope(kind, LENGTH), "sliding_attention": _rope("default", None)}
    longest = LENGTH if kind == "default" else LENGTH * FACTOR
    by_layer = build_config(next(f for f in FAMILIES if f.name == "laguna"))
    by_layer.rope_parameters = nested
    assert model_context(by_layer) == longest
    whole = build_config(next(f for f in FAMILIES if f.name == "qwen3_vl_moe"))
    whole.text_config.rope_parameters = _rope(kind, LENGTH)
    assert model_context(whole) == longest


def test_published_configs() -> None:
    """As these checkpoints' cards say."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e6}
    qwen3 = _mixtral(
        max_position_embeddings=40960, rope_scaling={**yarn, "factor": 4.0, "original_max_position_embeddings": 32768}
    )
    deepseek = _mixtral(
        max_position_embeddings=163840, rope_scaling={**yarn, "factor": 40, "original_max_position_embeddings": 4096}
    )
    assert [model_context(config) for config in (qwen3, deepseek)] == [131072, 163840]
    assert model_context(PreTrainedConfig()) is None


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_text_across_the_length_of_training_is_transformers_own(kind: str, tmp_path: Path) -> None:
    """Some kinds change their frequencies there, between two tokens of one text."""
    save_model("mixtral", tmp_path, {"num_hidden_layers": 2}, rope_parameters=_rope(kind, LENGTH))
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    model = load(str(tmp_path), device="cpu", dtype="float32", threads=1)
    for start in (LENGTH - 6, 9, LENGTH + 20, LENGTH - 6):
        ids = random_ids(1, start)
        reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert torch.equal(model.generate(ids, **greedy), reference.generate(ids, **greedy))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_text_up_to_the_edge_is_transformers_own(kind: str, tmp_path: Path) -> None:
    save_model("mixtral", tmp_path, {"num_hidden_layers": 2}, rope_parameters=_rope(kind, LENGTH))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    context = LENGTH if kind == "default" else int(LENGTH * FACTOR)
    greedy = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    ids = random_ids(1, context - 3)
    expected = reference.generate(ids, **greedy)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    how = {"device": "emulated", "gpu_memory": "64MiB", "dtype": "float32", "threads": 1}
    model = load(str(tmp_path), context=context, **how)
    assert check_context(model, context - 3, 8) == 3
    short = ids[:, : LENGTH + 9]  # first, when nothing longer was read by the model, only planned for
    assert torch.allclose(model(short.to(model.device)).logits.cpu(), reference(short).logits, atol=1e-4)
    assert torch.equal(model.generate(ids.to(model.device), **greedy).cpu(), expected)
    with pytest.raises(MoestroError, match=f"the prompt has {context} tokens, but the model's context is {context}"):
        check_context(model, context, 1)
    with pytest.raises(MoestroError, match=f"context={context + 1}, but the model's context is {context}"):
        load(str(tmp_path), context=context + 1, **how)


def test_a_factor_that_its_kind_does_not_know_stretches_nothing() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "factor": 4.0}
    assert model_context(_mixtral(rope_parameters=rope, max_position_embeddings=LENGTH)) == LENGTH
