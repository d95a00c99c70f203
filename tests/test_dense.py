"""Packed dense layers and bits: against Transformers with the weights that the formats hold."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from families import FAMILIES, build_model
from moestro import MoestroConfig, load
from moestro.assembly import home
from moestro.attention import append, fuse_attention
from moestro.compute.cpu import levels
from moestro.dense import PackedEmbedding, PackedLinear
from moestro.errors import RequestError
from moestro.families import expert_modules
from moestro.fuse import fuse
from moestro.fused_norm import FusedRmsNorm

# Four query heads on two key heads of 16.
HEADS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
needs_kernels = pytest.mark.skipif(not levels(), reason="built without the kernels: no compiler was there")
ON_CPU: dict[str, Any] = {"device": "cpu", "threads": 1, "dtype": "float32"}


def _save(name: str, path: Path, sizes: dict[str, int] | None = None, **changes: Any) -> Any:
    """A small random model of a family on disk, and the same in memory."""
    family = next(f for f in FAMILIES if f.name == name)
    model = build_model(dataclasses.replace(family, config={**family.config, **(sizes or {})}))
    for key, value in changes.items():
        setattr(model.config, key, value)
    model.tie_weights()
    model.save_pretrained(path)
    return model.eval()


@torch.no_grad()
def _as_packed(reference: Any, ours: Any) -> None:
    """Give the reference the weights that our packed ones stand for."""
    for name, module in ours.named_modules():
        if isinstance(module, PackedLinear | PackedEmbedding):
            reference.get_submodule(name).weight = nn.Parameter(module.weight)
    for name, module in expert_modules(ours).items():
        layer = module._moestro
        math = layer.conductor.math[layer.index]
        target = reference.get_submodule(name)
        for e in range(layer.layout.experts):
            packed = home(layer.conductor, layer.index, e)
            expert = math.format.unpack(packed, math.shape, range(math.shape.neurons), torch.float32)
            target.gate_up_proj[e] = torch.cat((expert.gate, expert.up))
            target.down_proj[e] = expert.down


@needs_kernels
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])  # the second has shared experts
@torch.no_grad()
def test_logits_at_fewer_bits(family: str, bits: int, tmp_path: Path) -> None:
    reference = _save(family, tmp_path)
    ours = load(str(tmp_path), bits=bits, **ON_CPU)
    _as_packed(reference, ours)
    for tokens in (1, 30):
        ids = torch.randint(3, 100, (2, tokens))
        a, b = ours(ids).logits, reference(ids).logits
        assert (a - b).norm() / b.norm() <= 1e-3


@needs_kernels
def test_each_part_has_its_own_bits(tmp_path: Path) -> None:
    _save("qwen2_moe", tmp_path)
    model = load(str(tmp_path), bits=16, expert_bits=4, dense_bits=8, **ON_CPU)
    assert {math.format.name for math in model.moestro.math} == {"int4"}
    formats = {name: m.fmt.name for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert formats.pop("lm_head") == "bf16"
    assert set(formats.values()) == {"int8"}
    assert any("shared_expert" in name for name in formats)
    assert not any(name.endswith("mlp.gate") for name in formats)  # routers are never packed


@needs_kernels
def test_a_tied_embedding_and_head_share_one_copy(tmp_path: Path) -> None:
    reference = _save("mixtral", tmp_path, tie_word_embeddings=True)
    model = load(str(tmp_path), head_bits=8, **ON_CPU)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    assert isinstance(head, PackedLinear)
    assert embedding.packed.data_ptr() == head.packed.data_ptr()
    _as_packed(reference, model)
    ids = torch.randint(3, 100, (2, 300))
    assert torch.equal(embedding(ids), reference.get_input_embeddings()(ids))


@needs_kernels
def test_originals_are_freed(tmp_path: Path) -> None:
    _save("mixtral", tmp_path)
    model = load(str(tmp_path), bits=8, **ON_CPU)
    assert not [name for name, m in model.named_modules() if type(m) is nn.Linear]
    assert not [name for name, p in model.named_parameters() if p.dim() == 2 and "gate" not in name]


@needs_kernels
def test_gradients_are_refused(tmp_path: Path) -> None:
    _save("mixtral", tmp_path)
    head = load(str(tmp_path), **ON_CPU).get_output_embeddings()
    with pytest.raises(Exception, match="inference"):
        head(torch.randn(1, head.in_features, requires_grad=True))


@pytest.mark.parametrize("option", ["bits", "expert_bits", "dense_bits", "head_bits"])
def test_other_bits_are_refused(option: str) -> None:
    with pytest.raises(RequestError, match=f"--{option.replace('_', '-')} 5: there are 16, 8, 4"):
        MoestroConfig(**{option: 5})


@pytest.mark.parametrize("option", ["dense_bits", "head_bits"])
def test_dense_bits_need_the_cpu(option: str) -> None:
    with pytest.raises(RequestError, match="needs the dense layers on the CPU"):
        load("demo", device="emulated", threads=1, **{option: 8})


def test_experts_at_4_bits_on_the_emulated_gpu(tmp_path: Path) -> None:
    _save("mixtral", tmp_path)
    ids = torch.randint(3, 100, (1, 5))
    logits = []
    for device in ("emulated", "cpu"):
        model = load(str(tmp_path), device=device, policy="layer-split", expert_bits=4, dtype="float32", threads=1)
        with torch.no_grad():
            logits.append(model(ids).logits)
        model.moestro.close()
    assert (logits[0] - logits[1]).norm() / logits[1].norm() <= 1e-3


class _Norm(nn.Module):
    """A norm as families write it, with one thing that may differ."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.kind = nn.Parameter(torch.randn(70)), 1e-5, kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        if self.kind == "centred":
            y = y - y.mean(-1, keepdim=True)
        epsilon = 0.1 if self.kind == "other epsilon" else self.variance_epsilon
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + epsilon)
        if self.kind == "one plus":
            return (y * (1 + self.weight.float())).to(x.dtype)
        return y.to(x.dtype) * (self.weight.abs() if self.kind == "absolute" else self.weight)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "one plus", "centred", "other epsilon", "absolute"])
