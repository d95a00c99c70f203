"""How weights are written down in bytes: number formats as values, and experts in blocks of neurons.

A format packs, unpacks (the torch reference that kernels are tested against) and counts bytes, for a matrix
(`format_named`, dense layers) or for an expert in blocks of neurons (`ExpertFormat`). `MATRIX_FORMATS` and `FORMATS`
have those that weights of any checkpoint can be put in; the others are kept as a checkpoint has them.
"""

from __future__ import annotations

import functools

import torch

from ...errors import RequestError
from ...planning.descriptor import PANEL
from ...planning.expert_sizes import ORDERS, ExpertShape, names_of_parts
from ...planning.formats import format_names
from .codes import IQ4NL, Coded
from .experts import ExpertFormat, UnpackedExpert
from .matrix import MatrixFormat, format_named, strided_format, uniform
from .strided import Strided

MATRIX_FORMATS: dict[str, MatrixFormat] = {
    name: format_named(name) for name in ("fp32", "fp16", "bf16", "int8", "int4", "hqq4", "hqq3", "hqq2")
}
FLOAT_FORMATS: dict[torch.dtype, str] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
FORMATS: dict[str, ExpertFormat] = {name: ExpertFormat(matrix) for name, matrix in MATRIX_FORMATS.items()}


@functools.cache
def expert_format_named(name: str) -> ExpertFormat:
    """The format of experts by its name, such as "q4_k", "q4_k+q4_k+q6_k" (gate, up, down) or "int4g128@order".

    Raises:
        KeyError: there is none.
    """
    gate, up, down, orders = names_of_parts(name)
    if gate == up == down and gate in FORMATS and not orders:
        return FORMATS[gate]
    if gate == up == down and name != f"{gate}{ORDERS[orders]}":
        return expert_format_named(f"{gate}{ORDERS[orders]}")
    try:
        return ExpertFormat(format_named(down), gate=format_named(gate), up=format_named(up), orders=orders)
    except ValueError as error:  # parts that do not go together
        raise KeyError(name) from error


def format_asked_for(name: str) -> ExpertFormat:
    """As `expert_format_named`, for a name that a user gave; without orders of columns, which belong to a checkpoint.

    Raises:
        RequestError: there is none.
    """
    try:
        if "@" in name:
            raise KeyError(name)
        return expert_format_named(name)
    except KeyError:
        known = ", ".join(dict.fromkeys((*MATRIX_FORMATS, *format_names())))
        raise RequestError(f"no format {name!r}; there are: {known}, and the like of int4g128, int8row") from None


__all__ = [
    "FLOAT_FORMATS",
    "FORMATS",
    "IQ4NL",
    "MATRIX_FORMATS",
    "ORDERS",
    "PANEL",
    "Coded",
    "ExpertFormat",
    "ExpertShape",
    "MatrixFormat",
    "Strided",
    "UnpackedExpert",
    "expert_format_named",
    "format_asked_for",
    "format_named",
    "format_names",
    "strided_format",
    "uniform",
]
