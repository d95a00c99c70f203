"""fp32, fp16 and bf16: the weights as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import PANEL, MatrixFormat, pad_matrix


class FloatFormat(MatrixFormat):
    """One float dtype for all weights.

    A panel is [K, 16]; for bf16 [K / 2, 16, 2], so that a 32-bit lane holds an even and an odd column, each
    of which is one operation away from a float32.
    """

    is_quantized = False

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self.dtype = dtype
        self._together = 2 if dtype == torch.bfloat16 else 1

    def panel_bytes(self, columns: int) -> int:
        return self._padded(columns) * PANEL * self.dtype.itemsize

    def pack(self, matrix: Tensor, *, fast: bool = False) -> Tensor:
        padded = pad_matrix(matrix.to(self.dtype), self._padded(matrix.shape[1]))
        lanes = padded.unflatten(2, (-1, self._together)).transpose(1, 2)  # [P, K / together, 16, together]
        packed: Tensor = lanes.contiguous().flatten(1).view(torch.uint8)
        return packed

    def unpack(self, panels: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        lanes: Tensor = panels.view(self.dtype).unflatten(1, (-1, PANEL, self._together))
        return lanes.to(dtype).transpose(1, 2).flatten(2).flatten(0, 1)[:, :columns]

    def _padded(self, columns: int) -> int:
        return -(-columns // self._together) * self._together
