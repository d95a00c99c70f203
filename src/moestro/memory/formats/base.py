"""How a matrix is written down in bytes: panels of 16 rows, in a number format.

Legend: R rows, K columns, P = ceil(R / 16) panels.

A panel holds 16 rows side by side in the order of the columns: one vector register holds one column of
16 rows, or an even and an odd one, and is multiplied with a broadcast activation. So no sum ever runs across
a vector, few and many tokens use the same bytes, and reading is one run from the first byte to the last.
Groups of columns share a scale in quantized formats; scales stand in front of their group's weights.
Rows and columns that do not fill a panel or group are padded with zeros.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import pad

PANEL = 16  # rows


class MatrixFormat(ABC):
    """One way to write a matrix down."""

    name: str
    is_quantized = True
    group = 64  # columns that share a scale; of floats, as many as kernels take at once

    @abstractmethod
    def panel_bytes(self, columns: int) -> int:
        """Bytes of one panel."""

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a packed matrix."""
        return -(-rows // PANEL) * self.panel_bytes(columns)

    @abstractmethod
    def pack(self, matrix: Tensor, *, fast: bool = False) -> Tensor:
        """[R, K] of any float dtype -> uint8 [P, panel_bytes], on the same device.

        Args:
            fast: scales that are found at once rather than fitted, where the format fits them.
        """

    @abstractmethod
    def unpack(self, panels: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """uint8 [P, panel_bytes] -> [P * 16, K] in `dtype`: what the kernels compute with."""


def pad_matrix(matrix: Tensor, columns: int) -> Tensor:
    """[R, K] -> [P, 16, columns], with zeros where the matrix has nothing."""
    rows = -(-matrix.shape[0] // PANEL) * PANEL
    return pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0])).view(-1, PANEL, columns)
