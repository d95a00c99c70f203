"""How weights are written down in bytes: number formats as values, and experts in blocks of neurons.

A format packs, unpacks (the torch reference that kernels are tested against) and counts bytes, for a matrix
(`format_named`, dense layers) or for an expert in blocks of neurons (`ExpertFormat`). `MATRIX_FORMATS` and `FORMATS`
have those that weights of any checkpoint can be put in; the others are kept as a checkpoint has them.
"""

from __future__ import annotations

import functools

import torch

from .codes import IQ4NL, Coded
from .descriptor import PANEL
from .experts import ExpertFormat, ExpertShape, UnpackedExpert
from .matrix import MatrixFormat, format_named, format_names, uniform

MATRIX_FORMATS: dict[str, MatrixFormat] = {
    name: format_named(name) for name in ("fp32", "fp16", "bf16", "int8", "int4")
}
FLOAT_FORMATS: dict[torch.dtype, str] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
FORMATS: dict[str, ExpertFormat] = {name: ExpertFormat(matrix) for name, matrix in MATRIX_FORMATS.items()}


@functools.cache
def expert_format_named(name: str) -> ExpertFormat:
    """The format of experts by its name, such as "q4_k" or "q4_k+q4_k+q6_k" (gate, up, down).

    Raises:
        KeyError: there is none.
    """
    gate, up, down = (name.split("+") * 3)[:3]
    if gate == up == down and gate in FORMATS:
        return FORMATS[gate]
    if gate == up == down and gate != name:
        return expert_format_named(gate)
    return ExpertFormat(format_named(down), gate=format_named(gate), up=format_named(up))


__all__ = [
    "FLOAT_FORMATS",
    "FORMATS",
    "IQ4NL",
    "MATRIX_FORMATS",
    "PANEL",
    "Coded",
    "ExpertFormat",
    "ExpertShape",
    "MatrixFormat",
    "UnpackedExpert",
    "expert_format_named",
    "format_named",
    "format_names",
    "uniform",
]
