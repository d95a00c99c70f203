"""Quantized matrices as the files of checkpoints hold them, and their codes and scales as plain tensors.

`read_raw` is the torch twin of the kernels' repacking (csrc/repack.cpp): it moves numbers and changes none. The
layouts are those of their own writers: ggml's quantization code for llama.cpp's blocks, Transformers' integration of
MXFP4 for gpt-oss, compressed-tensors' "pack-quantized", AutoAWQ's packing, GPTQModel's.

Legend: R rows (output features), K columns (input features), G groups of columns that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...planning.descriptor import SUPER, Code, Scale, Zero
from .codes import Coded
from .matrix import MatrixFormat
from .strided import Strided, class_order

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of a word that holds row 0, 1, ... of eight


@dataclass(frozen=True, slots=True)
class RawMatrix:
    """A matrix [R, K] as a file holds it.

    layout, and the tensors that it has:
        gguf: "weight" uint8 [R, bytes of a row of blocks]; the format says of which type. "tensor" float32 [] of nvfp4.
        mxfp4: "blocks" uint8 [R, K / 32, 16], the low half of a byte is the even column; "scales" uint8 [R, K / 32].
        nibbles: "weight" uint8 [R, K / 2], likewise; "scales" [R, G] of e4m3 or uint8; "tensor" float32 [], or none.
        fp8: "weight" float8_e4m3fn [R, K]; "scales" float or e8m0 [ceil(R / 128), ceil(K / 128)], uint8 [R, K / 32], or
            a float for each row [R, 1] or for all [].
        bytes: "weight" int8 [R, K]; "scales" [R, G]; "zeros" int8 [R, G], or none.
        words: "weight" int32 [R, K * bits / 32], lowest bits first, half of the codes' range added; "scales" [R, G];
            "zeros" int32 [R * bits / 32, G] along the rows, or none.
        awq: "weight" int32 [K, R / 8]; "scales" [G, R]; "zeros" int32 [G, R / 8], or none.
        gptq: "weight" int32 [K * bits / 32, R]; "scales" [G, R]; "zeros" int32 [G, R * bits / 32], or none.
        strided: "weight" uint8, R K bits / 8 bytes; of 3 bits int32 [ceil(g / 10), R K / g]; both as hqq's BitPack has
            them. "scales", "zeros" uint8 [R / g, K]; "of_scales" float16 [2, S], "of_zeros" float32 [2]: scale and
            zero of scales and of zeros (strided.py).
    """

    layout: str
    rows: int
    columns: int
    tensors: dict[str, Tensor] = field(repr=False)
    fmt: MatrixFormat


def read_raw(raw: RawMatrix, rows: Tensor | None = None, columns: Tensor | None = None) -> Coded:
    """The codes and scales of a stored matrix.

    Args:
        rows: int64, which rows to take, in this order; None for all.
        columns: int64 [K], the order of the columns in which groups follow one another; None for the file's own.
    """
    coded = _READERS[raw.layout](raw)
    if columns is not None:
        coded = replace(coded, codes=coded.codes[:, columns])
    return coded if rows is None else coded.rows(rows)


def read_strided(raw: RawMatrix, columns: Tensor | None = None) -> Strided:
    """A stored matrix of the layout "strided", its rows by classes and its columns in an order, int64 [K]."""
    bits, words = raw.fmt.code_bits, raw.tensors["weight"]
    if bits == 3:  # of ten rows of groups' members in a word, the first in its highest bits
        parts = [words >> shift & 7 for shift in range(27, -1, -3)]
        codes = torch.cat(parts)[: raw.fmt.group].to(torch.uint8)
    else:  # of the 8 / bits equal parts of all weights, the first in the highest bits
        parts = [
            words.flatten() >> shift & (1 << bits) - 1 for shift in range(8 - _held_bits(bits), -1, -_held_bits(bits))
        ]
        codes = torch.cat(parts)
    whole = codes.view(raw.rows, raw.columns)[class_order(raw.rows, raw.fmt.group)]
    table = strided_table(raw, None)
    found = Strided(whole, raw.tensors["scales"], raw.tensors["zeros"], table, raw.tensors["of_zeros"])
    return found if columns is None else found.columns(columns)


def _held_bits(bits: int) -> int:
    """Bits that a code takes in a file's bytes."""
    return bits if bits in (2, 4) else 8


def strided_table(raw: RawMatrix, columns: Tensor | None) -> Tensor:
    """float16 [M, 2, K]: scale and zero of the scales of each class and column, until they repeat."""
    of_scales = raw.tensors["of_scales"]
    order = torch.arange(raw.columns) if columns is None else columns
    classes = torch.arange(raw.fmt.table_rows(raw.rows))[:, None]
    return of_scales[:, (classes * raw.columns + order) % of_scales.shape[1]].transpose(0, 1)


