"""int8 and int4: whole numbers with a scale for each row and group of 64 columns.

A weight is (q - zero) * scale. 8.25 and 4.5 bits a weight, scales included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import PANEL, MatrixFormat, pad_matrix
from .hqq_solver import solve_hqq


class Int8Format(MatrixFormat):
    """Symmetric: the largest of a group is 127 scales.

    A group of a panel is fp16 scales [16], then int8 [32, 16, 2]: two columns of 16 rows a vector.
    """

    name = "int8"

    def panel_bytes(self, columns: int) -> int:
        return -(-columns // self.group) * PANEL * (2 + self.group)

    def pack(self, matrix: Tensor, *, fast: bool = False) -> Tensor:
        groups = _groups(matrix, self.group)  # [P, 16, G, 64]
        most = groups.abs().amax(-1, keepdim=True)
        # The smallest of float16 are whole steps of 2**-24: rounded up, so that no weight has to be cut.
        scale = torch.where(most < 127 * 2**-14, (most / 127 * 2**24).ceil() / 2**24, most / 127).half()
        whole = (groups / scale.float()).nan_to_num(0.0, 0.0, 0.0).round().clamp(-127, 127).to(torch.int8)
        pairs = whole.unflatten(-1, (-1, 2)).permute(0, 2, 3, 1, 4)  # [P, G, 32, 16, 2]
        return torch.cat((_as_bytes(scale.transpose(1, 2)), _as_bytes(pairs)), -1).flatten(1)

    def unpack(self, panels: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        groups = panels.unflatten(1, (-1, PANEL * (2 + self.group)))
        scale = _numbers(groups, 0)  # [P, 16, G, 1]
        pairs = groups[..., 2 * PANEL :].view(torch.int8).unflatten(-1, (self.group // 2, PANEL, 2))
        whole = pairs.permute(0, 3, 1, 2, 4).flatten(3)  # [P, 16, G, 64]
        return _matrix(whole.to(dtype) * scale.to(dtype), columns)


class Int4Format(MatrixFormat):
    """Half-quadratic quantization: a scale and a zero for each group, solved in `hqq_solver`.

    A group of a panel is fp16 scales [16], fp16 zeros [16], then 32-bit words [8, 16], each with 8 columns of
    one row: bits 4j..4j+3 of the lower and the upper half are columns 2j and 2j + 1, so that a shift and a mask
    give pairs of columns as 16-bit integers.
    """

    name = "int4"

    def panel_bytes(self, columns: int) -> int:
        return -(-columns // self.group) * PANEL * (4 + self.group // 2)

    def pack(self, matrix: Tensor, *, fast: bool = False) -> Tensor:
        groups = _groups(matrix, self.group)  # [P, 16, G, 64]
        whole, scale, zero = solve_hqq(groups, bits=4, fit=not fast)  # as the groups, and [P, 16, G, 1] twice
        nibbles = whole.to(torch.int32).unflatten(-1, (-1, 4, 2))  # column 8v + 2j + h -> v, j, h
        words = sum(nibbles[..., j, :] << 4 * j for j in range(4))  # [P, 16, G, 8, 2]
        assert isinstance(words, Tensor)
        halves = torch.where(words >= 2**15, words - 2**16, words).to(torch.int16).permute(0, 2, 3, 1, 4)
        parts = (_as_bytes(scale.transpose(1, 2)), _as_bytes(zero.transpose(1, 2)), _as_bytes(halves))
        return torch.cat(parts, -1).flatten(1)

    def unpack(self, panels: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        groups = panels.unflatten(1, (-1, PANEL * (4 + self.group // 2)))
        scale, zero = _numbers(groups, 0), _numbers(groups, 1)
        halves = groups[..., 4 * PANEL :].view(torch.int16).unflatten(-1, (-1, PANEL, 2)).permute(0, 3, 1, 2, 4)
        shifts = torch.arange(0, 16, 4, device=panels.device)
        nibbles = (halves.int()[..., None, :] >> shifts[:, None]) & 15  # [P, 16, G, 8, 4, 2]
        return _matrix((nibbles.flatten(3).to(dtype) - zero.to(dtype)) * scale.to(dtype), columns)


def _groups(matrix: Tensor, group: int) -> Tensor:
    """[R, K] -> float32 [P, 16, G, group]."""
    columns = -(-matrix.shape[1] // group) * group
    groups: Tensor = pad_matrix(matrix.float(), columns).unflatten(2, (-1, group))
    return groups


def _matrix(groups: Tensor, columns: int) -> Tensor:
    """[P, 16, G, 64] -> [P * 16, K]."""
    matrix: Tensor = groups.flatten(2).flatten(0, 1)
    return matrix[:, :columns]


def _as_bytes(part: Tensor) -> Tensor:
    """[P, G, ...] -> uint8 [P, G, bytes]."""
    return part.contiguous().flatten(2).view(torch.uint8)


def _numbers(groups: Tensor, index: int) -> Tensor:
    """The fp16 scales (0) or zeros (1) of uint8 [P, G, bytes]: [P, 16, G, 1]."""
    size = 2 * PANEL
    return groups[..., index * size : (index + 1) * size].view(torch.float16).transpose(1, 2)[..., None]
