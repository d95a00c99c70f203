"""How weights are written down in bytes: one class a number format, by name.

A format packs, unpacks (the torch reference that kernels are tested against) and counts bytes, for a matrix
(`MATRIX_FORMATS`, dense layers) or for an expert in blocks of neurons (`FORMATS`).
"""

from __future__ import annotations

import torch

from .base import PANEL, MatrixFormat
from .experts import ExpertFormat, ExpertShape, UnpackedExpert
from .floats import FloatFormat
from .quantized import Int4Format, Int8Format

MATRIX_FORMATS: dict[str, MatrixFormat] = {
    fmt.name: fmt
    for fmt in (
        FloatFormat("fp32", torch.float32),
        FloatFormat("fp16", torch.float16),
        FloatFormat("bf16", torch.bfloat16),
        Int8Format(),
        Int4Format(),
    )
}
FLOAT_FORMATS: dict[torch.dtype, str] = {
    fmt.dtype: name for name, fmt in MATRIX_FORMATS.items() if isinstance(fmt, FloatFormat)
}
FORMATS: dict[str, ExpertFormat] = {name: ExpertFormat(matrix) for name, matrix in MATRIX_FORMATS.items()}

__all__ = [
    "FLOAT_FORMATS",
    "FORMATS",
    "MATRIX_FORMATS",
    "PANEL",
    "ExpertFormat",
    "ExpertShape",
    "MatrixFormat",
    "UnpackedExpert",
]