def sides(raw: RawMatrix) -> Coded:
    """The scales and zeros alone, where a layout keeps them apart from the codes; codes are empty."""
    t, fmt = raw.tensors, raw.fmt
    none = torch.empty(0, dtype=torch.uint8)
    if raw.layout in ("mxfp4", "nibbles"):
        return Coded(none, t["scales"].view(torch.uint8), tensor=t.get("tensor"))
    if raw.layout == "fp8":
        return Coded(none, _fp8_scales(raw))
    scales = t["scales"].T if raw.layout in ("awq", "gptq") else t["scales"]
    zeros = None
    if fmt.zero is Zero.INT:
        zeros = _ZEROS[raw.layout](raw)
    return Coded(none, scales, zeros)


def _fp8_scales(raw: RawMatrix) -> Tensor:
    scales, fmt = raw.tensors["scales"], raw.fmt
    if fmt.scale is Scale.E8M0:
        return scales
    scales = scales.float()
    if fmt.scale is not Scale.BLOCK:
        return scales.reshape(-1, 1).expand(raw.rows, 1)
    return scales.repeat_interleave(128, 0)[: raw.rows]


def _nibbles(raw: RawMatrix) -> Coded:
    packed = raw.tensors["blocks" if raw.layout == "mxfp4" else "weight"].flatten(1)
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(1)[:, : raw.columns]
    return replace(sides(raw), codes=codes)


def _bytes(raw: RawMatrix) -> Coded:
    codes = raw.tensors["weight"].view(torch.uint8)
    return replace(sides(raw), codes=codes ^ flip(raw) if flip(raw) else codes)


def flip(raw: RawMatrix) -> int:
    """What codes of bytes are combined with by "exclusive or": 128 where a signed byte stands for an unsigned one."""
    is_signed = raw.layout == "bytes"
    return 128 if raw.fmt.code_bits == 8 and raw.layout != "fp8" and (raw.fmt.code is Code.S8) != is_signed else 0


