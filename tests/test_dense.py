"""Packed dense layers and bits: against Transformers with the weights that the formats hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from families import EXPERTS, save_model
from moestro import MoestroConfig, load
from moestro.compute.cpu import levels
from moestro.decode.dense import PackedEmbedding, PackedLinear
from moestro.engine.families import expert_modules
from moestro.errors import RequestError
from moestro.loading.build import home

needs_kernels = pytest.mark.skipif(not levels(), reason="built without the kernels: no compiler was there")
ON_CPU: dict[str, Any] = {"device": "cpu", "threads": 1, "dtype": "float32"}


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
    # Every token to every expert: rounded activations may let near equals change places.
    reference = save_model(family, tmp_path, {"num_experts_per_tok": EXPERTS})
    ours = load(str(tmp_path), bits=bits, **ON_CPU)
    _as_packed(reference, ours)
    for tokens in (1, 30):
        ids = torch.randint(3, 100, (2, tokens))
        a, b = ours(ids).logits, reference(ids).logits
        assert (a - b).norm() / b.norm() <= 1e-3


@needs_kernels
def test_each_part_has_its_own_bits(tmp_path: Path) -> None:
    save_model("qwen2_moe", tmp_path)
    model = load(str(tmp_path), bits=16, expert_bits=4, dense_bits=8, **ON_CPU)
    assert {math.format.name for math in model.moestro.math} == {"hqq4"}
    formats = {name: m.matrix.fmt.name for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert formats.pop("lm_head") == "bf16"
    assert set(formats.values()) == {"int8"}
    assert any("shared_expert" in name for name in formats)
    assert not any(name.endswith("mlp.gate") for name in formats)  # routers are never packed


@needs_kernels
def test_a_tied_embedding_and_head_share_one_copy(tmp_path: Path) -> None:
    reference = save_model("mixtral", tmp_path, tie_word_embeddings=True)
    model = load(str(tmp_path), head_bits=8, **ON_CPU)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    assert isinstance(head, PackedLinear)
    assert embedding.matrix.packed.data_ptr() == head.matrix.packed.data_ptr()
    _as_packed(reference, model)
    ids = torch.randint(3, 100, (2, 300))
    assert torch.equal(embedding(ids), reference.get_input_embeddings()(ids))


@needs_kernels
@pytest.mark.parametrize("bits", [8, 4])
def test_an_embedding_is_its_weight(bits: int, tmp_path: Path) -> None:
    save_model("mixtral", tmp_path)
    embedding = load(str(tmp_path), bits=bits, **ON_CPU | {"dtype": "bfloat16"}).get_input_embeddings()
    ids = torch.arange(100)
    assert torch.equal(embedding(ids), embedding.weight[ids])


@needs_kernels
def test_originals_are_freed(tmp_path: Path) -> None:
    save_model("mixtral", tmp_path)
    model = load(str(tmp_path), bits=8, **ON_CPU)
    assert not [name for name, m in model.named_modules() if type(m) is nn.Linear]
    assert not [name for name, p in model.named_parameters() if p.dim() == 2 and "gate" not in name]


@needs_kernels
def test_gradients_are_refused(tmp_path: Path) -> None:
    save_model("mixtral", tmp_path)
    head = load(str(tmp_path), **ON_CPU).get_output_embeddings()
    with pytest.raises(Exception, match="inference"):
        head(torch.randn(1, head.in_features, requires_grad=True))


@pytest.mark.parametrize("option", ["bits", "expert_bits", "dense_bits", "head_bits"])
def test_other_bits_are_refused(option: str) -> None:
    with pytest.raises(RequestError, match=f"{option}=5: there are 16, 8, 4"):
        MoestroConfig(**{option: 5})


@pytest.mark.parametrize("option", ["dense_bits", "head_bits"])
def test_dense_bits_need_the_cpu(option: str) -> None:
    with pytest.raises(RequestError, match="needs the dense layers on the CPU"):
        load("demo", device="emulated", threads=1, **{option: 8})


def test_experts_at_4_bits_on_the_emulated_gpu(tmp_path: Path) -> None:
    save_model("mixtral", tmp_path)
    ids = torch.randint(3, 100, (1, 5))
    logits = []
    for device in ("emulated", "cpu"):
        model = load(str(tmp_path), device=device, policy="layer-split", expert_bits=4, dtype="float32", threads=1)
        with torch.no_grad():
            logits.append(model(ids).logits)
        model.moestro.close()
    assert (logits[0] - logits[1]).norm() / logits[1].norm() <= 1e-3
