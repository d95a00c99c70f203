"""Matrices whose groups are some rows of one column, far apart: HQQ with axis 0, with quantized scales and zeros.

Of a matrix [R, K] in groups of g rows, rows n, n + R / g, n + 2 R / g ... are a class, and the g weights of a class in
one column share a scale and a zero, a byte each. Panels have the rows of a class beside one another (`class_order`), so
these bytes are of a panel's columns rather than of its rows. Scales are numbered class by class; those whose numbers
are equal modulo S = R / g * K / super_group share an fp16 scale and an fp16 zero, which begin to repeat after some
classes (`Descriptor.table_rows`) and stand in a table, once for a matrix. All zeros share a scale and a zero.

A weight is (code - zero) * scale, with scale = (byte - zero of scales) * scale of scales, and zero likewise: each step
in float32, of the exact numbers that a file has, as hqq 0.2.8 (Quantizer.dequantize) computes them if its compute dtype
is float32. A file's own computation in float16 rounds more.

    >>> class_order(32, 16)[:17].tolist()
    [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 1]

Legend: R rows, K columns, C classes, P panels of 16 rows, M rows of the table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...planning.descriptor import CHUNK, PANEL, Descriptor
from .codes import read_code_bytes, write_codes

_TABLE_AT = 64  # bytes: before it stand the scale and the zero of zeros, float32


@dataclass(frozen=True, slots=True)
class Strided:
    """A matrix, its rows in the order of their classes.

    codes: uint8 [R, K]. scales, zeros: uint8 [C, K]. of_scales: float16 [M, 2, K], scale and zero of the scales of
    classes 0 .. M - 1, then again. of_zeros: float32 [2], scale and zero of all zeros.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    of_scales: Tensor
    of_zeros: Tensor

    def columns(self, index: Tensor) -> Strided:
        """Its columns in the order of an index int64 [n]."""
        sides = {name: getattr(self, name)[:, index] for name in ("codes", "scales", "zeros")}
        return replace(self, **sides, of_scales=self.of_scales[..., index])


def class_order(rows: int, group: int) -> Tensor:
    """int64 [R], on the CPU: which row stands at each place."""
    return torch.arange(rows, device="cpu").view(group, rows // group).T.flatten()


def values(fmt: Descriptor, found: Strided, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights [R, K], in the order of classes, computed in `dtype`."""
    of_scales = found.of_scales[torch.arange(len(found.scales)) % len(found.of_scales)].to(dtype)  # [C, 2, K]
    of_zeros = found.of_zeros.to(dtype)
    scales = (found.scales.to(dtype) - of_scales[:, 1]) * of_scales[:, 0]
    zeros = (found.zeros.to(dtype) - of_zeros[1]) * of_zeros[0]
    each, rows = fmt.group, len(found.codes)
    return (found.codes.to(dtype) - zeros.repeat_interleave(each, 0)[:rows]) * scales.repeat_interleave(each, 0)[:rows]


def write_panels(fmt: Descriptor, codes: Tensor, scales: Tensor, zeros: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [P, panel_bytes] of some whole classes. What fills up is zero.

    Args:
        codes: uint8 [r, k]. scales, zeros: uint8 [r / group, k].
        size: rows and columns that the panels are for, at least r and k; rows are whole classes.
    """
    (rows, columns), of_class = size, fmt.group // PANEL
    chunks, classes = -(-columns // CHUNK), rows // fmt.group
    whole = pad(codes, (0, chunks * CHUNK - codes.shape[1], 0, rows - codes.shape[0]))
    packed = write_codes(fmt.code, whole.view(rows // PANEL, PANEL, chunks, CHUNK))  # [P, chunks, bytes]
    parts = []
    for side in (scales, zeros):
        padded = pad(side, (0, chunks * CHUNK - side.shape[1], 0, classes - side.shape[0]))
        parts.append(padded.view(classes, chunks, of_class, -1).transpose(1, 2).flatten(0, 1))  # [P, chunks, n]
    return torch.cat((*parts, packed), -1).flatten(1)


def write_table(of_scales: Tensor, of_zeros: Tensor, width: int) -> Tensor:
    """uint8 [table_bytes], for so many columns; those beyond the matrix have scales of zero.

    Args:
        of_scales, of_zeros: as in `Strided`.
    """
    width = -(-width // CHUNK) * CHUNK
    table = pad(of_scales, (0, width - of_scales.shape[2])).contiguous()
    head = pad(of_zeros.contiguous().view(torch.uint8), (0, _TABLE_AT - 8))
    return torch.cat((head, table.flatten().view(torch.uint8)))


def write_matrix(fmt: Descriptor, found: Strided) -> Tensor:
    """A whole matrix, uint8 [matrix_bytes]."""
    rows, columns = found.codes.shape
    panels = write_panels(fmt, found.codes, found.scales, found.zeros, (rows, columns))
    return torch.cat((panels.flatten(), write_table(found.of_scales, found.of_zeros, columns)))


def read_panels(fmt: Descriptor, panels: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [r, k], scales and zeros uint8 [r / group, k] of some whole classes, from uint8 [P, panel_bytes]."""
    chunks, of_class, share = -(-columns // CHUNK), fmt.group // PANEL, CHUNK * PANEL // fmt.group
    each = panels.unflatten(1, (chunks, -1))  # [P, chunks, bytes]
    scales, zeros = (
        each[..., start : start + share].unflatten(0, (-1, of_class)).transpose(1, 2).flatten(1)[:, :columns]
        for start in (0, share)
    )
    codes = read_code_bytes(fmt.code, each[..., 2 * share :])  # [P, 16, chunks, 64]
    return codes.flatten(2).flatten(0, 1)[:, :columns], scales, zeros


def read_table(fmt: Descriptor, table: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """float16 [M, 2, width] and float32 [2], as in `Strided`, from the uint8 [table_bytes] of a matrix of R rows."""
    of_scales = table[_TABLE_AT:].view(torch.float16).view(fmt.table_rows(rows), 2, -1)
    return of_scales, table[:8].view(torch.float32)


def unpack_strided(fmt: Descriptor, packed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A whole matrix, uint8 [matrix_bytes] -> [R, K] in `dtype`, its rows in their own order."""
    packed = packed.flatten()
    panels, table = packed.split([fmt.panels_bytes(rows, columns), fmt.table_bytes(rows, columns)])
    of_scales, of_zeros = read_table(fmt, table, rows)
    parts = read_panels(fmt, panels.view(-1, fmt.panel_bytes(columns)), columns)
    return in_own_order(fmt, values(fmt, Strided(*parts, of_scales[..., :columns], of_zeros), dtype))


def in_own_order(fmt: Descriptor, by_class: Tensor) -> Tensor:
    """A matrix [R, ...] whose rows stand by classes, with its rows in their own order."""
    order = class_order(len(by_class), fmt.group).to(by_class.device)
    return torch.empty_like(by_class).index_copy_(0, order, by_class)
