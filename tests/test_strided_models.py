"""A checkpoint in mixtral-offloading's form runs: logits and tokens are those of Transformers with its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import nn

from families import random_ids
from hqq_writer import ATTENTION, EXPERTS, FAMILY, Kind, quantize, write_checkpoint
from moestro import load
from moestro.decode.dense import PackedLinear
from moestro.errors import MoestroError
from moestro.loading.checkpoint import is_stored
from moestro.loading.contents import inspect_model
from moestro.loading.headers import prefix_of
from moestro.loading.pack import pack
from moestro.planning.options import ModelOptions, Options
from survey_checks import same_bytes
from test_mutated_checkpoints import CHANGES, change_config, files_load_or_say_why
from test_packed import same
from test_stored import DEVICES, _same


@pytest.mark.sample(2)
@pytest.mark.parametrize("options", DEVICES, ids=lambda options: options["device"])
@pytest.mark.parametrize(
    ("experts", "attention"),
    [
        (EXPERTS, ATTENTION),
        pytest.param(Kind(4, 64, 64), Kind(2, 16, 64), marks=pytest.mark.long),
        (Kind(3, 32, 128), Kind(8, 128, 32)),
    ],
    ids=["as published", "4 bits", "3 bits"],
)
def test_whole_models(experts: Kind, attention: Kind, options: dict[str, Any], tmp_path: Path) -> None:
    """Prompts of 37 tokens and tokens one by one; experts whole in slots and on the CPU."""
    expected = write_checkpoint(tmp_path, experts=experts, attention=attention)
    model = load(str(tmp_path), dtype="float32", threads=2, **options)
    same_bytes(tmp_path, model, **options)
    assert {math.format.name for math in model.moestro.math} == {"hqq{}r{}s{}".format(*experts)}
    if experts == EXPERTS:  # the table of gate and up repeats after several classes of rows
        assert model.moestro.math[0].format.matrices["up"].table_rows(model.config.intermediate_size) == 3
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj", "o_proj")):
            assert isinstance(module, PackedLinear)
            assert module.matrix.fmt.name == "hqq{}r{}s{}".format(*attention)
            assert torch.equal(module.weight.float(), expected.get_parameter(f"{name}.weight"))
    _same(model, expected)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    folder = tmp_path_factory.mktemp("published")
    return folder, write_checkpoint(folder)


@pytest.mark.long
def test_names_may_be_whole_too(published: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """In files that an index joins, and in a single one; all are recognized without a word in config.json."""
    ids = random_ids()
    expected = load(str(published[0]), threads=2)
    for single in (False, True):
        folder = tmp_path / str(single)
        write_checkpoint(folder, relative=False)
        if single:
            index = folder / "model.safetensors.index.json"
            files = {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
            index.unlink()
            save_file(
                {name: tensor for file in files for name, tensor in load_file(file).items()},
                folder / "model.safetensors",
            )
        assert is_stored(str(folder))
        same(load(str(folder), threads=2), expected, ids)


def test_a_files_names_are_completed_by_the_index() -> None:
    indexed = ["a.experts.1.w1.W_q", "a.experts.1.w1.meta.scale_q", "a.experts.1.w2.W_q"]
    assert prefix_of(["w1.W_q", "w1.meta.scale_q", "w2.W_q"], indexed) == "a.experts.1."
    assert prefix_of(["w1.W_q", "w2.W_q", "odd"], indexed) == "a.experts.1."
    assert prefix_of(indexed, indexed) == prefix_of(["x.y"], indexed) == prefix_of(["x.y"], []) == ""


def test_a_packed_folder_is_the_same_model(published: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """With dense layers that stay packed, and with those that a device or an option has unpacked."""
    folder, ids = published[0], random_ids()
    pack(str(folder), tmp_path / "packed", ModelOptions(), Options(threads=2))
    emulated = {"device": "emulated", "gpu_memory": "64MiB", "policy": "lru", "link": None}
    for options in ({}, emulated):
        same(load(str(tmp_path / "packed"), threads=2, **options), load(str(folder), threads=2, **options), ids)
    plain = load(str(tmp_path / "packed"), threads=2, pack_dense=False)
    q_proj = plain.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(q_proj, published[1].model.layers[0].self_attn.q_proj.weight.to(q_proj.dtype))


def test_dense_layers_can_be_dequantized(published: tuple[Path, nn.Module]) -> None:
    model = load(str(published[0]), dtype="float32", threads=2, pack_dense=False)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, published[1].get_parameter(name)), name


def test_what_inspect_says(published: tuple[Path, nn.Module]) -> None:
    """By the headers, the index and the config alone."""
    found, weights = inspect_model(str(published[0])), dict[str, int]()
    for name, parameter in published[1].named_parameters():
        part = "experts" if ".experts." in name else "attention" if "self_attn" in name else "others"
        weights[part] = weights.get(part, 0) + parameter.numel()
    assert found.quantization == "hqq"
    assert set(found.parts) == {"experts", "attention", "router and norms", "embeddings", "head"}
    for part, kind, bits in (("experts", "hqq int2", 3.05), ("attention", "hqq int4", 4.3)):
        assert found.parts[part].weights == weights[part]
        assert list(found.parts[part].formats) == [kind]
        assert found.parts[part].bits == pytest.approx(bits, abs=0.06)


def _drop(folder: Path, file: str, name: str) -> None:
    tensors = load_file(folder / file)
    del tensors[name]
    save_file(tensors, folder / file)


def _change(folder: Path, file: str, name: str, how: Callable[[Any], Any]) -> None:
    tensors = load_file(folder / file)
    tensors[name] = how(tensors[name]).contiguous()
    save_file(tensors, folder / file)


def _cut(folder: Path, file: str) -> None:
    (folder / file).write_bytes((folder / file).read_bytes()[:-100])


def _reconfigure(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


FIRST, TRUNK = "model-00000.safetensors", "model.safetensors-trunk.safetensors"
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: _drop(f, FIRST, "w1.W_q"), r"no model\.layers\.0\.block_sparse_moe\.experts\.0\.w1"),
        (lambda f: _drop(f, FIRST, "w2.meta.zero_q"), r"experts\.0\.w2 has no meta\.zero_q"),
        (lambda f: _drop(f, TRUNK, f"{QUERY}.meta.meta_scale.zero"), r"q_proj has no meta\.meta_scale\.zero"),
        (lambda f: _drop(f, TRUNK, f"{QUERY}.W_q"), r"no model\.layers\.0\.self_attn\.q_proj\.weight"),
        (lambda f: _change(f, FIRST, "w3.W_q", lambda t: t[:, 1:]), r"experts\.0\.w3 .*W_q \[4, 3071\]"),
        (lambda f: _change(f, FIRST, "w3.meta.scale_q", lambda t: t.float()), r"experts\.0\.w3 .*of float32"),
        (lambda f: _cut(f, FIRST), "damaged or cut short"),
        (lambda f: (f / FIRST).unlink(), "damaged or cut short|lacks"),
        (lambda f: _reconfigure(f, intermediate_size=208), "no groups of 16"),
        (lambda f: _reconfigure(f, intermediate_size=200), "no groups of 16"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": 3}'), "no index of weights"),
    ],
)
def test_damage_is_one_line(damage: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    damage(tmp_path)
    with pytest.raises(MoestroError, match=says) as error:
        load(str(tmp_path), threads=2)
    assert "\n" not in str(error.value)


@cache
def _files(base: Path) -> dict[str, bytes]:
    """A checkpoint of one layer, in two files with an index."""
    folder = base / "whole-hqq"
    folder.mkdir()
    write_checkpoint(folder, family=replace(FAMILY, config={**FAMILY.config, "num_hidden_layers": 1}), relative=False)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {name: tensor for file in set(index.values()) for name, tensor in load_file(folder / file).items()}
    names = [f"model-{1 + number % 2}.safetensors" for number in range(len(tensors))]
    of_names = dict(zip(sorted(tensors), names, strict=True))
    files = {file: save({name: tensors[name] for name in of_names if of_names[name] == file}) for file in set(names)}
    files["config.json"] = (folder / "config.json").read_bytes()
    return files | {"model.safetensors.index.json": json.dumps({"weight_map": of_names}).encode()}


@pytest.mark.timeout(900)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_damage_is_one_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Or a model whose every weight is from the file."""
    base = tmp_path_factory.getbasetemp()
    files = dict(_files(base))
    data.draw(st.sampled_from([change for change in CHANGES if change is not change_config]))(files, data.draw)
    files_load_or_say_why(base / "mutated-hqq", files)


def test_experts_in_two_forms_are_refused(tmp_path: Path) -> None:
    """Of one expert, whose gate and up have other groups; and of one layer."""
    for part, says in (
        (("w1",), "other matrices, groups or biases"),
        (("w1", "w2", "w3"), "experts in several formats"),
    ):
        folder = tmp_path / "".join(part)
        write_checkpoint(folder)
        tensors = load_file(folder / FIRST)
        for name in part:
            size = (256, 192) if name == "w2" else (192, 256)
            own, _ = quantize(torch.randn(size), Kind(2, 32, 128))
            tensors |= {f"{name}.{ending}": tensor for ending, tensor in own.items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FIRST)
        with pytest.raises(MoestroError, match=says):
            load(str(folder), threads=2)