@torch.no_grad()
def test_norms_are_known_by_what_they_compute(kind: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(_Norm(kind)).to(dtype)
    before, weight = model[0], model[0].weight.clone()
    fuse(model, threads=2)
    assert torch.equal(before.weight, weight)  # trying it left no trace
    assert isinstance(model[0], FusedRmsNorm) == (kind in ("plain", "one plus"))
    for shape in [(1, 1, 70), (2, 600, 70)]:
        x = torch.randn(shape).to(dtype)
        torch.testing.assert_close(model(x), before(x), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("bits", [16, 4])
def test_tokens_are_equal_with_and_without_fusing(bits: int, tmp_path: Path) -> None:
    _save("olmoe", tmp_path)
    ids = torch.randint(3, 100, (1, 12))
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    texts = []
    for on in (True, False):
        model = load(str(tmp_path), bits=bits, fuse=on, **ON_CPU)
        assert any(isinstance(m, FusedRmsNorm) for m in model.modules()) == on
        texts.append(model.generate(ids, **options))
    assert torch.equal(*texts)


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])  # without norms, over all heads, over each head
@torch.no_grad()
def test_one_token_attention(family: str, dtype: str, tmp_path: Path) -> None:
    """Each step's logits with and without fusing, over a cache that grows, and a mask in between."""
    _save(family, tmp_path, HEADS)
    fused, plain = (load(str(tmp_path), fuse=on, **ON_CPU | {"dtype": dtype}) for on in (True, False))
    assert all(type(layer.self_attn.forward).__name__ == "_FusedForward" for layer in fused.model.layers)
    caches = [DynamicCache(), DynamicCache()]
    tolerance = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 6e-2}[dtype]
    for step, count in enumerate([7, 1, 1, 3, 1, 1]):
        ids = torch.randint(3, 100, (1, count))
        a, b = (m(ids, past_key_values=c).logits.float() for m, c in zip((fused, plain), caches, strict=True))
        assert (a - b).norm() <= tolerance * b.norm(), f"step {step}"
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 14


@needs_kernels
@torch.no_grad()
def test_attention_that_differs_is_left_alone(tmp_path: Path) -> None:
    _save("mixtral", tmp_path, HEADS)
    model = load(str(tmp_path), fuse=False, **ON_CPU)
    attention = model.model.layers[0].self_attn
    original, scaling = attention.forward, attention.scaling
    for wrong in ("scaling", "values"):
        if wrong == "scaling":
            attention.forward = lambda **given: _with(attention, "scaling", scaling * 1.1, original, given)
        else:
            attention.forward = lambda **given: (2 * original(**given)[0], None)
        assert not fuse_attention(attention, 1), wrong
    attention.forward = original
    assert fuse_attention(attention, 1)


def _with(module: Any, name: str, value: Any, function: Any, given: dict[str, Any]) -> Any:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        return function(**given)
    finally:
        setattr(module, name, before)


def test_a_cache_that_grows_in_place_stays_a_cache() -> None:
    """Appending, cropping, copying and replacing, against Transformers' own update."""
    ours, theirs = DynamicCache(), DynamicCache()
    for cache in (ours, theirs):
        torch.manual_seed(1)
        cache.update(torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16), 0)
    copies: list[Any] = []
    for step in range(300):
        k, v = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16)
        got, wanted = append(ours, 0, k, v), theirs.update(k, v, 0)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        if step % 50 == 10:
            copies.append((copy.deepcopy(ours), copy.copy(ours.layers[0]), theirs.layers[0].keys.clone()))
        if step % 70 == 20:
            for cache in (ours, theirs):
                cache.crop(-3)
        if step % 90 == 30:
            for cache in (ours, theirs):
                cache.reorder_cache(torch.tensor([0]))
    for deep, shallow, keys in copies:
        assert torch.equal(deep.layers[0].keys, keys)
        held = SimpleNamespace(layers=[shallow])
        length = shallow.keys.shape[-2]
        append(held, 0, torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16))  # a copy's token does not reach ours
        assert shallow.keys.shape[-2] == length + 1
    assert torch.equal(ours.layers[0].keys, theirs.layers[0].keys)
