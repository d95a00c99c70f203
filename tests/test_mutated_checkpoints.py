"""Whole small checkpoints of each kind, damaged in any way, loaded as `moestro run` loads them.

Each ends in one line, or in a model whose every weight comes from the file: it is the same whatever was in memory
before, whatever the seed. Nothing crashes or hangs. 500 files in the default run.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

import moestro
from families import Family
from moestro.decode import dense
from moestro.errors import MoestroError
from moestro.loading.gguf_header import parse_gguf
from moestro.memory import store
from test_sources_safetensors import LARGE, write_checkpoint

ONE_LAYER = LARGE | {"num_hidden_layers": 1, "mlp_layer_types": ["sparse"]}
KINDS = ("fp8", "mxfp4", "int4g32", "int4g32-asymmetric", "awq", "gptq", "gptq-act-order", "nvfp4")
GGUF_KINDS = {"mixtral": ("llama", "Q8_0"), "qwen3_moe": ("qwen3moe", "Q4_0")}
EXAMPLES = 20  # of each of these ten
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int32, torch.int64)
WORDS = ("fp8", "gptq", "awq", "compressed-tensors", "mxfp4", "modelopt", "bitsandbytes", "", None, [], {}, True)
MOST_S = 60.0  # of a load: some take a tenth of a second
Draw = Any


# --- the same whatever was in memory


@contextmanager
def memory_full_of(byte: int, seed: int) -> Iterator[None]:
    """What is allocated inside holds that byte, where torch or the store would leave anything or zeros."""
    torch.manual_seed(seed)
    empty, empty_like, map_memory = torch.empty, torch.empty_like, store.map_memory

    def filled(tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu" and tensor.numel() and tensor.is_contiguous():
            tensor.view(-1).view(torch.uint8).fill_(byte)
        return tensor

    with (
        mock.patch.object(torch, "empty", lambda *a, **k: filled(empty(*a, **k))),
        mock.patch.object(torch, "empty_like", lambda *a, **k: filled(empty_like(*a, **k))),
        mock.patch.object(store, "map_memory", lambda n_bytes: filled(map_memory(n_bytes))),
        mock.patch.object(dense, "map_memory", lambda n_bytes: filled(map_memory(n_bytes))),
    ):
        yield


def weights_of(model: Any) -> Iterator[Tensor]:
    """Every weight of a model, its experts' and orders of columns too."""
    conductor = model.moestro
    for layer, expert in sorted(conductor.store.experts):
        math = conductor.math[layer]
        found = math.format.unpack(conductor.store[layer, expert], math.shape, range(math.shape.neurons), torch.float32)
        parts = (found.up, found.down, found.gate, found.up_bias, found.gate_bias, found.down_bias)
        yield from (part for part in (*parts, found.gate_order, found.up_order) if part is not None)
    yield from model.parameters()
    yield from (buffer for buffer in model.buffers() if buffer is not None)


def loads_or_says_why(path: Path) -> None:
    began = time.monotonic()
    ends = [_end(path, byte, seed) for byte, seed in ((0x7F, 1), (0x00, 2))]
    if any(isinstance(end, str) for end in ends):
        assert ends[0] == ends[1]  # the same line
        assert ends[0]
        assert "\n" not in ends[0]
    else:
        for one, other in zip(*map(weights_of, ends), strict=True):
            assert not one.is_meta
            assert torch.equal(bits(one), bits(other)), f"{tuple(one.shape)} is not from the file"
        with torch.no_grad():
            ends[0](torch.tensor([[3, 4, 5]]))
    assert time.monotonic() - began < MOST_S


def _end(path: Path, byte: int, seed: int) -> Any:
    """The model, or the line that refuses it; as `moestro run` loads one."""
    try:
        with memory_full_of(byte, seed):
            return moestro.load(str(path), dtype="float32", device="cpu", threads=1)
    except MoestroError as error:
        return str(error)


