"""Plain safetensors read from the mapped files: the same model, bit for bit, as by Transformers' own loader."""

from __future__ import annotations

import gc
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from families import FAMILIES, Family, build_model, random_ids, save_model
from moestro import MoestroError, load
from moestro.bench.loading import anonymous_bytes
from moestro.cli import main as cli
from moestro.decode.dense import Packed
from moestro.loading import model as loading
from moestro.loading.build import home
from moestro.loading.sources import names
from moestro.loading.sources.plain import Unproven

OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {"dtype": "float32"},
    "some bits": {"dtype": "float16", "expert_bits": 4, "head_bits": 16, "dense_bits": 8},
    "another dtype": {"dtype": "bfloat16"},
    "4 bits": {"dtype": "bfloat16", "bits": 4},
    "a device": {"dtype": "float32", "device": "emulated", "gpu_memory": "32MiB", "policy": "lru", "link": None},
}
# Those that are tried with all of the options, the others with the first two: float16 is what some families leave.
SEVERAL = ("mixtral", "qwen3_vl_moe", "gpt_oss", "deepseek_v4", "ernie4_5_vl_moe", "nemotron_h", "aria")
CASES = [(family, how) for n, how in enumerate(OPTIONS) for family in FAMILIES if n < 2 or family.name in SEVERAL]


@contextmanager
def ways() -> Iterator[list[str]]:
    """Inside the block, why each checkpoint was left to Transformers; "" where it was read from the mapped files."""
    found: list[str] = []
    original = loading.load_plain

    def watched(*args: Any) -> Any:
        try:
            loaded = original(*args)
        except Unproven as why:
            found.append(str(why))
            raise
        found.append("")
        return loaded

    with mock.patch.object(loading, "load_plain", watched):
        yield found


def load_mapped(path: Path, **options: Any) -> Any:
    """Load from the mapped files; fails where Transformers' loader was taken."""
    with ways() as found:
        model = load(str(path), **({"device": "cpu", "threads": 1, "cache": False} | options))
    assert found == [""], found
    return model


def load_by_transformers(path: Path, **options: Any) -> Any:
    """Load through Transformers' loader and our quantizer."""
    with mock.patch.object(loading, "load_plain", side_effect=Unproven("a test")):
        return load(str(path), **({"device": "cpu", "threads": 1, "cache": False} | options))


def tensors_of(model: Any) -> dict[str, Tensor]:
    """The bytes of the experts, the packed layers, and of all parameters and buffers; and the dtypes."""
    layers = enumerate(model.moestro.spec.layers)
    found = {f"expert {n} {e}": home(model.moestro, n, e) for n, layer in layers for e in range(layer.experts)}
    for name, module in model.named_modules():
        if isinstance(module, Packed):
            found[f"{name} in {module.matrix.fmt.name} of {module.weight_dtype}"] = module.matrix.packed
            if module.matrix.bias is not None:
                found[f"{name}.bias"] = module.matrix.bias
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert not tensor.is_meta, name
        found[f"{name} in {tensor.dtype}"] = tensor
    return found


def assert_same(one: Any, other: Any) -> None:
    mine, theirs = tensors_of(one), tensors_of(other)
    assert mine.keys() == theirs.keys()
    differ = [name for name in mine if not torch.equal(bits(mine[name]), bits(theirs[name]))]
    assert not differ
    assert one.config.to_dict() == other.config.to_dict()
    assert one.generation_config.to_dict() == other.generation_config.to_dict()
    assert one.is_quantized == other.is_quantized
    assert one.training == other.training
    assert not any(parameter.requires_grad for parameter in one.parameters())


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


@pytest.mark.sample(60)
@pytest.mark.parametrize(("family", "how"), CASES, ids=lambda value: getattr(value, "name", value))
def test_each_family_is_the_same_both_ways(family: Family, how: str, tmp_path: Path) -> None:
    build_model(family).save_pretrained(tmp_path)
    assert_same(load_mapped(tmp_path, **OPTIONS[how]), load_by_transformers(tmp_path, **OPTIONS[how]))


