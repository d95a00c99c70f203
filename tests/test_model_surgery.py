"""Changes of a loaded model that need more than setting an attribute, against the same on Transformers' model."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from families import EXPERTS, save_model
from moestro import load
from moestro.errors import ModelError, MoestroError

HEADS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2}
HEADS |= {"num_experts_per_tok": EXPERTS}
ON_CPU: dict[str, Any] = {"device": "cpu", "threads": 1, "dtype": "float32"}


@pytest.fixture
def models(tmp_path: Path) -> Any:
    """Transformers' and ours."""
    return save_model("qwen3_moe", tmp_path, HEADS).requires_grad_(False), load(str(tmp_path), **ON_CPU)


@torch.no_grad()
def _logits(model: Any, between: Callable[[Any], None] = lambda cache: None, position: Any = None) -> Tensor:
    cache, parts = DynamicCache(config=getattr(model, "config", None)), []
    parts.append(model(torch.arange(40, 46)[None], past_key_values=cache).logits[:, -1:])
    for token in (46, 47, 48):
        between(cache)
        given = {} if position is None else {"position_ids": torch.tensor([[position]])}
        parts.append(model(torch.tensor([[token]]), past_key_values=cache, **given).logits)
    return torch.cat(parts, 1)


def _same(models: Any, *args: Any, **kwargs: Any) -> None:
    theirs, ours = (_logits(model, *args, **kwargs) for model in models)
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm(), float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "qwen2_moe", "gpt_oss", "granitemoe"])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_model_that_goes_is_freed_at_once(family: str, device: str, tmp_path: Path) -> None:
    save_model(family, tmp_path, HEADS)
    model = load(str(tmp_path), **ON_CPU | {"device": device, "context": 32})
    with torch.no_grad():
        model.generate(torch.arange(4, 9)[None], max_new_tokens=3, do_sample=False, eos_token_id=None)
    gc.collect()
    gc.disable()
    try:
        there = [weakref.ref(model.moestro.store), weakref.ref(model.get_decoder()), weakref.ref(model)]
        del model
        assert [find() is None for find in there] == [True] * 3
    finally:
        gc.enable()


WHERE = ["self_attn", "self_attn.q_norm", "input_layernorm", "mlp", "mlp.experts", "mlp.experts.act_fn"]


@pytest.mark.parametrize("name", ["norm", "rotary_emb", *(f"layers.1.{place}" for place in WHERE)])
def test_a_module_of_another_class(models: Any, name: str) -> None:
    _same(models)
    for model in models:
        module = model.model.get_submodule(name)
        kind = type(module)

        def forward(self: Any, *args: Any, kind: Any = kind, **kwargs: Any) -> Any:
            output = kind.forward(self, *args, **kwargs)
            return (
                tuple(part * 1.5 if isinstance(part, Tensor) else part for part in output)
                if isinstance(output, tuple)
                else output * 1.5
            )

        module.__class__ = type("Other", (kind,), {"forward": forward})
    _same(models)


@pytest.mark.parametrize("name", ["layers.0.input_layernorm", "layers.1.mlp.gate", "layers.0.self_attn.q_norm", "norm"])
def test_a_weight_seen_through_other_strides(models: Any, name: str) -> None:
    """At the same address, with as many elements."""
    for model in models:
        weight = model.model.get_submodule(name).weight
        weight.data = weight.data[..., :1].expand(weight.shape)
    _same(models)


CACHE_EDITS: dict[str, Callable[[Any], Any]] = {
    "data": lambda layer: setattr(layer.keys, "data", layer.keys.data * 0.5),
    "set_": lambda layer: layer.values.set_(layer.values * 0.5),
    "swapped": lambda layer: torch.utils.swap_tensors(layer.keys, layer.keys * 0.5),
    "in place": lambda layer: layer.keys.mul_(0.5),
    "strides": lambda layer: layer.keys.as_strided_(layer.keys.shape, (0, 0, layer.keys.stride(2), 1)),
}


@pytest.mark.parametrize("edit", CACHE_EDITS)
def test_a_cache_that_is_edited_between_steps(models: Any, edit: str) -> None:
    _same(models, lambda cache: [CACHE_EDITS[edit](layer) for layer in cache.layers])


@contextmanager
def _global_hook(kind: type, before: bool) -> Iterator[None]:
    register = nn.modules.module.register_module_forward_pre_hook if before else None
    register = register or nn.modules.module.register_module_forward_hook
    scale = (lambda m, args: tuple(a * 1.3 for a in args)) if before else (lambda m, args, output: output * 1.3)
    handle = register(lambda module, *rest: scale(module, *rest) if isinstance(module, kind) else None)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("before", [True, False])
