"""Where checkpoints hold experts and other weights: for every family, as Transformers itself saves it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moestro.engine.families import FamilyLayout, expert_modules
from moestro.errors import CheckpointError
from moestro.loading.sources.names import Renamer, find_experts

from families import FAMILIES, Family, build_model


def _saved(family: Family, folder: Path) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    model = build_model(family)
    model.save_pretrained(folder)
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return model, tensors


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_each_weight_of_a_saved_model_is_found(family: Family, tmp_path: Path) -> None:
    model, tensors = _saved(family, tmp_path)
    found = find_experts(model, lambda name: name in tensors or f"{name}.weight" in tensors)
    modules = expert_modules(model)
    assert found.keys() == modules.keys()
    used = set()
    for module_name, pieces in found.items():
        layout = FamilyLayout.of(module_name, modules[module_name])
        assert len(pieces) == layout.experts * len(layout.shape.parts)
        for parameter in layout.parameters:
            for expert in range(layout.experts):
                parts = layout.parts(parameter, getattr(modules[module_name], parameter).data[expert])
                for part, expected in parts.items():
                    piece = pieces[expert, part]
                    name = piece.name if piece.name in tensors else f"{piece.name}.weight"
                    used.add(name)
                    stored = tensors[name] if piece.index is None else tensors[name][piece.index]
                    stored = stored.T if piece.transposed else stored
                    assert torch.equal(stored if piece.rows is None else stored[list(piece.rows)], expected), (part, piece)
    _check_dense(model, {name: tensor for name, tensor in tensors.items() if name not in used})


def _check_dense(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    renamer, state = Renamer(model), model.state_dict()
    seen = {}
    for name, tensor in tensors.items():
        found = renamer.rename(name)
        assert found is not None, name
        if found[1] is None:
            seen[found[0]] = tensor
        else:
            renamer.collect(name, found[0], found[1], tensor)
    seen |= dict(renamer.converted())
    for name, tensor in seen.items():
        assert torch.equal(tensor, state[name]), name
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    experts = tuple(expert_modules(model))
    assert not {name for name in state if not name.startswith(experts)} - seen.keys() - tied


def test_a_missing_expert_is_one_line(tmp_path: Path) -> None:
    model, tensors = _saved(Family("mixtral"), tmp_path)
    gone = next(name for name in tensors if ".experts.3.w2" in name)
    with pytest.raises(CheckpointError, match=r"experts\.3\.w2; it is incomplete"):
        find_experts(model, lambda name: f"{name}.weight" in tensors.keys() - {gone})
