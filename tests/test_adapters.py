"""LoRA adapters of the PEFT library on a loaded model: as on Transformers' own, also after steps were captured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from families import save_model
from moestro import MoestroConfig
from moestro.errors import ModelError

HEADS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2}
WAYS: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu"},
    "cpu, dense layers in torch": {"device": "cpu", "pack_dense": False},
    "emulated": {"device": "emulated", "policy": "lru", "gpu_memory": "600KiB", "context": 64},
}
TRIED = [
    ("cpu", ["q_proj", "v_proj"], True),
    ("cpu", ["lm_head", "o_proj"], False),
    ("cpu, dense layers in torch", ["q_proj", "k_proj", "v_proj", "o_proj"], True),
    ("emulated", ["q_proj", "v_proj"], False),
    ("emulated", ["k_proj", "o_proj", "lm_head"], True),
]


def _tokens(model: Any, cache: str | None) -> Tensor:
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "cache_implementation": cache}
    return model.generate(input_ids=torch.arange(5, 12)[None], **options)[0, 7:]


@pytest.mark.sample(3)
@pytest.mark.parametrize(("way", "targets", "used_before"), TRIED)
def test_adapters(way: str, targets: list[str], used_before: bool, tmp_path: Path) -> None:
    """Put on, switched off and on, scaled, replaced by another, and taken off."""
    adapters = []
    (tmp_path / "model").mkdir()
    reference = save_model("qwen2_moe", tmp_path / "model", HEADS)
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        adapters.append(tmp_path / f"adapter{seed}")
        made = get_peft_model(reference, config)
        made.save_pretrained(adapters[-1])
        reference = made.unload()
    settings = MoestroConfig(threads=1, **WAYS[way])
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, quantization_config=settings, experts_implementation="moestro"
    )
    cache = "static" if way == "emulated" else None
    if used_before:
        _tokens(model, cache)
        _tokens(model, cache)
    ours, theirs = (PeftModel.from_pretrained(m, adapters[0]) for m in (model, reference))

    def same(what: str) -> None:
        wanted = _tokens(theirs, None)
        for _ in range(1 if cache is None else 2):
            assert torch.equal(_tokens(ours, cache), wanted), what

    same("on")
    with ours.disable_adapter(), theirs.disable_adapter():
        same("off")
    same("on again")
    for each in (ours, theirs):
        for module in each.modules():
            if hasattr(module, "scale_layer"):
                module.scale_layer(2.0)
    same("scaled")
    for each in (ours, theirs):
        each.load_adapter(adapters[1], adapter_name="second")
        each.set_adapter("second")
    same("another")
    theirs.merge_adapter()
    if way == "cpu":
        with pytest.raises(ModelError, match="packed weight"):
            ours.merge_adapter()
        theirs.unmerge_adapter()
    else:
        ours.merge_adapter()
        same("merged")
        for each in (ours, theirs):
            each.unmerge_adapter()
    ours, theirs = ours.unload(), theirs.unload()
    same("taken off")
    model.moestro.close()
