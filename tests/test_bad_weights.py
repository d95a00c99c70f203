"""Weights that no usual checkpoint has, at all bits and wherever a model has them: one line, or a finite result."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from families import save_model
from moestro import load
from moestro.compute import cpu
from moestro.errors import CheckpointError
from moestro.loading.sources import gguf_types
from moestro.loading.sources.gguf_file import GgufTensor
from moestro.memory.formats import FORMATS, MATRIX_FORMATS, ExpertShape, MatrixFormat, quantize
from moestro.memory.formats.matrix import uniform
from moestro.planning.formats import QUANTIZED
from test_plain import load_by_transformers, load_mapped

# Mixtral's published name, what a line calls it as it is read from the mapped files, and by Transformers' loader.
EXPERT, CALLED = "model.layers.1.block_sparse_moe.experts.2", "model.layers.1.mlp.experts"
PLACES = {
    "gate": (f"{EXPERT}.w1.weight", f"{CALLED}, expert 2, gate", f"{CALLED}.gate_up_proj of expert 2"),
    "up": (f"{EXPERT}.w3.weight", f"{CALLED}, expert 2, up", f"{CALLED}.gate_up_proj of expert 2"),
    "down": (f"{EXPERT}.w2.weight", f"{CALLED}, expert 2, down", f"{CALLED}.down_proj of expert 2"),
    "attention": ("model.layers.0.self_attn.q_proj.weight",) * 3,
    "head": ("lm_head.weight",) * 3,
}


def _one(value: float) -> Callable[[Tensor], Tensor]:
    def spoiled(weight: Tensor) -> Tensor:
        return weight.index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(value, dtype=weight.dtype))

    return spoiled


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "NaN": _one(float("nan")),
    "infinite": _one(float("inf")),
    "negative infinite": _one(float("-inf")),
    "zeros": torch.zeros_like,
    "one huge": _one(127 * 65504 * 2.0),
    "subnormal": lambda weight: weight * 1e-40,
    "a subnormal among zeros": lambda weight: _one(1e-45)(torch.zeros_like(weight)),
}
NOT_FINITE = {"NaN": "nan", "infinite": "inf", "negative infinite": "-inf"}
LOADERS = {"mapped files": load_mapped, "Transformers": load_by_transformers}
EMULATED: dict[str, Any] = {"device": "emulated", "gpu_memory": "32MiB", "policy": "lru", "link": None}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source")
    save_model("mixtral", path)
    return path


def spoiled(source: Path, target: Path, place: str, kind: str) -> Path:
    tensors = load_file(source / "model.safetensors")
    name = PLACES[place][0]
    tensors[name] = KINDS[kind](tensors[name])
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def refusal(kind: str, n_bits: int) -> str | None:
    """What a line must say, or None where weights load."""
    if kind in NOT_FINITE:
        return f"a weight is {NOT_FINITE[kind]}, in row 3 and column 5 of its matrix, but only finite ones can be"
    if kind == "one huge" and n_bits == 8:
        return "a weight has a size of 1.66e+07, but signed bytes with a float16 scale reach 8,319,008; load the"
    return None


@pytest.mark.sample(40)
@pytest.mark.parametrize("n_bits", [8, 4, 3, 2])
@pytest.mark.parametrize(("kind", "place"), [*product(KINDS, PLACES)])
def test_one_line_or_a_finite_result(kind: str, place: str, n_bits: int, source: Path, tmp_path: Path) -> None:
    path = spoiled(source, tmp_path, place, kind)
    asked = {"bits": n_bits, "head_bits": n_bits, "dtype": "float32"}
    if (says := refusal(kind, n_bits)) is None:
        model = load_mapped(path, **asked)
        with torch.no_grad():
            assert model(torch.arange(3, 40)[None]).logits.isfinite().all()
        return
    for loader, called in zip(LOADERS.values(), PLACES[place][1:], strict=True):
        with pytest.raises(CheckpointError) as refused:
            loader(path, **asked)
        assert str(refused.value).startswith(f"{called}: {says}")
        assert "\n" not in str(refused.value)


@pytest.mark.sample(8)
@pytest.mark.parametrize("n_bits", [8, 4, 3, 2])
@pytest.mark.parametrize(("kind", "place"), [*product(("NaN", "one huge", "zeros", "subnormal"), ("gate", "down"))])
def test_experts_of_a_device(kind: str, place: str, n_bits: int, source: Path, tmp_path: Path) -> None:
    path, says = spoiled(source, tmp_path, place, kind), refusal(kind, n_bits)
    for loader, called in zip(LOADERS.values(), PLACES[place][1:], strict=True):
        if says is None:
            model = loader(path, bits=n_bits, dtype="float32", **EMULATED)
            with torch.no_grad():
                assert model(torch.arange(3, 40)[None]).logits.isfinite().all()
            continue
        with pytest.raises(CheckpointError) as refused:
            loader(path, bits=n_bits, dtype="float32", **EMULATED)
        assert str(refused.value).startswith(f"{called}: {says}")


@pytest.mark.parametrize("n_bits", [8, 4, 3, 2])
@pytest.mark.parametrize("fit", ["hqq", "none"])
def test_a_weight_that_is_not_finite_is_refused_with_any_fit(
    n_bits: int, fit: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="down: a weight is nan, in row 3"):
        load(str(spoiled(source, tmp_path, "down", "NaN")), bits=n_bits, fit=fit, threads=1, device="cpu")


def test_transcoded_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of GGUF's TQ2_0 is 256 weights in 64 bytes, and a float16 scale, here NaN."""
    monkeypatch.setattr(gguf_types, "_ROWS_AT_ONCE", 3)
    blocks = torch.zeros(5, 66, dtype=torch.uint8)
    blocks[4, 64:] = torch.tensor([float("nan")], dtype=torch.float16).view(torch.uint8)
    tensor = GgufTensor((5, 256), "TQ2_0", blocks)
    with pytest.raises(CheckpointError, match="ffn_down, from row 3 on: a weight is nan, in row 1 and column 0 of"):
        gguf_types.stored_matrix("ffn_down", tensor, blocks, transcode=True)