def bits(tensor: Tensor) -> Tensor:
    """Its bytes: NaN of a damaged file equals itself."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


# --- safetensors


@cache
def whole(kind: str, base: Path) -> dict[str, bytes]:
    """The files of a checkpoint in two shards."""
    folder = base / f"whole-{kind}"
    folder.mkdir()
    write_checkpoint(folder, Family("mixtral", ONE_LAYER), kind)
    tensors = load((folder / "model.safetensors").read_bytes())
    names = sorted(tensors)
    shards = [{name: tensors[name] for name in names[i::2]} for i in range(2)]
    files = {"config.json": (folder / "config.json").read_bytes()}
    files |= {f"model-{i + 1}.safetensors": save(shard) for i, shard in enumerate(shards)}
    of_names = {name: f"model-{i + 1}.safetensors" for i, shard in enumerate(shards) for name in shard}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": of_names}).encode()
    return files


def flipped(data: bytes, draw: Draw, most: int) -> bytes:
    """Some bytes of its beginning are others."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, min(most, len(changed)) - 1))
        changed[at] = draw(st.one_of(st.sampled_from(b'0123456789[],:"_.abFIU{}\x00\xff'), st.integers(0, 255)))
    return bytes(changed)


def flip_a_header(files: dict[str, bytes], draw: Draw) -> None:
    name = draw(st.sampled_from(["model-1.safetensors", "model-2.safetensors"]))
    files[name] = flipped(files[name], draw, 8 + int.from_bytes(files[name][:8], "little"))


def flip_json(files: dict[str, bytes], draw: Draw) -> None:
    name = draw(st.sampled_from(["config.json", "model.safetensors.index.json"]))
    files[name] = flipped(files[name], draw, len(files[name]))


def truncate(files: dict[str, bytes], draw: Draw) -> None:
    name = draw(st.sampled_from(sorted(files)))
    files[name] = files[name][: draw(st.integers(0, len(files[name]) - 1))]


def drop_a_file(files: dict[str, bytes], draw: Draw) -> None:
    del files[draw(st.sampled_from(sorted(files)))]


