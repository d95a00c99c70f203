"""Matrices as files hold them, read, packed and unpacked: equal to what each format's own library makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moestro.memory.formats import MatrixFormat, format_named, uniform
from moestro.memory.formats.raw import GGUF_BLOCKS, RawMatrix, read_raw

ROWS, COLUMNS = 37, 1024
HALVES = {  # where blocks of ggml have fp16 numbers, in bytes
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q8_0": (0,),
    "iq4_nl": (0,),
    "mxfp4": (),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
    "iq4_xs": (0,),
}

# How near unpacked weights come to the library's own in float32, of |w|. All but one are bit for bit: codes are small
# whole numbers or floats of at most 4 bits, so that scale * (code - zero) rounds once wherever it is computed, and
# K-quants multiply d by the small scale first, as ggml does.
BOUNDS: dict[str, tuple[str, float]] = {
    **dict.fromkeys(GGUF_BLOCKS, ("gguf", 0.0)),
    "mxfp4 of gpt-oss": ("Transformers' integrations/mxfp4.py", 0.0),
    "fp4 of DeepSeek-V4": ("Transformers' integrations/finegrained_fp8.py", 0.0),
    "fp8": ("Transformers' integrations/finegrained_fp8.py", 0.0),
    "fp8 of ue8m0": ("Transformers' integrations/finegrained_fp8.py", 0.0),
    "mxfp8": ("Transformers' integrations/finegrained_fp8.py", 0.0),
    "words": ("compressed-tensors", 0.0),
    "words with zeros": ("compressed-tensors", 0.0),
    "words of 8 bits": ("compressed-tensors", 0.0),
    "words of channels": ("compressed-tensors", 0.0),
    # compressed-tensors divides by its global scale; the panel has the reciprocal, a float32 of its own.
    "nvfp4": ("compressed-tensors", 2**-20),
    "bytes with zeros": ("a writer of this file", 0.0),
    "awq": ("a writer of this file", 0.0),
    "awq without zeros": ("a writer of this file", 0.0),
    "gptq": ("a writer of this file", 0.0),
    "gptq with zeros": ("a writer of this file", 0.0),
    "gptq of 8 bits": ("a writer of this file", 0.0),
    "gptq in act-order": ("a writer of this file", 0.0),
}
Case = tuple[RawMatrix, Tensor, Tensor | None]  # what a file holds, float32 [R, K], the order of columns in panels


def random_bytes(*size: int) -> Tensor:
    return torch.randint(0, 256, size, dtype=torch.uint8)


def finite_halves(*size: int) -> Tensor:
    """float16 of random bits, subnormal and negative ones too."""
    bits = torch.randint(0, 2**15, size, dtype=torch.int32)
    bits = torch.where(bits >> 10 == 31, bits & 0x3FF | 15 << 10, bits) | torch.randint(0, 2, size) << 15
    return (bits - (bits >= 2**15) * 2**16).to(torch.int16).view(torch.float16)


def gguf_case(name: str) -> Case:
    """Random bytes: each of ggml's blocks is valid, whatever its bits, if its floats are finite."""
    import gguf

    size, n_bytes = GGUF_BLOCKS[name]
    blocks = random_bytes(ROWS, COLUMNS // size, n_bytes)
    for at in HALVES[name]:
        blocks[..., at : at + 2] = finite_halves(ROWS, COLUMNS // size, 1).view(torch.uint8)
    if name == "mxfp4":
        blocks[..., 0] = blocks[..., 0].clamp(max=252)  # products beyond are no float32
    weight = blocks.flatten(1)
    expected = gguf.dequantize(weight.numpy(), gguf.GGMLQuantizationType[name.upper()])
    return RawMatrix("gguf", ROWS, COLUMNS, {"weight": weight}, format_named(name)), torch.from_numpy(expected), None


def gpt_oss() -> Case:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = random_bytes(ROWS, COLUMNS // 32, 16), random_bytes(ROWS, COLUMNS // 32).clamp(max=252)
    expected = convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.float32)[0].T
    tensors = {"blocks": blocks, "scales": scales}
    return RawMatrix("mxfp4", ROWS, COLUMNS, tensors, format_named("mxfp4")), expected, None


def fine_grained(weight: Tensor, scales: Tensor) -> Tensor:
    """By Transformers, which takes whole blocks only."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    dequantized: Tensor = Fp8Dequantize(None)._dequantize_one(weight, scales, torch.float32)
    return dequantized


def fp4() -> Case:
    weight, scales = random_bytes(ROWS, COLUMNS // 2), random_bytes(ROWS, COLUMNS // 32).clamp(1, 252)
    tensors = {"weight": weight, "scales": scales}
    expected = fine_grained(weight.view(torch.int8), scales)
    return RawMatrix("nibbles", ROWS, COLUMNS, tensors, format_named("mxfp4")), expected, None


def e4m3(*size: int) -> Tensor:
    codes = random_bytes(*size)
    return torch.where(codes & 127 == 127, codes ^ 1, codes).view(torch.float8_e4m3fn)


def fp8(scales: Tensor) -> Case:
    """Blocks at the edges are smaller than 128 x 128."""
    rows, columns = 256 + ROWS, 384 + 72
    weight = e4m3(512, 512)[:rows, :columns]
    whole = torch.zeros(384, 512, dtype=torch.float8_e4m3fn)
    whole[:rows, :columns] = weight
    expected = fine_grained(whole, scales.float())[:rows, :columns]
    tensors = {"weight": weight, "scales": scales}
    return RawMatrix("fp8", rows, columns, tensors, format_named("fp8")), expected, None


def mxfp8() -> Case:
    weight, scales = e4m3(ROWS, COLUMNS), random_bytes(ROWS, COLUMNS // 32).clamp(20, 230)
    tensors = {"weight": weight, "scales": scales}
    return RawMatrix("fp8", ROWS, COLUMNS, tensors, format_named("mxfp8")), fine_grained(weight, scales), None


def compressed(bits: int, group: int, *, zeros: bool = False) -> Case:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    rows, low = 40, -(2 ** (bits - 1))  # zeros are packed along the rows
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=not zeros, **strategy)
    codes = torch.randint(low, -low, (rows, COLUMNS), dtype=torch.int8)
    groups = COLUMNS // group if group else 1
    scales = torch.randn(rows, groups).to(torch.bfloat16)
    points = torch.randint(low, -low, (rows, groups), dtype=torch.int8) if zeros else None
    expected = dequantize(codes, scales.float(), points, args=args, dtype=torch.float32)
    tensors = {"weight": pack_to_int32(codes, bits), "scales": scales}
    if points is not None:
        tensors["zeros"] = pack_to_int32(points, bits, packed_dim=0)
    return RawMatrix("words", rows, COLUMNS, tensors, uniform(bits, group, "bf16", zeros)), expected, None


def nvfp4() -> Case:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    args = QuantizationArgs(num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16)
    weight, scales, divisor = random_bytes(ROWS, COLUMNS // 2), e4m3(ROWS, COLUMNS // 16), torch.rand(1) * 5000 + 1
    codes = unpack_fp4_from_uint8(weight, ROWS, COLUMNS, dtype=torch.float32)
    expected = dequantize(codes, scales.float(), args=args, global_scale=divisor, dtype=torch.float32)
    tensors = {"weight": weight, "scales": scales, "tensor": (1 / divisor).reshape(())}
    return RawMatrix("nibbles", ROWS, COLUMNS, tensors, format_named("nvfp4")), expected, None


def words_along(codes: np.ndarray, bits: int, places: tuple[int, ...] | None = None) -> Tensor:
    """Whole numbers as 32-bit words along the last dimension; `places`: which of the codes each place has."""
    each = 32 // bits
    words = np.zeros((*codes.shape[:-1], codes.shape[-1] // each), dtype=np.uint64)
    for place, code in enumerate(places or range(each)):
        words |= codes[..., code::each].astype(np.uint64) << np.uint64(bits * place)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def in_groups(
    bits: int, group: int, *, zeros: bool, order: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Tensor]:
    """Codes [R, K], zeros [R, G], scales [R, G] and weights: column k is of group order[k]."""
    rows, random = 48, np.random.default_rng(0)
    codes = random.integers(0, 2**bits, (rows, COLUMNS))
    points = random.integers(0, 2**bits, (rows, COLUMNS // group))
    points = points if zeros else np.full_like(points, 2 ** (bits - 1))
    scales = random.standard_normal((rows, COLUMNS // group)).astype(np.float16)
    of = np.arange(COLUMNS) // group if order is None else order
    weights = (codes - points[:, of]).astype(np.float32) * scales[:, of].astype(np.float32)
    return codes, points, scales, torch.from_numpy(weights)


def awq(*, zeros: bool) -> Case:
    codes, points, scales, expected = in_groups(4, 128, zeros=zeros)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {"weight": words_along(codes.T, 4, order), "scales": torch.from_numpy(scales.T.copy())}
    if zeros:
        tensors["zeros"] = words_along(points.T, 4, order)
    return RawMatrix("awq", len(codes), COLUMNS, tensors, uniform(4, 128, zeros=zeros)), expected, None


def gptq(bits: int, *, zeros: bool = False, act_order: bool = False) -> Case:
    of = np.random.default_rng(1).permutation(COLUMNS) // 128 if act_order else None
    codes, points, scales, expected = in_groups(bits, 128, zeros=zeros, order=of)
    weight = words_along(codes, bits).T.contiguous()  # [K / n, R]
    tensors = {"weight": weight, "scales": torch.from_numpy(scales.T.copy())}
    if zeros:
        tensors["zeros"] = words_along(points.T, bits)
    order = None if of is None else torch.from_numpy(of).argsort(stable=True)
    return RawMatrix("gptq", len(codes), COLUMNS, tensors, uniform(bits, 128, zeros=zeros)), expected, order


def signed_bytes() -> Case:
    codes, points = (torch.randint(-128, 128, (ROWS, n), dtype=torch.int8) for n in (COLUMNS, COLUMNS // 32))
    scales = torch.randn(ROWS, COLUMNS // 32).half()
    spread = [one.float().repeat_interleave(32, 1) for one in (points, scales)]
    tensors = {"weight": codes, "scales": scales, "zeros": points}
    expected = (codes.float() - spread[0]) * spread[1]
    return RawMatrix("bytes", ROWS, COLUMNS, tensors, uniform(8, 32, zeros=True)), expected, None


CASES: dict[str, Callable[[], Case]] = {
    **{name: (lambda name=name: gguf_case(name)) for name in GGUF_BLOCKS},
    "mxfp4 of gpt-oss": gpt_oss,
    "fp4 of DeepSeek-V4": fp4,
    "fp8": lambda: fp8(torch.randn(3, 4)),
    "fp8 of ue8m0": lambda: fp8(random_bytes(3, 4).clamp(20, 230).view(torch.float8_e8m0fnu)),
    "mxfp8": mxfp8,
    "words": lambda: compressed(4, 32),
    "words with zeros": lambda: compressed(4, 128, zeros=True),
    "words of 8 bits": lambda: compressed(8, 32),
    "words of channels": lambda: compressed(8, 0),
    "nvfp4": nvfp4,
    "bytes with zeros": signed_bytes,
    "awq": lambda: awq(zeros=True),
    "awq without zeros": lambda: awq(zeros=False),
    "gptq": lambda: gptq(4),
    "gptq with zeros": lambda: gptq(4, zeros=True),
    "gptq of 8 bits": lambda: gptq(8, zeros=True),
    "gptq in act-order": lambda: gptq(4, zeros=True, act_order=True),
}


def test_each_case_has_a_bound() -> None:
    assert CASES.keys() == BOUNDS.keys()


@pytest.mark.parametrize("name", CASES)
def test_unpacked_weights_are_the_librarys(name: str) -> None:
    raw, expected, order = CASES[name]()
    before = {key: tensor.clone() for key, tensor in raw.tensors.items()}
    coded = read_raw(raw, columns=order)
    found = raw.fmt.unpack(raw.fmt.write(coded), raw.columns, torch.float32)[: raw.rows]
    expected = expected if order is None else expected[:, order]
    assert expected.dtype == found.dtype == torch.float32
    assert found.isfinite().all()
    assert found.count_nonzero() > 0.5 * found.numel()
    library, bound = BOUNDS[name]
    assert ((found - expected).abs() <= bound * expected.abs()).all(), f"not what {library} makes of it"
    for key, tensor in raw.tensors.items():  # views of a file, which is not written to
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), before[key].reshape(-1).view(torch.uint8)), key


@pytest.mark.parametrize("name", CASES)
def test_rows_may_be_chosen_and_sorted(name: str) -> None:
    """As gate and up are, whose rows take turns in one matrix, or follow the order of down's columns."""
    raw, *_ = CASES[name]()
    index = torch.arange(1, raw.rows, 2)[torch.randperm(raw.rows // 2)] if raw.layout != "fp8" else torch.arange(16, 80)
    if raw.fmt.name == "mxfp8":
        index = torch.arange(1, raw.rows, 2)
    whole, some = read_raw(raw), read_raw(raw, index)
    for each in fields(whole):
        all_rows, chosen = getattr(whole, each.name), getattr(some, each.name)
        if all_rows is not None and each.name != "tensor":
            bits: list[Any] = [one.contiguous().view(torch.uint8) for one in (all_rows[index], chosen)]
            assert torch.equal(*bits), each.name
    if raw.fmt.name != "fp8" or int(index[0]) % 16 == 0:
        panels = raw.fmt.write(some)
        unpacked = raw.fmt.unpack(raw.fmt.write(whole), raw.columns, torch.float32)[index]
        assert torch.equal(raw.fmt.unpack(panels, raw.columns, torch.float32)[: len(index)], unpacked)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4"])
def test_what_ggufs_own_writer_quantizes_is_read(name: str) -> None:
    import gguf

    weights = np.random.default_rng(2).standard_normal((ROWS, 256)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[name.upper()]
    packed = gguf.quantize(weights, kind)
    fmt: MatrixFormat = format_named(name)
    raw = RawMatrix("gguf", ROWS, 256, {"weight": torch.from_numpy(packed)}, fmt)
    found = fmt.unpack(fmt.write(read_raw(raw)), 256, torch.float32)[:ROWS]
    assert torch.equal(found, torch.from_numpy(gguf.dequantize(packed, kind)))
    assert (found.numpy() - weights).std() < 0.15
