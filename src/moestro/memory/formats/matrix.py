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
from dataclasses import fields

import torch
from torch import Tensor

from ...planning.descriptor import PANEL, Descriptor, Scale
from ...planning.formats import descriptor_named, uniform_name
from .codes import Coded, pack_codes, pack_floats, read_codes, unpack
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


def uniform(bits: int, group: int, scale: str = "fp16", zeros: bool = False) -> MatrixFormat:
    """Whole numbers with a scale for each group, as AWQ, GPTQ and compressed-tensors have them.

    Args:
        bits: 2, 3, 4, 5, 6 or 8. group: 16, 32, 64, 128 or ROW. scale: "fp16", "bf16" or "fp32".
        zeros: whether each group has a zero of its own; without one the middle of the range is zero.

    Returns:
        One object for equal arguments, named like `int4g128`, `int4g32bf16z` or `int8row`.
    """
    return format_named(uniform_name(bits, group, scale, zeros))


def strided_format(bits: int, group: int, super_group: int) -> MatrixFormat:
    """Whole numbers of which some rows of a column, far apart, share a scale and a zero: HQQ's axis 0.

    Args:
        bits: 2, 3, 4, 5, 6 or 8. group: rows that share them, 16, 32, 64, 128 or 256.
        super_group: scales, which are bytes, that share an fp16 scale and zero.

    Returns:
        One object for equal arguments, named like `hqq2r16s128`.
    """
    return format_named(f"hqq{bits}r{group}s{super_group}")


@functools.cache
def format_named(name: str) -> MatrixFormat:
    """The format of that name, one object for each.

    Raises:
        KeyError: there is none.
    """
    found = descriptor_named(name)
    return MatrixFormat(**{one.name: getattr(found, one.name) for one in fields(found)})