@pytest.mark.parametrize("n_bits", [8, 4, 3, 2])
def test_the_place_in_a_matrix_is_named(n_bits: int) -> None:
    """Of down's too, which is cut into blocks."""
    fmt, shape = FORMATS[QUANTIZED[n_bits]], ExpertShape(64, 600, has_gate=True, has_bias=False)
    for part, size in shape.parts.items():
        weight = torch.randn(size)
        weight[61, -2] = float("nan")
        with pytest.raises(CheckpointError, match=f"in row 61 and column {size[1] - 2} of its matrix"):
            fmt.pack(torch.empty(fmt.expert_bytes(shape), dtype=torch.uint8), shape, {part: weight})


@pytest.mark.parametrize("name", ["int8", "hqq4", "hqq3", "hqq2"])
@pytest.mark.parametrize("by", ["kernels", "twin"])
def test_finite_weights_come_back_finite_and_near(name: str, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all sizes that float32 has, up to what a scale covers: within two steps of their group, or 2^-24."""
    fmt = MATRIX_FORMATS[name]
    cpu.kernel_format(fmt)  # which remembers what it finds
    if by == "twin":
        monkeypatch.setattr(cpu, "_kernels", None)
    for exponent in range(-149, 21 if name == "int8" else 127, 4):
        weights = torch.linspace(-1, 1, 20 * 128).view(20, 128)[:, torch.randperm(128)] * 2.0**exponent
        weights[3], weights[4, :64] = 0, weights[4, 0]
        found = fmt.unpack(fmt.pack(weights), 128, torch.float32)[:20]
        assert found.isfinite().all()
        groups, again = (each.double().unflatten(1, (-1, fmt.group)) for each in (weights, found))
        step = (groups.abs().amax(2) + groups.amax(2) - groups.amin(2)) / (2**fmt.code_bits - 1)
        assert ((groups - again).abs() <= 2 * step[..., None] + 2.0**-24).all(), exponent
        assert (found[3] == 0).all()


def written(write: Callable[..., None], blocks: Tensor, fmt: MatrixFormat, **how: Any) -> Tensor:
    out = torch.zeros(len(blocks), fmt.matrix_bytes(*blocks.shape[1:]), dtype=torch.uint8)
    write(blocks, fmt, out, **how)
    return out


INT8_KINDS = {
    "usual": lambda: torch.randn(70, 330) * 0.02,
    "ties": lambda: torch.randint(-254, 255, (70, 330)) / 2.0,
    "all sizes": lambda: torch.randn(70, 330) * 2.0 ** torch.randint(-149, 20, (70, 1)),
    "one row and column": lambda: torch.randn(1, 1),
    "a size of no format": lambda: torch.randn(17, 65),
    "large": lambda: torch.rand(16, 64) * 65000 * 127,
}


@pytest.mark.parametrize("kind", INT8_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_int8_panels_are_the_twins(kind: str, dtype: torch.dtype, threads: int) -> None:
    weights = INT8_KINDS[kind]()
    weights = (weights.clamp(-65504, 65504) if dtype == torch.float16 else weights).to(dtype)
    for group in (16, 32, 64, 128):
        fmt = MATRIX_FORMATS["int8"] if group == 64 else uniform(8, group)
        expected = written(quantize.write_int8_in_torch, weights[None], fmt)
        for each in (weights, weights.t().contiguous().t()):
            assert torch.equal(written(cpu.write_int8, each[None], fmt, threads=threads), expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_int8_blocks_of_any_strides(threads: int) -> None:
    """Columns of down, cut into blocks, to places with others between; as the twin, and as each block by itself."""
    weights, fmt = torch.randn(48, 320).bfloat16(), MATRIX_FORMATS["int8"]
    blocks = weights.unflatten(1, (5, 64)).transpose(0, 1)  # [5, 48, 64]
    size = fmt.matrix_bytes(48, 64)
    ours, twins = (torch.full((5, size + 96), 7, dtype=torch.uint8) for _ in range(2))
    cpu.write_int8(blocks, fmt, ours[:, 32 : 32 + size], threads=threads)
    quantize.write_int8_in_torch(blocks, fmt, twins[:, 32 : 32 + size])
    assert torch.equal(ours, twins)
    for block, found in zip(blocks, ours[:, 32 : 32 + size], strict=True):
        assert torch.equal(fmt.pack(block).flatten(), found)


def test_every_half_is_rounded_as_the_twin_rounds_it() -> None:
    fmt = MATRIX_FORMATS["int8"]
    halves = torch.arange(2**16).to(torch.uint16).view(torch.float16)
    halves = halves[halves.isfinite()]
    for order in (torch.arange(len(halves)), torch.randperm(len(halves))):
        weights = halves[order].view(-1, 64)
        ours, twins = (written(write, weights[None], fmt) for write in (cpu.write_int8, quantize.write_int8_in_torch))
        assert torch.equal(ours, twins)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e9])
def test_int8_refuses_what_the_twin_refuses(dtype: torch.dtype, bad: float) -> None:
    for row, column in [(0, 0), (40, 63), (69, 199)]:
        weights = torch.randn(70, 200).to(dtype)
        weights[row, column] = bad
        said = []
        for write in (cpu.write_int8, quantize.write_int8_in_torch):
            with pytest.raises(CheckpointError) as refused:
                written(write, weights[None], MATRIX_FORMATS["int8"])
            said.append(str(refused.value))
        assert said[0] == said[1]
        expected = "a weight has a size of 1e+09" if weights.isfinite().all() else f"in row {row} and column {column} "
        assert expected in said[0].replace("9.98e+08", "1e+09")  # as bfloat16 has it


def test_packing_int8_takes_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu.levels():
        pytest.skip("needs the compiled kernels")
    monkeypatch.setattr(cpu.quantize, "pack_codes", None)
    assert MATRIX_FORMATS["int8"].pack(torch.randn(20, 70)).shape == (2, MATRIX_FORMATS["int8"].panel_bytes(70))
