"""The public methods of Transformers' models: each has a row, works as there, or is refused in one line."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from families import INSTALLED, save_model
from moestro import MoestroConfig, load
from moestro.errors import ModelError, MoestroError
from moestro.loading.methods import OURS, REFUSED, SAME

WAYS: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu"},
    "cpu, dense layers in torch": {"device": "cpu", "pack_dense": False},
    "emulated": {"device": "emulated", "gpu_memory": "200KiB", "policy": "lru"},
}


def _public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_") and callable(getattr(kind, name, None))}


def _load(folder: Path, way: str) -> Any:
    options = dict(WAYS[way])
    config = MoestroConfig(threads=1, **options)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, experts_implementation="moestro"
    )


def test_every_public_method_has_one_row() -> None:
    rows = [*REFUSED, *OURS, *SAME]
    assert len(rows) == len(set(rows))
    found = _public(PreTrainedModel) | _public(nn.Module) | _public(transformers.MixtralForCausalLM)
    without = sorted(found - set(rows))
    assert not without, f"{without} have no row: try them on a loaded model and say what they do"
    if Version("5.23") > INSTALLED:
        return  # which has fewer
    assert not set(rows) - found - {"smart_apply"}  # which modules get when Transformers first initializes one


@pytest.fixture(params=WAYS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Transformers' model and ours."""
    reference = save_model("qwen2_moe", tmp_path)
    model = _load(tmp_path, request.param)
    yield reference, model
    model.moestro.close()


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 12)[None]).logits


def test_what_is_refused(pair: Any, tmp_path: Path) -> None:
    _, model = pair
    wanted = _logits(model)
    given = {"save_pretrained": [tmp_path / "x"], "push_to_hub": ["x/y"], "to_empty": [], "type": [torch.float16]}
    for name, why in REFUSED.items():
        if hasattr(model, name):
            with pytest.raises(ModelError) as caught:
                getattr(model, name)(*given.get(name, []))
            assert why in str(caught.value)
            assert "\n" not in str(caught.value)
    actions = [copy.deepcopy, copy.copy, pickle.dumps, lambda m: torch.save(m, io.BytesIO())]
    actions += [lambda m: torch.save(m.state_dict(), io.BytesIO()), lambda m: m.to(torch.float16), lambda m: m.cuda()]
    actions += [lambda m: m.to("meta"), lambda m: m.set_experts_implementation("eager")]
    for action in actions:
        with pytest.raises(MoestroError):
            action(model)
    assert not (tmp_path / "x").exists()
    assert torch.equal(_logits(model), wanted)


def test_what_counts(pair: Any) -> None:
    reference, model = pair
    for arguments in ({}, {"exclude_embeddings": True}):
        assert model.num_parameters(**arguments) == reference.num_parameters(**arguments)
    assert model.num_parameters(only_trainable=True) == 0
    full = reference.get_memory_footprint()
    assert full <= model.get_memory_footprint() <= 3 * full  # tiny matrices are padded, and slots hold copies


def test_what_works(pair: Any, tmp_path: Path) -> None:
    reference, model = pair
    assert model.to(model.device) is model.to(torch.float32) is model.cpu() is model
    model.set_experts_implementation("moestro")
    model.set_attn_implementation("eager")
    model.tie_weights()
    torch.testing.assert_close(_logits(model), _logits(reference), rtol=1e-4, atol=1e-5)
    name = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(model.get_parameter(name).clone(), reference.get_parameter(name).detach())
    for ask in (model.get_parameter, model.get_parameter_or_buffer):
        with pytest.raises(MoestroError, match="store"):
            ask("model.layers.1.mlp.experts.down_proj")
    assert type(model).__name__ == type(reference).__name__
    assert isinstance(model, type(reference))
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(_logits(again), _logits(reference))
    assert again.num_parameters() == reference.num_parameters()
    fresh = type(model)(reference.config)
    assert fresh.num_parameters() == reference.num_parameters()
    assert type(copy.deepcopy(fresh)) is type(reference)


def test_a_saved_config_loads_again(pair: Any, tmp_path: Path) -> None:
    reference, model = pair
    model.config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.num_hidden_layers == reference.config.num_hidden_layers
    for again in (load(str(tmp_path), device="cpu", threads=1), AutoModelForCausalLM.from_pretrained(tmp_path)):
        torch.testing.assert_close(_logits(again), _logits(reference), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [120, 140])
@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings(size: int, tied: bool, tmp_path: Path) -> None:
    reference = save_model("mixtral", tmp_path, tie_word_embeddings=tied)
    for way in WAYS:
        other = copy.deepcopy(reference)
        model = _load(tmp_path, way)
        torch.manual_seed(0)
        other.resize_token_embeddings(size, mean_resizing=False)
        torch.manual_seed(0)
        if way == "cpu" and tied:
            with pytest.raises(ModelError, match="pack_dense"):
                model.resize_token_embeddings(size, mean_resizing=False)
        else:
            model.resize_token_embeddings(size, mean_resizing=False)
            assert model.config.vocab_size == size
            torch.testing.assert_close(_logits(model), _logits(other), rtol=1e-4, atol=1e-5)
        model.moestro.close()
