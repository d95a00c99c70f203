"""The number formats that there are, by name. Sizes alone: what packs and unpacks them is in memory/formats.

>>> descriptor_named("q4_k").panel_bytes(256)
2304
>>> format_of_bits(4, "bfloat16"), format_of_bits(None, "float16")
('hqq4', 'fp16')
"""

from __future__ import annotations

import functools
import re

from ..errors import RequestError
from .descriptor import ROW, Code, Descriptor, Scale, Zero

FLOATS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}  # by dtype, as torch names it
QUANTIZED = {8: "int8", 4: "hqq4", 3: "hqq3", 2: "hqq2"}  # by bits

_NAMED = {
    fmt.name: fmt
    for fmt in (
        Descriptor("fp32", Code.FP32),
        Descriptor("fp16", Code.FP16),
        Descriptor("bf16", Code.BF16),
        Descriptor("int8", Code.S8, 64, Scale.FP16),
        Descriptor("int4", Code.U4, 64, Scale.FP16, Zero.FP16),
        Descriptor("hqq4", Code.U4, 64, Scale.SHIFTED, Zero.FIXED),
        Descriptor("hqq3", Code.U3, 64, Scale.SHIFTED, Zero.FIXED),
        Descriptor("hqq2", Code.U2, 16, Scale.SHIFTED, Zero.FIXED),
        Descriptor("mxfp4", Code.E2M1, 32, Scale.E8M0),
        Descriptor("nvfp4", Code.E2M1, 16, Scale.E4M3),
        Descriptor("fp8", Code.E4M3, 128, Scale.BLOCK),
        Descriptor("fp8row", Code.E4M3, ROW, Scale.FP32),
        Descriptor("mxfp8", Code.E4M3, 32, Scale.E8M0),
        Descriptor("q8_0", Code.S8, 32, Scale.FP16),
        Descriptor("q4_0", Code.U4, 32, Scale.FP16, Zero.CONSTANT, 8),
        Descriptor("q4_1", Code.U4, 32, Scale.FP16, Zero.ADD),
        Descriptor("q5_0", Code.U5, 32, Scale.FP16, Zero.CONSTANT, 16),
        Descriptor("q5_1", Code.U5, 32, Scale.FP16, Zero.ADD),
        Descriptor("q2_k", Code.U2, 16, Scale.K2, Zero.MIN),
        Descriptor("q3_k", Code.U3, 16, Scale.K3, Zero.CONSTANT, 4),
        Descriptor("q4_k", Code.U4, 32, Scale.K4, Zero.MIN),
        Descriptor("q5_k", Code.U5, 32, Scale.K4, Zero.MIN),
        Descriptor("q6_k", Code.U6, 16, Scale.K6, Zero.CONSTANT, 32),
        Descriptor("iq4_nl", Code.IQ4NL, 32, Scale.FP16),
        Descriptor("iq4_xs", Code.IQ4NL, 32, Scale.IQ4XS),
    )
}
_SCALES = {"fp16": Scale.FP16, "bf16": Scale.BF16, "fp32": Scale.FP32}
_UNIFORM = re.compile(r"int([234568])(?:g(16|32|64|128)|row)(bf16|fp32)?(z)?")
_STRIDED = re.compile(r"hqq([234568])r(16|32|64|128|256)s([1-9][0-9]{0,8})")


def format_of_bits(bits: int | None, dtype: str) -> str:
    """The name of the format for so many bits of a model of this dtype, as torch names it; None: the dtype's own.

    Raises:
        RequestError: nothing stores weights of that dtype.
    """
    if dtype not in FLOATS:
        raise RequestError(f"weights cannot be stored as {dtype}; use float32, float16 or bfloat16")
    if bits is None:
        return FLOATS[dtype]
    if bits < 16:
        return QUANTIZED[bits]
    return "fp16" if dtype == "float16" else "bf16"


def head_bits(bits: int | None, own_bits: int | None) -> int | None:
    """Bits of head and embedding: with --bits 3 or 2 alone 16, since these would cost more quality than they save."""
    return own_bits or (16 if bits in (3, 2) else bits)


def uniform_name(bits: int, group: int, scale: str = "fp16", zeros: bool = False) -> str:
    """The name of whole numbers with a scale for each group, like `int4g128`, `int4g32bf16z` or `int8row`.

    Args:
        bits: 2, 3, 4, 5, 6 or 8. group: 16, 32, 64, 128 or ROW. scale: "fp16", "bf16" or "fp32".
        zeros: whether each group has a zero of its own; without one the middle of the range is zero.
    """
    return f"int{bits}{f'g{group}' if group else 'row'}{'' if scale == 'fp16' else scale}{'z' if zeros else ''}"


@functools.cache
def descriptor_named(name: str) -> Descriptor:
    """The format of that name.

    Raises:
        KeyError: there is none.
    """
    if name in _NAMED:
        return _NAMED[name]
    if (strided := _STRIDED.fullmatch(name)) is not None:
        bits, group, super_group = map(int, strided.groups())
        return Descriptor(name, Code[f"U{bits}"], group, Scale.COLUMN, Zero.COLUMN, super_group=super_group)
    if (found := _UNIFORM.fullmatch(name)) is None:
        raise KeyError(name)
    bits, group, scale = int(found[1]), int(found[2] or ROW), _SCALES[found[3] or "fp16"]
    if bits == 8 and not found[4]:
        return Descriptor(name, Code.S8, group, scale)
    zero, constant = (Zero.INT, 0) if found[4] else (Zero.CONSTANT, 2 ** (bits - 1))
    return Descriptor(name, Code[f"U{bits}"], group, scale, zero, constant)


def format_names() -> tuple[str, ...]:
    """Names of the formats that are no uniform or strided ones."""
    return tuple(_NAMED)