def stored(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: each.contiguous() for name, each in tensors.items()}, path / "model.safetensors", {"format": "pt"})


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen3_vl_moe", "gpt_oss", "granitemoe", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_in_the_file(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """As it is, in the file's dtype, and in the model's own names instead of the published ones."""
    model = save_model(name, tmp_path)
    kept = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    for tensors in (kept, {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}):
        tied = getattr(model, "all_tied_weights_keys", {})
        stored(tmp_path, {name: tensor.clone() for name, tensor in tensors.items() if name not in tied})
        for asked in ("auto", "float32", str(dtype).removeprefix("torch.")):
            assert_same(load_mapped(tmp_path, dtype=asked), load_by_transformers(tmp_path, dtype=asked))


@pytest.mark.parametrize("sizes", [(32, 32), (32, 16), (64, 32)], ids=str)
def test_square_experts_are_turned_as_transformers_turns_them(sizes: tuple[int, int], tmp_path: Path) -> None:
    """Qwen3-VL's are stored [in, out] and turned where the shape is not the model's: square ones are not."""
    save_model("qwen3_vl_moe", tmp_path, {"hidden_size": sizes[0], "moe_intermediate_size": sizes[1], "head_dim": 16})
    assert_same(load_mapped(tmp_path, dtype="float32"), load_by_transformers(tmp_path, dtype="float32"))


class _Swap(ConversionOps):
    """Experts in the reverse order."""

    def convert(self, input_dict: Any, target_patterns: list[str], **_: Any) -> dict[str, Tensor]:
        (tensor,) = input_dict.values()
        return {target_patterns[0]: (tensor[0] if isinstance(tensor, list) else tensor).flip(0)}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_vl_moe", "deepseek_v3"])
def test_a_conversion_that_puts_weights_elsewhere_is_noticed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and shapes are as expected, but the loader's conversion would give each expert another one's weights."""
    save_model(name, tmp_path)
    original = names.get_model_conversion_mapping

    def changed(model: Any) -> list[Any]:
        mapping = list(original(model))
        for one in mapping:
            if isinstance(one, WeightConverter) and "down_proj" in one.target_patterns[0]:
                one.operations = [*one.operations, _Swap()]
        return mapping

    monkeypatch.setattr(names, "get_model_conversion_mapping", changed)
    with ways() as found:
        load(str(tmp_path), device="cpu", threads=1)
    assert found == ["this family's experts are converted in a way that is not known here"]


def test_a_config_without_a_dtype(tmp_path: Path) -> None:
    save_model("mixtral", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    stored(tmp_path, {n: t.bfloat16() for n, t in load_file(tmp_path / "model.safetensors").items()})
    model = load_mapped(tmp_path)
    assert model.config.dtype == torch.bfloat16
    assert_same(model, load_by_transformers(tmp_path))


def test_tensors_that_the_model_has_no_place_for_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_model("mixtral", tmp_path)
    more = {"model.layers.9.mlp.gate.weight": torch.zeros(2, 2), "model.layers.0.rotary_emb.inv_freq": torch.zeros(2)}
    stored(tmp_path, load_file(tmp_path / "model.safetensors") | more)
    warned = []
    for way in (load_mapped, load_by_transformers):
        caplog.clear()
        way(tmp_path)
        warned.append([line for line in caplog.messages if "no place for" in line])
    assert warned[0] == warned[1]
    assert "has 1 tensors" in warned[0][0]


def _add_tied(path: Path, tensors: dict[str, Tensor]) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))


def _only_the_head(path: Path, tensors: dict[str, Tensor]) -> None:
    _add_tied(path, tensors)
    del tensors["model.embed_tokens.weight"]