def _from_words(words: Tensor, bits: int, size: int) -> Tensor:
    """Codes along the last dimension of int32 words, lowest bits first: uint8 [..., size]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (words[..., None] >> shifts & (1 << bits) - 1).to(torch.uint8).flatten(-2)[..., :size]


def _words(raw: RawMatrix) -> Coded:
    codes = _from_words(raw.tensors["weight"], raw.fmt.code_bits, raw.columns)
    return replace(sides(raw), codes=codes ^ flip(raw))


def _awq(raw: RawMatrix) -> Coded:
    return replace(sides(raw), codes=_awq_rows(raw.tensors["weight"]).T.contiguous())


def _awq_rows(words: Tensor) -> Tensor:
    """int32 [n, R / 8] -> uint8 [n, R]."""
    nibbles: Tensor = _from_words(words, 4, 8 * words.shape[-1]).unflatten(-1, (-1, 8))
    return nibbles[..., list(AWQ_PLACES)].flatten(-2)


def _gptq(raw: RawMatrix) -> Coded:
    codes = _from_words(raw.tensors["weight"].T, raw.fmt.code_bits, raw.columns)
    return replace(sides(raw), codes=codes ^ flip(raw))


_ZEROS: dict[str, Callable[[RawMatrix], Tensor]] = {
    "bytes": lambda raw: raw.tensors["zeros"].view(torch.uint8) ^ 128,
    "words": lambda raw: _from_words(raw.tensors["zeros"].T.contiguous(), raw.fmt.code_bits, raw.rows).T.contiguous(),
    "awq": lambda raw: _awq_rows(raw.tensors["zeros"]).T.contiguous(),
    "gptq": lambda raw: _from_words(raw.tensors["zeros"], raw.fmt.code_bits, raw.rows).T.contiguous(),
}


# Blocks of GGUF, as ggml defines them.

GGUF_BLOCKS = {  # columns and bytes of a block
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q8_0": (32, 34),
    "mxfp4": (32, 17),
    "nvfp4": (64, 36),
    "iq4_nl": (32, 18),
    "q2_k": (256, 84),
    "q3_k": (256, 110),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
    "iq4_xs": (256, 136),
}


def _gguf(raw: RawMatrix) -> Coded:
    size, n_bytes = GGUF_BLOCKS[raw.fmt.name]
    blocks = raw.tensors["weight"].view(raw.rows, raw.columns // size, n_bytes)  # [R, blocks, bytes]
    found = (_super_blocks if size == SUPER else _small_blocks)(raw.fmt, blocks)
    return replace(found, codes=found.codes.flatten(1), tensor=raw.tensors.get("tensor"))


def _halves(blocks: Tensor) -> Tensor:
    """uint8 [R, blocks, 2] -> float16 [R, blocks]."""
    return blocks.contiguous().view(torch.float16).squeeze(-1)


def _low_then_high(packed: Tensor) -> Tensor:
    """[..., n] bytes -> [..., 2n] nibbles: all low ones, then all high ones."""
    return torch.cat((packed & 15, packed >> 4), -1)


def _small_blocks(fmt: MatrixFormat, blocks: Tensor) -> Coded:
    if fmt.name == "mxfp4":
        return Coded(_low_then_high(blocks[..., 1:]), blocks[..., 0])
    if fmt.name == "nvfp4":
        scales = blocks[..., :4].flatten(1)
        if bool((scales > 127).any()):
            raise CheckpointError("NVFP4: a scale has a sign, which GGUF's do not have")
        codes = _low_then_high(blocks[..., 4:].unflatten(-1, (4, 8)))
        return Coded(codes.flatten(2), scales.where(scales != 127, 0))  # ggml reads 127 as 0
    scales, at, zeros = _halves(blocks[..., :2]), 2, None
    if fmt.zero is Zero.ADD:
        zeros, at = _halves(blocks[..., 2:4]), 4
    if fmt.code is Code.S8:
        return Coded(blocks[..., at:], scales)
    if fmt.code is not Code.U5:
        return Coded(_low_then_high(blocks[..., at:]), scales, zeros)
    high = (blocks[..., at : at + 4, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2)
    return Coded(_low_then_high(blocks[..., at + 4 :]) | high << 4, scales, zeros)


def _k4_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """[R, blocks, 12] -> scales and mins [R, blocks, 8], of 6 bits each."""
    low, mins, rest = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat((low & 63, rest & 15 | low >> 6 << 4), -1)
    return scales, torch.cat((mins & 63, rest >> 4 | mins >> 6 << 4), -1)


def _super_blocks(fmt: MatrixFormat, b: Tensor) -> Coded:
    two = torch.arange(0, 8, 2, dtype=torch.uint8)
    if fmt.scale is Scale.K4:
        scales, mins = _k4_scales(b[..., 4:16])
        codes = _low_then_high(b[..., -128:].unflatten(-1, (4, 32)))  # [R, blocks, 4, 64]
        if fmt.code is Code.U5:
            high = b[..., 16:48, None] >> torch.arange(8, dtype=torch.uint8) & 1  # [R, blocks, 32, 8]
            codes = codes | high.transpose(-1, -2).unflatten(-2, (4, 2)).flatten(-2) << 4
        return Coded(codes.flatten(2), scales.flatten(1), mins.flatten(1), _halves(b[..., :2]), _halves(b[..., 2:4]))
    if fmt.scale is Scale.K6:
        low, high = b[..., :128].unflatten(-1, (2, 2, 32)), b[..., 128:192].unflatten(-1, (2, 1, 32))
        codes = torch.cat((low & 15, low >> 4), -2) | (high >> two[:, None] & 3) << 4  # [R, blocks, 2, 4, 32]
        return Coded(codes.flatten(2), b[..., 192:208].flatten(1), d=_halves(b[..., 208:]))
    if fmt.scale is Scale.IQ4XS:
        high = b[..., 2:4, None] >> two & 3  # [R, blocks, 2, 4]
        low = torch.stack((b[..., 4:8] & 15, b[..., 4:8] >> 4), -1).flatten(-2)
        scales = (low | high.flatten(-2) << 4) - 32
        codes = _low_then_high(b[..., 8:].unflatten(-1, (8, 16)))
        return Coded(codes.flatten(2), scales.flatten(1), d=_halves(b[..., :2]))
    at = 16 if fmt.scale is Scale.K2 else 32
    codes = b[..., at : at + 64].unflatten(-1, (2, 1, 32)) >> two[:, None] & 3  # [R, blocks, 2, 4, 32]
    if fmt.scale is Scale.K2:
        scales, mins = b[..., :16] & 15, b[..., :16] >> 4
        return Coded(codes.flatten(2), scales.flatten(1), mins.flatten(1), _halves(b[..., 80:82]), _halves(b[..., 82:]))
    high = b[..., None, :32] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1  # [R, blocks, 8, 32]
    packed = b[..., 96:108]
    low = torch.cat((packed[..., :8] & 15, packed[..., :8] >> 4), -1)
    rest = (packed[..., None, 8:] >> two[:, None] & 3).flatten(-2)
    codes = codes.flatten(-3) | high.flatten(-2) << 2
    return Coded(codes, (low | rest << 4).flatten(1), d=_halves(b[..., 108:]))


_READERS = {
    "gguf": _gguf,
    "mxfp4": _nibbles,
    "nibbles": _nibbles,
    "fp8": _bytes,
    "bytes": _bytes,
    "words": _words,
    "awq": _awq,
    "gptq": _gptq,
}
