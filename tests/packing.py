"""Packed weights for tests."""

from __future__ import annotations

from torch import Tensor

from moestro.compute.cpu import Matrix
from moestro.memory.formats import MatrixFormat


def pack_matrix(fmt: MatrixFormat, weight: Tensor, bias: Tensor | None = None) -> Matrix:
    """A linear layer of weight [R, K] and float32 bias [R]."""
    return Matrix(fmt.pack(weight).flatten(), fmt, *weight.shape, bias)