def _in_float64(path: Path, tensors: dict[str, Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("experts.1.w2.weight"))
    tensors[name] = tensors[name].double()


def _in_fp8(path: Path, tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)


def _pickled(path: Path, tensors: dict[str, Tensor]) -> None:
    torch.save(tensors, path / "pytorch_model.bin")
    tensors.clear()


def _both_names(path: Path, tensors: dict[str, Tensor]) -> None:
    """A layer's norm is there under the published name and, with other numbers, without the model's prefix."""
    tensors["layers.0.input_layernorm.weight"] = tensors["model.layers.0.input_layernorm.weight"] + 1


# What is left to Transformers' loader -> what is done to a Mixtral, and why.
LEFT = {
    "a tied weight twice": (_add_tied, "ties to"),
    "a tied weight under the other name": (_only_the_head, "ties to"),
    "experts in float64": (_in_float64, "float64"),
    "FP8 without a quantization": (_in_fp8, "float8_e4m3fn"),
    "pickles": (_pickled, "pickles"),
    "a weight under two names": (_both_names, "several tensors"),
}


@pytest.mark.parametrize("what", LEFT)
@torch.no_grad()
def test_what_is_left_to_transformers_is_loaded_by_it(what: str, tmp_path: Path) -> None:
    model = save_model("mixtral", tmp_path)
    change, says = LEFT[what]
    tensors = load_file(tmp_path / "model.safetensors")
    change(tmp_path, tensors)
    (tmp_path / "model.safetensors").unlink()
    if tensors:
        stored(tmp_path, tensors)
    with ways() as found:
        loaded = load(str(tmp_path), device="cpu", threads=1, dtype="float32")
    assert len(found) == 1
    assert says in found[0]
    expected = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.allclose(loaded(random_ids()).logits, expected(random_ids()).logits, atol=1e-4)


def numbers(kind: str, shape: torch.Size) -> Tensor:
    """A matrix of a kind that quantizing could stumble on."""
    matrix = torch.randn(shape)
    if kind == "zeros":
        return torch.zeros(shape)
    if kind == "a NaN":
        matrix[1, 2] = float("nan")
    if kind == "infinite":
        matrix[3, 4] = float("inf")
    if kind == "all NaN":
        return torch.full(shape, float("nan"))
    return matrix


@pytest.mark.parametrize("bits_of_weights", [None, 8, 4])
@pytest.mark.parametrize("kind", ["zeros", "a NaN", "infinite", "all NaN"])
def test_weights_that_are_no_numbers_or_nothing(kind: str, bits_of_weights: int | None, tmp_path: Path) -> None:
    """As through Transformers' loader, in an expert and in a dense layer; a matrix of zeros computes finite numbers.

    What has no nearest whole number is refused where weights are quantized.
    """
    save_model("mixtral", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for ending in ("layers.1.block_sparse_moe.experts.2.w1.weight", "layers.0.self_attn.o_proj.weight"):
        name = next(name for name in tensors if name.endswith(ending))
        tensors[name] = numbers(kind, tensors[name].shape)
    stored(tmp_path, tensors)
    if kind != "zeros" and bits_of_weights is not None:
        with pytest.raises(MoestroError, match="only finite ones can be quantized"):
            load_mapped(tmp_path, bits=bits_of_weights)
        return
    mine = load_mapped(tmp_path, bits=bits_of_weights)
    assert_same(mine, load_by_transformers(tmp_path, bits=bits_of_weights))
    if kind == "zeros":
        with torch.no_grad():
            assert mine(random_ids()).logits.isfinite().all()


def test_run_says_where_the_seconds_of_a_load_went(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for more in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["moestro", "run", "demo", "Once", "-n", "2", "--device", "cpu", *more])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        printed = capsys.readouterr()
        if more:
            times = json.loads(printed.out.splitlines()[-1])["load"]
            assert set(times) == {"imports_s", "reading_s", "packing_s", "warm_up_s"}
            assert all(value > 0 for value in times.values())
        else:
            seconds = r"\d+\.\d\d s to "
            says = f"start +{seconds}import, {seconds}read the weights, {seconds}pack them, {seconds}warm up"
            assert re.search(says, printed.err)


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def maps(path: Path) -> bool:
    """Whether a file of this folder is mapped into the process."""
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="watches /proc")
@pytest.mark.long
def test_a_model_that_is_gone_leaves_neither_memory_nor_threads(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "head_dim": 128}
    save_model("mixtral", tmp_path, sizes)

    def load_and_run() -> int:
        model = load_mapped(tmp_path, threads=2, dtype="float32")
        assert not maps(tmp_path), "the files are held beside the packed weights"
        with torch.no_grad():
            model(random_ids())
        return int(model.moestro.store.n_bytes)

    packed_bytes = load_and_run()  # what a process keeps of its first load: threads of torch, caches of Transformers
    gc.collect()
    before_bytes, before = anonymous_bytes(os.getpid()), threads()
    for _ in range(3):
        load_and_run()
        gc.collect()
    assert threads() <= before
    assert packed_bytes > 150e6
    assert anonymous_bytes(os.getpid()) - before_bytes < 0.1 * packed_bytes
