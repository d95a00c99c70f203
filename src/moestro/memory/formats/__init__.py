"""How an expert's weights are written down in bytes: one class a format, by name.

A format packs, unpacks (the torch reference that kernels are tested against) and counts bytes.
"""

from __future__ import annotations

from .base import BLOCK, ExpertFormat, ExpertShape, UnpackedExpert
from .floats import FloatFormat

FORMATS: dict[str, ExpertFormat] = {
    fmt.name: fmt for fmt in (FloatFormat("fp32"), FloatFormat("fp16"), FloatFormat("bf16"))
}

__all__ = ["BLOCK", "FORMATS", "ExpertFormat", "ExpertShape", "UnpackedExpert"]
