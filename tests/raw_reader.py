"""An independent reader of stored matrices: RawMatrix -> float32, by each layout's public definition, slowly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moestro.memory.formats import raw as formats

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # which nibble of a word holds column 0, 1, ...


def read_raw(raw: Any, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    """float32 [R, K] in the order in which it is packed; what Moestro reads, packs and unpacks is the same."""
    whole = READERS[raw.layout](raw) if not isinstance(raw, Tensor) else raw.float()
    whole = whole if rows is None else whole[rows]
    whole = whole if columns is None else whole[:, columns]
    if not isinstance(raw, Tensor):
        coded = formats.read_raw(raw, rows, columns)
        again = raw.fmt.unpack(raw.fmt.write(coded), raw.columns, torch.float32)[: len(whole)]
        if raw.fmt.name == "nvfp4":  # a product of two scales has no exact place
            torch.testing.assert_close(again, whole, rtol=2**-20, atol=0)
        else:
            torch.testing.assert_close(again, whole, rtol=0, atol=0, equal_nan=True)
    return whole


def _powers(scale: Tensor) -> Tensor:
    return torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()


def _spread(scale: Tensor, columns: int) -> Tensor:
    """[R, G] -> [R, K], for groups of equal size."""
    return scale if scale.shape[1] == 1 else scale.repeat_interleave(-(-columns // scale.shape[1]), 1)[:, :columns]


def _nibbles(codes: Tensor, columns: int) -> Tensor:
    return torch.stack((codes & 15, codes >> 4), -1).flatten(1)[:, :columns].long()


def _mxfp4(raw: Any) -> Tensor:
    values = E2M1[_nibbles(raw.tensors["blocks"].flatten(1), raw.columns)]
    return values * _spread(_powers(raw.tensors["scales"]), raw.columns)


def _fp4(raw: Any) -> Tensor:
    scale = _powers(raw.tensors["scales"]) * raw.tensors.get("tensor", torch.tensor(1.0))
    group = 16 if raw.fmt.name == "nvfp4" else 32
    return E2M1[_nibbles(raw.tensors["weight"], raw.columns)] * scale.repeat_interleave(group, 1)[:, : raw.columns]


def _fp8(raw: Any) -> Tensor:
    weight, scale = raw.tensors["weight"].float(), raw.tensors["scales"]
    if raw.fmt.name == "mxfp8":
        return weight * _powers(scale).repeat_interleave(32, 1)[:, : raw.columns]
    if raw.fmt.name == "fp8":
        spread = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
        return weight * spread[: raw.rows, : raw.columns]
    return weight * scale.float()


def _codes(words: Tensor, bits: int, dim: int, size: int) -> Tensor:
    """Whole numbers from 32-bit words along `dim`, lowest bits first."""
    words = words.long().movedim(dim, -1) & 0xFFFFFFFF
    codes = torch.stack([words >> shift & (1 << bits) - 1 for shift in range(0, 32, bits)], -1).flatten(-2)
    return codes[..., :size].movedim(-1, dim)


def _words(raw: Any) -> Tensor:
    bits = 8 if raw.fmt.code_bits == 8 else 4
    codes, scale = _codes(raw.tensors["weight"], bits, 1, raw.columns), raw.tensors["scales"].float()
    zeros = torch.full_like(scale, 1 << bits - 1, dtype=torch.long)
    if "zeros" in raw.tensors:
        zeros = _codes(raw.tensors["zeros"], bits, 0, raw.rows)
    if "g_idx" in raw.tensors:  # which group each column of the file is of
        group = raw.tensors["g_idx"].long()
        return (codes - zeros[:, group]) * scale[:, group]
    return (codes - _spread(zeros, raw.columns)) * _spread(scale, raw.columns)


def _bytes(raw: Any) -> Tensor:
    codes, scale = raw.tensors["weight"].float(), raw.tensors["scales"].float()
    zeros = raw.tensors["zeros"].float() if "zeros" in raw.tensors else torch.zeros_like(scale)
    return (codes - _spread(zeros, raw.columns)) * _spread(scale, raw.columns)


def _awq(raw: Any) -> Tensor:
    def columns(words: Tensor) -> Tensor:
        nibbles = _codes(words, 4, 1, raw.rows).view(words.shape[0], -1, 8)
        return nibbles[..., AWQ_ORDER].flatten(1)

    scale = raw.tensors["scales"].float()
    zeros = columns(raw.tensors["zeros"]) if "zeros" in raw.tensors else torch.full_like(scale, 8)
    group = raw.columns // scale.shape[0]
    spread = [one.repeat_interleave(group, 0) for one in (zeros, scale)]
    return ((columns(raw.tensors["weight"]) - spread[0]) * spread[1]).T


def _gptq(raw: Any) -> Tensor:
    """Columns in the file's order; `g_idx` is what the source made the packing order of."""
    scale, bits = raw.tensors["scales"].float(), raw.fmt.code_bits
    codes = _codes(raw.tensors["weight"], bits, 0, raw.columns)
    zeros = torch.full_like(scale, 1 << bits - 1)
    if "zeros" in raw.tensors:
        zeros = _codes(raw.tensors["zeros"], bits, 1, raw.rows)
    group = raw.tensors.get("g_idx", torch.arange(raw.columns) // (raw.columns // scale.shape[0])).long()
    return ((codes - zeros[group]) * scale[group]).T


def _gguf(raw: Any) -> Tensor:
    import gguf

    kind = gguf.GGMLQuantizationType[raw.fmt.name.upper()]
    values = torch.from_numpy(gguf.dequantize(raw.tensors["weight"].numpy(), kind))
    return values * raw.tensors["tensor"] if "tensor" in raw.tensors else values


READERS = {
    "gguf": _gguf,
    "mxfp4": _mxfp4,
    "nibbles": _fp4,
    "fp8": _fp8,
    "words": _words,
    "bytes": _bytes,
    "awq": _awq,
    "gptq": _gptq,
}
