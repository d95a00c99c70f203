"""Formats and the plain-torch expert FFN, against float64 arithmetic on the unpacked weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hqq.core.quantize import Quantizer
from torch import Tensor

from moestro.compute.cpu import CpuExperts, levels
from moestro.compute.experts import ExpertMath, ExpertWork, run_experts
from moestro.compute.gpu import kernel_of
from moestro.memory.formats import FORMATS, MATRIX_FORMATS, ExpertFormat, ExpertShape, MatrixFormat
from moestro.memory.formats.codes import values
from moestro.memory.formats.quantize import quantize_hqq
from moestro.planning.descriptor import Scale

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHAPES = [
    ExpertShape(hidden=32, neurons=64),
    ExpertShape(hidden=48, neurons=200),
    ExpertShape(hidden=17, neurons=24, has_gate=False),
    ExpertShape(hidden=40, neurons=130, has_bias=True),
    ExpertShape(hidden=40, neurons=96, has_gate=False, has_bias=True),
]
TOLERANCE = 1e-6  # against weights already rounded to the format


def _silu_gate(gate: Tensor | None, up: Tensor) -> Tensor:
    return torch.relu(up) ** 2 if gate is None else torch.nn.functional.silu(gate) * up


def _expert(shape: ExpertShape, fmt: ExpertFormat) -> tuple[Tensor, dict[str, Tensor]]:
    """A random expert: its packed bytes (poisoned before) and its parts as the format rounds them."""
    parts = {name: torch.randn(size) for name, size in shape.parts.items()}
    packed = torch.full((fmt.expert_bytes(shape),), 0xFF, dtype=torch.uint8)
    fmt.pack(packed, shape, parts)
    return packed, {n: p if n.endswith("bias") else _round(fmt.name, n, p) for n, p in parts.items()}


def _round(name: str, part: str, matrix: Tensor) -> Tensor:
    """A matrix as a format rounds it. Quantized groups are 64 columns, of gate and up as of down.

    HQQ's solver ends when the mean error of all groups that it is given together grows, so what it makes of one
    depends on the others, of padding too: they are given to it here as the format does.
    """
    if name in FLOATS:
        return matrix.to(FLOATS[name]).float()
    rows, columns = matrix.shape
    if name.startswith("hqq"):  # the twin, of the matrix in the order in which the format has it
        fmt = MATRIX_FORMATS[name]
        if part == "down":
            padded = torch.nn.functional.pad(matrix, (0, -columns % fmt.block, 0, -rows % 16))
            blocks = padded.unflatten(1, (-1, fmt.block)).transpose(0, 1)
            found = values(fmt, quantize_hqq(blocks.flatten(0, 1), fmt)).view_as(blocks)
            return found.transpose(0, 1).flatten(1)[:rows, :columns]
        padded = torch.nn.functional.pad(matrix, (0, 0, 0, -rows % fmt.block))
        return values(fmt, quantize_hqq(padded, fmt))[:rows]
    groups = torch.nn.functional.pad(matrix, (0, -columns % 64, 0, -rows % (16 if part == "down" else 64)))
    groups = groups.unflatten(1, (-1, 64))  # [R, G, 64]
    if part == "down":  # one block of neurons after another
        groups = groups.transpose(0, 1)
    if name == "int8":
        scale = (groups.abs().amax(-1, keepdim=True) / 127).half().float()
        found = ((groups / scale).nan_to_num(0.0).round().clamp(-127, 127) * scale).view_as(groups)
    else:
        whole, meta = Quantizer.quantize(
            groups.flatten(0, 1), nbits=4, group_size=64, axis=1, round_zero=True, bitpack=False, device="cpu"
        )
        scale, zero = meta["scale"].half().float(), meta["zero"].half().float()
        found = ((whole - zero) * scale).view_as(groups)
    if part == "down":
        found = found.transpose(0, 1)
    return found.flatten(1)[:rows, :columns]


def _float64(shape: ExpertShape, parts: dict[str, Tensor], x: Tensor, gate: Callable[..., Tensor]) -> Tensor:
    p = {name: part.double() for name, part in parts.items()}
    up = x.double() @ p["up"].T + p.get("up_bias", 0)
    g = x.double() @ p["gate"].T + p.get("gate_bias", 0) if shape.has_gate else None
    return gate(g, up) @ p["down"].T + p.get("down_bias", 0)


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpacking_gives_back_what_was_packed(name: str, shape: ExpertShape) -> None:
    fmt = FORMATS[name]
    packed, parts = _expert(shape, fmt)
    assert packed.numel() % 64 == 0
    expert = fmt.unpack(packed, shape, range(shape.neurons), torch.float32)
    for part, tensor in parts.items():
        torch.testing.assert_close(getattr(expert, part), tensor, rtol=0, atol=0)
    assert (expert.gate is None) != shape.has_gate


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_weights_that_are_zero_or_equal_or_tiny_survive(name: str) -> None:
    matrix = torch.zeros(20, 130)
    matrix[1], matrix[2] = 0.5, -0.25
    ranges = torch.tensor([1e-5, 5e-5, 1e-4, 2e-4, 7e-4, 8e-4, 1e-2])[:, None]
    matrix[3:10] = (torch.rand(7, 130) - 0.5) * ranges
    fmt = MATRIX_FORMATS[name]
    again = fmt.unpack(fmt.pack(matrix), 130, torch.float32)[:20]
    rtol = 1 / 100 if fmt.scale is Scale.SHIFTED else 1e-3  # a scale and a zero are rounded to bytes
    torch.testing.assert_close(again[:3], matrix[:3], rtol=rtol, atol=0)
    steps = min(15, 2**fmt.code_bits - 1)
    assert ((again[3:10] - matrix[3:10]).abs() <= ranges / steps * 1.1).all()


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_bits_of_a_weight_are_as_the_format_says(name: str) -> None:
    bits = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8.25, "int4": 4.5}
    bits |= {"hqq4": 4.25 + 8 / 512, "hqq3": 3.25 + 8 / 512, "hqq2": 3 + 8 / 512}
    assert MATRIX_FORMATS[name].matrix_bytes(256, 512) * 8 == bits[name] * 256 * 512


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_may_come_one_by_one_and_transposed(shape: ExpertShape) -> None:
    fmt = FORMATS["fp32"]
    packed, parts = _expert(shape, fmt)
    again = torch.full_like(packed, 0xFF)
    for name, tensor in reversed(parts.items()):
        strided = tensor.T.contiguous().T if tensor.dim() == 2 else tensor
        fmt.pack(again, shape, {name: strided})
    full = range(shape.neurons)
    a, b = (fmt.unpack(p, shape, full, torch.float32) for p in (packed, again))
    for name in parts:
        assert torch.equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_range_of_neurons_is_one_run_of_bytes(shape: ExpertShape) -> None:
    """Bytes outside `byte_range` may be anything: the neurons inside come out the same."""
    fmt = FORMATS["bf16"]
    packed, _ = _expert(shape, fmt)
    edges = [*range(0, shape.neurons, fmt.block), shape.neurons]
    covered = 0
    for start, stop in pairwise(edges):
        neurons = range(start, stop)
        span = fmt.byte_range(shape, neurons)
        assert span.start == covered
        covered = span.stop
        alone = torch.full_like(packed, 0x7F)
        alone[span.start : span.stop] = packed[span.start : span.stop]
        a, b = (fmt.unpack(p, shape, neurons, torch.float32) for p in (packed, alone))
        assert torch.equal(a.up, b.up)
        assert torch.equal(a.down, b.down)
        assert (b.down_bias is not None) == (shape.has_bias and stop == shape.neurons)
    assert covered == packed.numel()


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_expert_ffn_against_float64(name: str, shape: ExpertShape, tokens: int) -> None:
    fmt = FORMATS[name]
    math = ExpertMath(shape, fmt, _silu_gate)
    packed, parts = _expert(shape, fmt)
    x, weights = torch.randn(tokens + 2, shape.hidden), torch.rand(tokens)
    rows = torch.randperm(tokens + 2)[:tokens]
    out = torch.randn(tokens + 2, shape.hidden)
    expected = out.double().index_add(0, rows, _float64(shape, parts, x[rows], _silu_gate) * weights[:, None])
    run_experts(math, x, [ExpertWork(packed, range(shape.neurons), rows, weights)], out)
    error = (out - expected).norm() / expected.norm()
    assert error <= TOLERANCE, f"relative error {error:.2e}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shares_of_an_expert_add_up(shape: ExpertShape) -> None:
    fmt = FORMATS["fp32"]
    math = ExpertMath(shape, fmt, _silu_gate)
    packed, _ = _expert(shape, fmt)
    x, weights, rows = torch.randn(5, shape.hidden), torch.rand(5), torch.arange(5)
    whole, split = torch.zeros(5, shape.hidden), torch.zeros(5, shape.hidden)
    run_experts(math, x, [ExpertWork(packed, range(shape.neurons), rows, weights)], whole)
    edges = sorted({0, fmt.block, shape.neurons} & set(range(shape.neurons + 1)))
    shares = [range(a, b) for a, b in pairwise(edges)]
    run_experts(math, x, [ExpertWork(packed, share, rows, weights) for share in shares], split)
    assert (split - whole).norm() / whole.norm() < 1e-6


def test_a_norm_behind_the_expert_sees_its_whole_output() -> None:
    shape, fmt = ExpertShape(16, 64), FORMATS["fp32"]
    math = ExpertMath(shape, fmt, _silu_gate, post_norm=lambda y: y / y.norm(dim=-1, keepdim=True))
    packed, parts = _expert(shape, fmt)
    x = torch.randn(3, 16)
    out = torch.zeros(3, 16)
    run_experts(math, x, [ExpertWork(packed, range(64), torch.arange(3), torch.full((3,), 2.0))], out)
    y = _float64(shape, parts, x, _silu_gate)
    torch.testing.assert_close(out.double(), 2 * y / y.norm(dim=-1, keepdim=True), rtol=1e-5, atol=1e-5)


def test_many_tokens_go_through_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, fmt = ExpertShape(16, 64), FORMATS["fp32"]
    packed, _ = _expert(shape, fmt)
    x, rows, weights = torch.randn(50, 16), torch.arange(50), torch.rand(50)
    whole, pieces = torch.zeros(50, 16), torch.zeros(50, 16)
    math = ExpertMath(shape, fmt, _silu_gate)
    run_experts(math, x, [ExpertWork(packed, range(64), rows, weights)], whole)
    monkeypatch.setattr("moestro.compute.experts.TOKENS_AT_ONCE", 7)
    run_experts(math, x, [ExpertWork(packed, range(64), rows, weights)], pieces)
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


NARROW = [replace(MATRIX_FORMATS[name], group=32) for name in ("int8", "int4")]


@pytest.mark.parametrize("matrix", NARROW, ids=lambda matrix: matrix.name)
def test_kernels_refuse_other_blocks_and_groups_and_the_twin_computes_them(matrix: MatrixFormat) -> None:
    """Blocks of 32: the CPU's kernels and a GPU's know none that is no whole number of chunks of 64."""
    shape = ExpertShape(hidden=72, neurons=200)
    for fmt in (ExpertFormat(matrix), ExpertFormat(MATRIX_FORMATS[matrix.name], block=32), ExpertFormat(matrix, 32)):
        math = ExpertMath(shape, fmt, _silu_gate)
        assert (CpuExperts(threads=1).kernel(math) is None) == (fmt.block == 32)
        assert (kernel_of(math, torch.float32, torch.device("cpu")) is None) == (fmt.block == 32)
        parts = {name: torch.randn(size) for name, size in shape.parts.items()}
        packed = torch.full((fmt.expert_bytes(shape),), 0xFF, dtype=torch.uint8)
        fmt.pack(packed, shape, parts)
        unpacked = fmt.unpack(packed, shape, range(shape.neurons), torch.float32)
        step = 6.0 / (254 if matrix.name == "int8" else 12)  # a group's range lies within -4.5 .. 4.5
        for name, tensor in parts.items():
            assert (getattr(unpacked, name) - tensor).abs().max() < step
        x, rows, weights = torch.randn(3, shape.hidden), torch.arange(3), torch.rand(3)
        out = torch.zeros(3, shape.hidden)
        edge = fmt.block
        shares = (range(edge), range(edge, shape.neurons))
        CpuExperts(threads=1).run(math, x, [ExpertWork(packed, share, rows, weights) for share in shares], out)
        rounded = {name: getattr(unpacked, name) for name in parts}
        expected = _float64(shape, rounded, x, _silu_gate) * weights[:, None]
        assert (out - expected).norm() / expected.norm() <= (TOLERANCE if fmt.block == 32 else 1e-3)


def test_built_in_formats_have_the_kernels_block_and_group() -> None:
    for name, fmt in FORMATS.items():
        math = ExpertMath(ExpertShape(64, 64), fmt, _silu_gate)
        assert (CpuExperts(threads=1).kernel(math) is not None) == bool(levels()), name
