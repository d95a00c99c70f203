"""`--fit none`: 4, 3 and 2 bits without fitting, wherever weights are quantized, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import save_model
from moestro import MoestroError, load
from moestro.decode.dense import Packed
from moestro.errors import RequestError
from moestro.loading import cached
from moestro.loading.pack import pack
from moestro.loading.packed import cache
from moestro.loading.packed.read import read_manifest
from moestro.memory.formats import MATRIX_FORMATS
from moestro.planning.formats import QUANTIZED
from moestro.planning.options import ModelOptions, Options
from test_plain import assert_same, bits, load_by_transformers, load_mapped, tensors_of

EMULATED: dict[str, Any] = {"device": "emulated", "gpu_memory": "32MiB", "policy": "lru", "link": None}
# Wide enough that a group is whole and a fit has something to find.
SIZES = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "head_dim": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source")
    save_model("mixtral", path, SIZES)
    return path


def different(one: Any, other: Any) -> set[str]:
    """The names of tensors whose bytes differ."""
    mine, theirs = tensors_of(one), tensors_of(other)
    assert mine.keys() == theirs.keys()
    return {name for name in mine if not torch.equal(bits(mine[name]), bits(theirs[name]))}


@pytest.mark.sample(2)
@pytest.mark.parametrize("n_bits", [4, 3, 2])
@pytest.mark.parametrize("device", [{}, EMULATED], ids=["cpu", "a device"])
def test_it_reaches_everything_that_is_quantized(n_bits: int, device: dict[str, Any], source: Path) -> None:
    """From the mapped files and by Transformers' loader: experts, and on the CPU dense layers, head and embedding."""
    asked = {"bits": n_bits, **device} | ({} if device else {"head_bits": n_bits})
    nearest, fitted = load_mapped(source, fit="none", **asked), load_mapped(source, **asked)
    assert_same(nearest, load_by_transformers(source, fit="none", **asked))
    assert not different(fitted, load_mapped(source, fit="hqq", **asked))
    packed = {name for name in tensors_of(fitted) if name.startswith("expert") or "hqq" in name}
    assert different(nearest, fitted) == packed
    assert (
        any(name.startswith("lm_head") for name in packed) == any("q_proj" in name for name in packed) == (not device)
    )


@pytest.mark.parametrize("n_bits", [4, 3, 2])
def test_it_takes_the_nearest_numbers_between_the_extremes(n_bits: int, source: Path) -> None:
    """By plain arithmetic: each weight is within half a step of itself, but for what a byte's scale and zero round."""
    plain, model = load_mapped(source), load_mapped(source, bits=n_bits, fit="none", head_bits=n_bits)
    group = MATRIX_FORMATS[QUANTIZED[n_bits]].group
    for name, module in model.named_modules():
        if isinstance(module, Packed):
            weight = plain.get_submodule(name).weight.float()
            groups, found = (each.float().unflatten(1, (-1, group)) for each in (weight, module.weight))
            step = (groups.amax(2) - groups.amin(2)) / (2**n_bits - 1)
            assert ((found - groups).abs() <= 0.65 * step[..., None]).all(), name


@pytest.mark.parametrize("n_bits", [16, 8, None])
def test_it_changes_nothing_of_other_bits(n_bits: int | None, source: Path) -> None:
    assert not different(load_mapped(source, bits=n_bits, fit="none"), load_mapped(source, bits=n_bits))


def test_random_shapes_are_not_fitted() -> None:
    nearest, asked = (
        load(shape="tiny", bits=4, head_bits=4, threads=1, device="cpu", **fit) for fit in ({}, {"fit": "hqq"})
    )
    assert not different(nearest, asked)


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 20)[None]).logits  # type: ignore[no-any-return]


def test_the_cache_has_an_entry_for_each(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {fit: _logits(load(str(source), bits=3, threads=2, fit=fit)) for fit in (None, "none")}
    assert not torch.equal(made[None], made["none"])
    assert len(cache.entries()) == 2
    monkeypatch.setattr(cached.cache, "keep", None)  # what is there is read
    for fit, expected in made.items():
        assert torch.equal(_logits(load(str(source), bits=3, threads=2, fit=fit)), expected)
    assert torch.equal(_logits(load(str(source), bits=3, threads=2, fit="hqq")), made[None])


def test_8_bits_have_one_entry_whatever_the_fit(source: Path) -> None:
    for fit in (None, "none", "hqq"):
        load(str(source), bits=8, threads=2, fit=fit)
    assert len(cache.entries()) == 1


@pytest.mark.parametrize("made", [None, "hqq", "none"])
def test_a_packed_folder_says_how_it_was_made(made: str | None, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    pack(str(source), folder, ModelOptions(), Options(threads=2, bits=4, fit=made))
    kept = made or "hqq"
    assert read_manifest(folder).asked.fit == kept
    expected = _logits(load(str(source), bits=4, fit=kept, threads=2, cache=False))
    for fit in (None, kept):
        assert torch.equal(_logits(load(str(folder), threads=2, fit=fit)), expected)
    other = "none" if kept == "hqq" else "hqq"
    says = f"is packed with fit={kept!r}, not {other}; leave fit out, or pack the checkpoint with it"
    with pytest.raises(RequestError, match=says):
        load(str(folder), threads=2, fit=other)
    again = tmp_path / "again"
    pack(str(folder), again, ModelOptions(), Options(threads=2))
    assert read_manifest(again).asked.fit == kept


def test_a_packed_folder_without_such_bits_takes_any(source: Path, tmp_path: Path) -> None:
    pack(str(source), tmp_path / "packed", ModelOptions(), Options(threads=2, bits=8, fit="none"))
    assert read_manifest(tmp_path / "packed").asked.fit is None
    for fit in (None, "none", "hqq"):
        load(str(tmp_path / "packed"), threads=2, fit=fit)


def test_another_name_is_refused() -> None:
    with pytest.raises(MoestroError, match="no fit 'gptq'; there are: hqq, none"):
        load("demo", fit="gptq")