def test_a_hook_of_all_modules_on_an_activation(models: Any, before: bool) -> None:
    with _global_hook(type(models[0].model.layers[1].mlp.experts.act_fn), before):
        _same(models)
    _same(models)


def test_copies_of_parts_stand_on_their_own(models: Any) -> None:
    """A copy computes with its own weights, by Transformers' code, and what is copied stays as it was."""
    model = models[1]
    for name in ("model.norm", "model.rotary_emb", "model.layers.1.self_attn", "model.layers.1.mlp.gate", "lm_head"):
        copied = copy.deepcopy(model.get_submodule(name))
        for ours, theirs in zip(copied.parameters(), models[0].get_submodule(name).parameters(), strict=True):
            assert torch.equal(ours, theirs)
        for each, root in ((copied, model), (copy.deepcopy(models[0].get_submodule(name)), models[0])):
            for parameter in each.parameters():
                parameter.data.mul_(1.5)
            parent, _, leaf = name.rpartition(".")
            setattr(root.get_submodule(parent), leaf, each)
        _same(models)
    with pytest.raises(ModelError):
        copy.deepcopy(model.model.layers[1])  # which has experts
    with pytest.raises(ModelError):
        copy.deepcopy(model.model)


@pytest.mark.parametrize("what", ["input_layernorm", "lm_head", "gate", "q_norm"])
def test_modules_that_an_adapter_saves(models: Any, what: str, tmp_path: Path) -> None:
    reference, model = models
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=[what], init_lora_weights=False)
    made = get_peft_model(copy.deepcopy(reference), config)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    made.save_pretrained(tmp_path / "adapter")
    _same([PeftModel.from_pretrained(each, tmp_path / "adapter").requires_grad_(False) for each in (reference, model)])


def test_adapters_of_expert_parameters_are_refused(models: Any, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    get_peft_model(copy.deepcopy(models[0]), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(MoestroError, match="store"):
        PeftModel.from_pretrained(models[1], tmp_path / "adapter")


def test_the_model_inside_answers_as_the_one_around_it(models: Any, tmp_path: Path) -> None:
    reference, model = (each.model for each in models)
    assert model.num_parameters() == reference.num_parameters()
    for action in (copy.deepcopy, lambda m: m.save_pretrained(tmp_path / "inner"), lambda m: m.half()):
        with pytest.raises(ModelError):
            action(model)
    for action in (lambda m: torch.save(m.state_dict(), tmp_path / "part"), lambda m: m.to(torch.bfloat16)):
        with pytest.raises(ModelError):
            action(model)
    _same(models)


@pytest.mark.parametrize("position", [6.5, 6, 1000, -3])
def test_positions(models: Any, position: float) -> None:
    _same(models, position=position)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_an_attention_that_is_registered_anew(device: str, tmp_path: Path) -> None:
    reference = save_model("qwen3_moe", tmp_path, HEADS)
    model = load(str(tmp_path), **ON_CPU | {"device": device, "context": 64})
    name, pair = model.config._attn_implementation, (reference, model)
    original = ALL_ATTENTION_FUNCTIONS[name]
    _same(pair)

    def doubled(*args: Any, **kwargs: Any) -> Any:
        output, weights = original(*args, **kwargs)
        return output * 2, weights

    try:
        AttentionInterface.register(name, doubled)
        _same(pair)
    finally:
        AttentionInterface.register(name, original)
    _same(pair)


def test_a_packed_weight_gives_nothing_away(models: Any, tmp_path: Path) -> None:
    """No call writes to it, reads foreign memory or dies."""
    model = models[1]
    for layer in (model.lm_head, model.model.layers[0].self_attn.q_proj):
        weight = layer.weight
        assert torch.equal(torch.tensor(weight.tolist()), weight.clone())
        writes: list[Callable[[], Any]] = [
            lambda w=weight: w.apply_(lambda value: 0.0),
            lambda w=weight: w.map_(w.clone(), lambda a, b: 0.0),
            lambda w=weight: w.share_memory_(),
            lambda w=weight: torch.from_dlpack(w),
            lambda w=weight: np.from_dlpack(w),
            lambda w=weight: w.untyped_storage(),
            lambda w=weight: w.data_ptr(),
            lambda layer=layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
            lambda layer=layer: delattr(layer, "weight"),
        ]
        for write in writes:
            with pytest.raises((MoestroError, BufferError, TypeError)):
                write()
        torch.from_numpy(np.array(weight.numpy())).zero_()
    _same(models)