def change_config(files: dict[str, bytes], draw: Draw) -> None:
    """A number or a word of the config, or of what it says of quantization, is another."""
    config = json.loads(files["config.json"])
    quantized = config["quantization_config"]
    group = next(iter(quantized.get("config_groups", {"": {}}).values()))
    of = draw(st.sampled_from([part for part in (config, quantized, group, group.get("weights")) if part]))
    key = draw(st.sampled_from(sorted(of)))
    choices = [st.sampled_from(WORDS), st.integers(-2, 300), st.just([64, 64])]
    if isinstance(of[key], int) and not isinstance(of[key], bool):
        choices.append(st.sampled_from([of[key] * 2, of[key] // 2, of[key] + 1, -of[key], float(of[key])]))
    if draw(st.booleans()):
        del of[key]
    else:
        of[key] = draw(st.one_of(choices))
    files["config.json"] = json.dumps(config).encode()


def change_a_tensor(files: dict[str, bytes], draw: Draw) -> None:
    """One is missing, has another name, shape or dtype, or another one's values."""
    name = draw(st.sampled_from(["model-1.safetensors", "model-2.safetensors"]))
    tensors = load(files[name])
    key = draw(st.sampled_from(sorted(tensors)))
    tensor, how = tensors.pop(key), draw(st.sampled_from(["drop", "rename", "other", *SHAPES, "cast", "view"]))
    if how == "rename":
        endings = ("weight", "scales", "weight_scale", "qweight", "weight_packed", "g_idx", "bias", "W_q", "weights")
        other = draw(st.sampled_from([key.rpartition(".")[0] + "." + ending for ending in endings]))
        tensors[draw(st.sampled_from([other, key.replace("0", "7"), key.replace("w1", "w9"), "x." + key]))] = tensor
    elif how == "other":
        tensors[key] = tensors[draw(st.sampled_from(sorted(tensors)))].clone()
    elif how in SHAPES:
        tensors[key] = SHAPES[how](tensor).contiguous()
    elif how == "cast":
        tensors[key] = tensor.to(draw(st.sampled_from(DTYPES)))
    elif how == "view":
        dtype = draw(st.sampled_from(DTYPES))
        fits = tensor.dim() and tensor.shape[-1] * tensor.itemsize % dtype.itemsize == 0
        tensors[key] = tensor.view(dtype) if fits else tensor
    files[name] = save(tensors)


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda tensor: tensor.mT if tensor.dim() > 1 else tensor[None],
    "flatten": lambda tensor: tensor.flatten(),
    "shorten": lambda tensor: tensor[:-1] if tensor.dim() and len(tensor) > 1 else tensor.flatten()[:0],
    "narrow": lambda tensor: tensor[..., ::2] if tensor.dim() else tensor[None, None],
    "lengthen": lambda tensor: torch.cat((tensor, tensor)) if tensor.dim() else tensor.repeat(2),
    "more dimensions": lambda tensor: tensor[None, ..., None],
    "nothing": lambda tensor: tensor.flatten()[:0],
    "one": lambda tensor: tensor.flatten()[:1].reshape(()),
}
CHANGES = (flip_a_header, flip_json, truncate, drop_a_file, change_config, change_a_tensor, change_a_tensor)


def files_load_or_say_why(folder: Path, files: dict[str, bytes]) -> None:
    """`loads_or_says_why` of a folder that has these files and no others."""
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    loads_or_says_why(folder)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_safetensors(kind: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    base = tmp_path_factory.getbasetemp()
    files = dict(whole(kind, base))
    data.draw(st.sampled_from(CHANGES))(files, data.draw)
    files_load_or_say_why(base / f"mutated-{kind}", files)


SCALES = ("weight_scale_inv", "weight_scale", "scales")


def _without_an_expert(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if ".experts.3." in name]:
        del tensors[name]


def _without_a_scale(tensors: dict[str, Tensor]) -> None:
    del tensors[_scale(tensors)]


def _scale(tensors: dict[str, Tensor]) -> str:
    return next(name for name in sorted(tensors) if ".experts.3.w1." in name and name.endswith(SCALES))


def _scale_of(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        name = _scale(tensors)
        tensors[name] = change(tensors[name]).contiguous()

    return apply


BAD: dict[str, tuple[Callable[[dict[str, Tensor]], None], dict[str, Any]]] = {
    "a missing expert": (_without_an_expert, {}),
    "a missing scale": (_without_a_scale, {}),
    "too few scales": (_scale_of(lambda scale: scale[:, :-1]), {}),
    "scales of too few rows": (_scale_of(lambda scale: scale[:-1]), {}),
    "scales in three dimensions": (_scale_of(lambda scale: scale[None]), {}),
    "scales of whole numbers": (_scale_of(lambda scale: scale.to(torch.int64)), {}),
    "neurons that the config denies": (lambda _: None, {"intermediate_size": 192}),
    "a width that the config denies": (lambda _: None, {"hidden_size": 128}),
    "experts that the config denies": (lambda _: None, {"num_local_experts": 16}),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_is_named(
    kind: str, bad: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    files = dict(whole(kind, tmp_path_factory.getbasetemp()))
    tensors = load(files["model-1.safetensors"]) | load(files["model-2.safetensors"])
    change, config = BAD[bad]
    change(tensors)
    (tmp_path / "model.safetensors").write_bytes(save(tensors))
    (tmp_path / "config.json").write_text(json.dumps(json.loads(files["config.json"]) | config))
    line = _end(tmp_path, 0, 1)
    assert isinstance(line, str)
    assert "\n" not in line
    if config:
        assert "model.layers.0." in line
    else:
        assert "experts.3." in line or line.endswith(" in expert 3")


# --- GGUF


@cache
def whole_gguf(family: str, base: Path) -> tuple[bytes, int]:
    """A file, and where its tensors begin."""
    test_sources_gguf = pytest.importorskip("test_sources_gguf", reason="needs gguf")
    architecture, kind = GGUF_KINDS[family]
    path = base / f"whole-{family}.gguf"
    changes = {"num_hidden_layers": 1}
    model = test_sources_gguf._build(
        family, **{k: v for k, v in changes.items() if family != "mixtral" or "mlp" not in k}
    )
    test_sources_gguf.write_gguf(path, model, architecture, kind, test_sources_gguf.by_package(kind))
    data = path.read_bytes()
    return data, min(entry.start for entry in parse_gguf("m", data, len(data)).tensors)


def flip_its_header(data: bytearray, header: int, draw: Draw) -> bytearray:
    return bytearray(flipped(bytes(data), draw, header))


def cut_it(data: bytearray, header: int, draw: Draw) -> bytearray:
    return data[: draw(st.one_of(st.integers(0, len(data) - 1), st.integers(0, header)))]


def change_an_entry(data: bytearray, header: int, draw: Draw) -> bytearray:
    """A tensor's dimensions, type or place are others."""
    names = [entry.name.encode() for entry in parse_gguf("m", data, len(data)).tensors]
    name = draw(st.sampled_from(names))
    at = data.rindex(name, 0, header) + len(name)
    (dimensions,) = struct.unpack_from("<I", data, at)
    places = {"dimensions": at, "type": at + 4 + 8 * dimensions, "offset": at + 8 + 8 * dimensions}
    places |= {f"size {i}": at + 4 + 8 * i for i in range(dimensions)}
    place = draw(st.sampled_from(sorted(places)))
    code = "<I" if place in ("dimensions", "type") else "<Q"
    (value,) = struct.unpack_from(code, data, places[place])
    others = [value * 2, value // 2, value + 1, value + 32, max(value - 32, 0), 0, 2, 8, 14, 30, 40, 2**31]
    struct.pack_into(code, data, places[place], draw(st.sampled_from(others)) % 2**32)
    return data


def rename_an_entry(data: bytearray, header: int, draw: Draw) -> bytearray:
    """As if it were missing: a name of the same length, or that of another tensor."""
    names = [entry.name.encode() for entry in parse_gguf("m", data, len(data)).tensors]
    name = draw(st.sampled_from(names))
    others = [other for other in names if len(other) == len(name)] + [name[:-1] + b"X", name.replace(b"0", b"7")]
    at = data.rindex(name, 0, header)
    data[at : at + len(name)] = draw(st.sampled_from(others))
    return data


def change_the_metadata(data: bytearray, header: int, draw: Draw) -> bytearray:
    """A number that contradicts the tensors, or a key that is not there."""
    keys = [key.encode() for key, value in parse_gguf("m", data, len(data)).metadata.items() if type(value) is int]
    key = draw(st.sampled_from(keys))
    at = data.index(key, 0, header) + len(key)
    if draw(st.booleans()):
        data[at - 1 : at] = b"Z"
        return data
    (value,) = struct.unpack_from("<I", data, at + 4)
    others = [value * 2, value // 2, value + 1, max(value - 1, 0), 0, 1, 3, 200]
    struct.pack_into("<I", data, at + 4, draw(st.sampled_from(others)) % 2**32)
    return data


GGUF_CHANGES = (flip_its_header, cut_it, change_an_entry, rename_an_entry, change_the_metadata)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.long)])
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_gguf(family: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    base = tmp_path_factory.getbasetemp()
    content, header = whole_gguf(family, base)
    path = base / f"mutated-{family}.gguf"
    path.write_bytes(data.draw(st.sampled_from(GGUF_CHANGES))(bytearray(content), header, data.draw))
    loads_or_says_why(path)


@pytest.mark.parametrize("kind", [*KINDS, *GGUF_KINDS])
def test_the_whole_ones_load(kind: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """And what the tests above look for is seen: a weight that no file has differs from load to load."""
    base = tmp_path_factory.getbasetemp()
    if kind in GGUF_KINDS:
        path = tmp_path / "m.gguf"
        path.write_bytes(whole_gguf(kind, base)[0])
    else:
        path = tmp_path
        for name, content in whole(kind, base).items():
            (path / name).write_bytes(content)
    loads_or_says_why(path)
    with memory_full_of(0x7F, 1):
        model = moestro.load(str(path), dtype="float32", device="cpu", threads=1)
        left = torch.empty(3)
    with memory_full_of(0x00, 2):
        assert not torch.equal(bits(left), bits(torch.empty(3)))
    assert len(list(weights_of(model))) > 10
