"""GGUF's types of tensors: which are kept as they are, which `--transcode 8` turns into int8, and which are refused.

Legend: R rows (output features), K columns (input features).
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from ...errors import ModelError, in_tensor
from ...memory.formats import format_named
from ...memory.formats.quantize import quantize_int8
from ...memory.formats.raw import RawMatrix
from ...planning.budget import format_bytes
from ...planning.spelling import spelled
from ..gguf_header import TRANSCODED
from .gguf_file import GgufTensor, gguf_package

KEPT = (
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "Q2_K",
    "Q3_K",
    "IQ4_NL",
    "IQ4_XS",
    "MXFP4",
    "NVFP4",
)
_ROWS_AT_ONCE = 1024  # that are floats on the way to int8


def stored_matrix(
    name: str, tensor: GgufTensor, data: Tensor, *, scale: float | None = None, transcode: bool = False
) -> RawMatrix | Tensor:
    """The bytes of a matrix, or of one expert's, as a stored matrix; a float tensor's numbers as they are.

    Args:
        name: for errors. data: the tensor's, or that of one expert: uint8 [R, bytes of a row], or floats.
        scale: of the whole matrix, which NVFP4 may have in a tensor of its own.
        transcode: round types that no format here keeps to int8.

    Raises:
        ModelError: nothing here reads its type, or its type has no place for the scale.
    """
    if scale is not None and tensor.type != "NVFP4":
        raise ModelError(f"{name} is of type {tensor.type} and has a scale beside it, which Moestro reads for NVFP4")
    if data.dtype != torch.uint8:
        return data
    if tensor.type in KEPT:
        parts = {"weight": data}
        if tensor.type == "NVFP4":
            parts["tensor"] = torch.tensor(1.0 if scale is None else scale)
        return RawMatrix("gguf", data.shape[0], tensor.shape[-1], parts, format_named(tensor.type.lower()))
    if tensor.type not in TRANSCODED:
        raise ModelError(
            f"{name} is of type {tensor.type}, which Moestro does not read; use a file of Q4_K_M, IQ4_XS, Q8_0 or MXFP4"
        )
    if not transcode:
        raise ModelError(
            f"{name} is of type {tensor.type}, which Moestro does not keep: {spelled('transcode', 8)} rounds such "
            f"weights to 8 bits ({format_bytes(int8_bytes(tensor))} instead of {format_bytes(tensor.data.nbytes)} "
            "for this tensor); or use a file of Q4_K_M, IQ4_XS, Q8_0 or MXFP4"
        )
    return _as_int8(name, data, tensor)


def int8_bytes(tensor: GgufTensor) -> int:
    """Bytes of a tensor in int8, scales included."""
    columns, group = tensor.shape[-1], format_named("int8").group
    return prod(tensor.shape[:-1]) * (columns + 2 * -(-columns // group))


def floats_of(data: Tensor, type_name: str) -> Tensor:
    """Rows of blocks as float32, by the gguf package's own rules: uint8 [R, bytes of a row] -> [R, K]."""
    gguf = gguf_package()
    kind: Any = gguf.GGMLQuantizationType[type_name]
    return torch.from_numpy(gguf.dequantize(data.numpy(), kind))


def _as_int8(name: str, data: Tensor, tensor: GgufTensor) -> RawMatrix:
    fmt, columns = format_named("int8"), tensor.shape[-1]
    codes = torch.empty(data.shape[0], columns, dtype=torch.uint8)
    scales = torch.empty(data.shape[0], -(-columns // fmt.group), dtype=torch.float16)
    for first in range(0, data.shape[0], _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        with in_tensor(f"{name}, from row {first} on"):
            coded = quantize_int8(floats_of(data[rows], tensor.type), fmt.group)
        codes[rows], scales[rows] = coded.codes, coded.scales
    return RawMatrix("bytes", data.shape[0], columns, {"weight": codes.view(torch.int8), "scales": scales}, fmt)
