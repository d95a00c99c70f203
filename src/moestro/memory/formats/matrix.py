"""The formats that there are, by name, each with what packs and unpacks a matrix.

>>> format_named("q4_k").panel_bytes(256)
2304
>>> uniform(4, 128).name
'int4g128'
>>> strided_format(2, 16, 128).name
'hqq2r16s128'
"""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor

from .codes import Coded, pack_codes, pack_floats, read_codes, unpack
from .descriptor import PANEL, ROW, Code, Descriptor, Scale, Zero
from .quantize import pack_hqq, pack_int8, quantize_int4
from .strided import unpack_strided


class MatrixFormat(Descriptor):
    """One way to write a matrix down."""

    __slots__ = ()

    @property
    def is_packable(self) -> bool:
        """Whether weights are quantized to this format here, or are floats; a checkpoint has the others."""
        return self.is_float or self.scale is Scale.SHIFTED or self.name in ("int8", "int4")

    def pack(self, matrix: Tensor, *, fast: bool = False) -> Tensor:
        """[R, K] of any float dtype -> uint8 [P, panel_bytes], on the same device.

        Args:
            fast: find scales at once rather than fit them, where the format fits them.

        Raises:
            ValueError: weights are not quantized to this format here; a checkpoint has them.
        """
        if self.is_float:
            return pack_floats(self, matrix)
        rows, columns = matrix.shape
        panels = torch.empty(-(-rows // PANEL), self.panel_bytes(columns), dtype=torch.uint8, device=matrix.device)
        self.pack_blocks(matrix[None], panels.view(1, -1), fast=fast)
        return panels

    def pack_blocks(self, blocks: Tensor, out: Tensor, *, fast: bool = False) -> None:
        """Write matrices of equal size, [N, R, K] of any float dtype and strides, to uint8 [N, bytes of a matrix].

        Args:
            blocks: quantized as one matrix [N * R, K]; if there are several, R is a multiple of 16.
            out: a view of any stride, on any device. fast: as in `pack`.

        Raises:
            ValueError: weights are not quantized to this format here; a checkpoint has them.
        """
        if not self.is_packable:
            raise ValueError(f"nothing here quantizes to {self.name}: a checkpoint has it")
        if self.name == "int8":
            pack_int8(blocks, self, out)
            return
        matrix = blocks.flatten(0, 1)
        if self.scale is Scale.SHIFTED:
            pack_hqq(matrix, self, out, fit=not fast)
        elif self.is_float:
            out.copy_(pack_floats(self, matrix).view(len(out), -1))
        else:
            out.copy_(pack_codes(self, quantize_int4(matrix, self.group, fit=not fast)).view(len(out), -1))

    def unpack(self, panels: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """uint8 [P, panel_bytes] -> [P * 16, K] in `dtype`: what the kernels compute with.

        Raises:
            ValueError: panels alone do not say it (`Scale.COLUMN`); see `unpack_matrix`.
        """
        if self.is_strided:
            raise ValueError(f"panels in {self.name} need the table of their matrix")
        return unpack(self, panels, columns, dtype)

    def unpack_matrix(self, packed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A whole matrix, uint8 [matrix_bytes] -> [R, K] in `dtype`, its rows in their own order."""
        if self.is_strided:
            return unpack_strided(self, packed, rows, columns, dtype)
        return self.unpack(packed.view(-1, self.panel_bytes(columns)), columns, dtype)[:rows]

    def write(self, coded: Coded) -> Tensor:
        """The codes and scales of a matrix [R, K] as panels, uint8 [P, panel_bytes]."""
        return pack_codes(self, coded)

    def read(self, panels: Tensor, columns: int) -> Coded:
        """The codes and scales [P * 16, K] that panels uint8 [P, panel_bytes] hold."""
        return read_codes(self, panels, columns)


_NAMED = {
    fmt.name: fmt
    for fmt in (
        MatrixFormat("fp32", Code.FP32),
        MatrixFormat("fp16", Code.FP16),
        MatrixFormat("bf16", Code.BF16),
        MatrixFormat("int8", Code.S8, 64, Scale.FP16),
        MatrixFormat("int4", Code.U4, 64, Scale.FP16, Zero.FP16),
        MatrixFormat("hqq4", Code.U4, 64, Scale.SHIFTED, Zero.FIXED),
        MatrixFormat("hqq3", Code.U3, 64, Scale.SHIFTED, Zero.FIXED),
        MatrixFormat("hqq2", Code.U2, 16, Scale.SHIFTED, Zero.FIXED),
        MatrixFormat("mxfp4", Code.E2M1, 32, Scale.E8M0),
        MatrixFormat("nvfp4", Code.E2M1, 16, Scale.E4M3),
        MatrixFormat("fp8", Code.E4M3, 128, Scale.BLOCK),
        MatrixFormat("fp8row", Code.E4M3, ROW, Scale.FP32),
        MatrixFormat("mxfp8", Code.E4M3, 32, Scale.E8M0),
        MatrixFormat("q8_0", Code.S8, 32, Scale.FP16),
        MatrixFormat("q4_0", Code.U4, 32, Scale.FP16, Zero.CONSTANT, 8),
        MatrixFormat("q4_1", Code.U4, 32, Scale.FP16, Zero.ADD),
        MatrixFormat("q5_0", Code.U5, 32, Scale.FP16, Zero.CONSTANT, 16),
        MatrixFormat("q5_1", Code.U5, 32, Scale.FP16, Zero.ADD),
        MatrixFormat("q2_k", Code.U2, 16, Scale.K2, Zero.MIN),
        MatrixFormat("q3_k", Code.U3, 16, Scale.K3, Zero.CONSTANT, 4),
        MatrixFormat("q4_k", Code.U4, 32, Scale.K4, Zero.MIN),
        MatrixFormat("q5_k", Code.U5, 32, Scale.K4, Zero.MIN),
        MatrixFormat("q6_k", Code.U6, 16, Scale.K6, Zero.CONSTANT, 32),
        MatrixFormat("iq4_nl", Code.IQ4NL, 32, Scale.FP16),
        MatrixFormat("iq4_xs", Code.IQ4NL, 32, Scale.IQ4XS),
    )
}
_SCALES = {"fp16": Scale.FP16, "bf16": Scale.BF16, "fp32": Scale.FP32}


def uniform(bits: int, group: int, scale: str = "fp16", zeros: bool = False) -> MatrixFormat:
    """Whole numbers with a scale for each group, as AWQ, GPTQ and compressed-tensors have them.

    Args:
        bits: 2, 3, 4, 5, 6 or 8. group: 16, 32, 64, 128 or ROW. scale: "fp16", "bf16" or "fp32".
        zeros: whether each group has a zero of its own; without one the middle of the range is zero.

    Returns:
        One object for equal arguments, named like `int4g128`, `int4g32bf16z` or `int8row`.
    """
    return _uniform(bits, group, scale, zeros)


@functools.cache
def _uniform(bits: int, group: int, scale: str, zeros: bool) -> MatrixFormat:
    name = f"int{bits}{f'g{group}' if group else 'row'}{'' if scale == 'fp16' else scale}{'z' if zeros else ''}"
    if bits == 8 and not zeros:
        return MatrixFormat(name, Code.S8, group, _SCALES[scale])
    zero, constant = (Zero.INT, 0) if zeros else (Zero.CONSTANT, 2 ** (bits - 1))
    return MatrixFormat(name, Code[f"U{bits}"], group, _SCALES[scale], zero, constant)


_STRIDED = re.compile(r"hqq([234568])r(16|32|64|128|256)s([1-9][0-9]{0,8})")


def strided_format(bits: int, group: int, super_group: int) -> MatrixFormat:
    """Whole numbers of which some rows of a column, far apart, share a scale and a zero: HQQ's axis 0.

    Args:
        bits: 2, 3, 4, 5, 6 or 8. group: rows that share them, 16, 32, 64, 128 or 256.
        super_group: scales, which are bytes, that share an fp16 scale and zero.

    Returns:
        One object for equal arguments, named like `hqq2r16s128`.
    """
    return _strided(bits, group, super_group)


@functools.cache
def _strided(bits: int, group: int, super_group: int) -> MatrixFormat:
    name, code = f"hqq{bits}r{group}s{super_group}", Code[f"U{bits}"]
    return MatrixFormat(name, code, group, Scale.COLUMN, Zero.COLUMN, super_group=super_group)


@functools.cache
def format_named(name: str) -> MatrixFormat:
    """The format of that name.

    Raises:
        KeyError: there is none.
    """
    if name in _NAMED:
        return _NAMED[name]
    if (parts := _STRIDED.fullmatch(name)) is not None:
        return strided_format(*(int(part) for part in parts.groups()))
    for bits in (2, 3, 4, 5, 6, 8):
        for group in (16, 32, 64, 128, ROW):
            for scale in _SCALES:
                for zeros in (False, True):
                    if (fmt := uniform(bits, group, scale, zeros)).name == name:
                        return fmt
    raise KeyError(name)


def format_names() -> tuple[str, ...]:
    """Names of the formats that are no `uniform` or `strided_format` ones."""
    return tuple(_NAMED)
