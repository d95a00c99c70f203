"""Quantized matrices as safetensors files hold them, one reader a layout: tensors -> RawMatrix, without a copy.

A matrix is some tensors whose names share a beginning: `split_name` takes a name apart, `read_matrix` puts a matrix
together and checks that dtypes and shapes belong to one another and to the model. Layouts are recognized by the
endings of the names and by dtypes; a file that Transformers, compressed-tensors, ModelOpt, AutoAWQ, GPTQModel or a
model's vendor wrote needs no other hint but the few of `Quantization`.

Legend: R rows (output features), K columns (input features), G groups of columns that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import CheckpointError, ModelError, first_line
from ...memory.formats import MatrixFormat, format_named, uniform
from ...memory.formats.raw import RawMatrix
from ..quantization import Quantization
from ..tensor_names import WEIGHTS as WEIGHTS  # which others have from this file
from ..tensor_names import split_name as split_name
from .hqq import read_hqq

Tensors = Mapping[str, Tensor]
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_E4M3, _E8M0, _BYTES = torch.float8_e4m3fn, torch.float8_e8m0fnu, (torch.uint8, torch.int8)
_SCALE_KINDS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_POWERS = (torch.uint8, _E8M0)  # dtypes that a scale of powers of two is stored in


class Matrix(NamedTuple):
    """One matrix as it is stored.

    raw: what the file holds; a float tensor [R, K] where it is not quantized.
    columns: int64 [K], the order in which columns are packed, which activations follow; None for the file's own.
    """

    raw: RawMatrix | Tensor
    columns: Tensor | None = None


def read_matrix(name: str, tensors: Tensors, shape: tuple[int, int], quantization: Quantization) -> Matrix:
    """One matrix of a checkpoint.

    Args:
        name: for errors.
        tensors: by their endings (`split_name`), of one matrix: [R, ...].
        shape: R and K that the model needs.

    Raises:
        CheckpointError: dtypes or shapes do not belong together or not to the model.
        ModelError: the layout is not known.
    """
    for needs, read in _LAYOUTS:
        if needs <= tensors.keys():
            try:
                return read(name, tensors, shape, quantization)
            except (IndexError, RuntimeError, ValueError) as error:  # a tensor has too few dimensions, say
                raise CheckpointError(f"{name} has tensors that do not fit together ({first_line(error)})") from error
    weight = tensors.get("weight")
    if weight is None or weight.dtype not in _FLOATS:
        what = "no weight" if weight is None else f"weights of {_name(weight.dtype)}"
        raise ModelError(f"{name} has {what} and {', '.join(sorted(tensors))}, a layout that Moestro does not read")
    if tuple(weight.shape) == shape[::-1] != shape:
        weight = weight.T
    _expect(name, "weights", weight, shape, _FLOATS)
    return Matrix(weight)


def _blocks(name: str, tensors: Tensors, shape: tuple[int, int], _: Quantization) -> Matrix:
    """gpt-oss: 16 bytes for 32 columns, the even ones in the low nibbles."""
    rows, columns = shape
    groups = ceil(columns / 32)
    _expect(name, "MXFP4 blocks", tensors["blocks"], (rows, groups, 16), _BYTES)
    _expect(name, "MXFP4 scales", tensors["scales"], (rows, groups), _POWERS)
    parts = {"blocks": tensors["blocks"].view(torch.uint8), "scales": tensors["scales"].view(torch.uint8)}
    return Matrix(RawMatrix("mxfp4", rows, columns, parts, format_named("mxfp4")))


def _weight_and_scale(name: str, tensors: Tensors, shape: tuple[int, int], quantization: Quantization) -> Matrix:
    """A weight of bytes: FP8, two FP4 codes a byte, or int8, told apart by dtype and shape."""
    weight = tensors["weight"]
    if weight.dtype == _E4M3:
        return _fp8(name, tensors, shape)
    if weight.dtype in _BYTES and weight.dim() == 2 and weight.shape[1] == ceil(shape[1] / 2) < shape[1]:
        return _nibbles(name, {"weight_packed": weight, **tensors}, shape, quantization)
    if weight.dtype == torch.int8:
        return _int8(name, tensors, shape)
    if weight.dtype in _FLOATS:  # a scale that is a parameter of the model's own, not of the weight
        return read_matrix(name, {"weight": weight}, shape, quantization)
    raise ModelError(f"{name} has weights of {_name(weight.dtype)}, which Moestro does not read")


def _fp8(name: str, tensors: Tensors, shape: tuple[int, int]) -> Matrix:
    rows, columns = shape
    weight, scale = tensors["weight"], _scale_of(tensors)
    _expect(name, "FP8 weights", weight, shape, (_E4M3,))
    blocks, groups = (ceil(rows / 128), ceil(columns / 128)), (rows, ceil(columns / 32))
    if tuple(scale.shape) == groups and scale.dtype in _POWERS:
        fmt, scale = format_named("mxfp8"), scale.view(torch.uint8)
    elif tuple(scale.shape) == blocks:
        fmt = format_named("fp8")
        scale = scale.view(_E8M0) if scale.dtype == torch.uint8 else scale
        _expect(name, "FP8 scales", scale, blocks, (*_FLOATS, _E8M0))
    elif scale.numel() in (1, rows):
        fmt = format_named("fp8row")
        scale = scale.reshape(-1, 1) if scale.numel() == rows else scale.reshape(())
        _expect(name, "FP8 scales", scale, tuple(scale.shape), _FLOATS)
    else:
        raise CheckpointError(f"{name} is {list(shape)} in FP8, but its scales are {list(scale.shape)}")
    return Matrix(RawMatrix("fp8", rows, columns, {"weight": weight, "scales": scale}, fmt))


def _nibbles(name: str, tensors: Tensors, shape: tuple[int, int], _: Quantization) -> Matrix:
    """Two E2M1 codes a byte, the even column in the low nibble: DeepSeek-V4, compressed-tensors, ModelOpt."""
    rows, columns = shape
    codes, scale = tensors["weight_packed"], _scale_of(tensors)
    _expect(name, "FP4 weights", codes, (rows, ceil(columns / 2)), _BYTES)
    parts = {"weight": codes.view(torch.uint8)}
    if scale.dtype == _E4M3:
        _expect(name, "NVFP4 scales", scale, (rows, ceil(columns / 16)), (_E4M3,))
        divisor = tensors.get("weight_global_scale", tensors.get("global_scale"))
        factor = tensors.get("weight_scale_2", tensors.get("scale_2"))
        one = divisor if factor is None else factor
        if one is None or one.numel() != 1:
            raise CheckpointError(f"{name} is in NVFP4, but has no single scale for the whole tensor")
        tensor = one.float().reshape(()) if factor is not None else 1 / one.float().reshape(())
        return Matrix(
            RawMatrix("nibbles", rows, columns, parts | {"scales": scale, "tensor": tensor}, format_named("nvfp4"))
        )
    _expect(name, "MXFP4 scales", scale, (rows, ceil(columns / 32)), _POWERS)
    parts["scales"] = scale.view(torch.uint8)
    return Matrix(RawMatrix("nibbles", rows, columns, parts, format_named("mxfp4")))


def _int8(name: str, tensors: Tensors, shape: tuple[int, int]) -> Matrix:
    weight, scale = tensors["weight"], _scale_of(tensors)
    _expect(name, "int8 weights", weight, shape, (torch.int8,))
    parts = {"weight": weight, "scales": _row_scales(name, scale, shape)}
    zeros = tensors.get("weight_zero_point")
    if zeros is not None and bool(zeros.any()):
        _expect(name, "zero points", zeros, tuple(parts["scales"].shape), (torch.int8,))
        parts["zeros"] = zeros
    group = _group(name, parts["scales"], shape)
    return Matrix(RawMatrix("bytes", *shape, parts, _uniform(8, group, parts["scales"], "zeros" in parts)))


def _words(name: str, tensors: Tensors, shape: tuple[int, int], quantization: Quantization) -> Matrix:
    """compressed-tensors: 32-bit words along the columns, lowest bits first, codes with half of their range added."""
    rows, columns = shape
    if tensors["weight_packed"].dtype != torch.int32:
        return _nibbles(name, tensors, shape, quantization)
    bits = quantization.bits_of(name)
    stated = tensors.get("weight_shape")
    if stated is not None and stated.tolist() != list(shape):
        raise CheckpointError(f"{name} says that it is {stated.tolist()}, but the model needs {list(shape)}")
    _expect(name, f"{bits}-bit weights", tensors["weight_packed"], (rows, ceil(columns * bits / 32)), (torch.int32,))
    scales = _row_scales(name, _scale_of(tensors), shape)
    parts, group = {"weight": tensors["weight_packed"], "scales": scales}, _group(name, scales, shape)
    zeros = tensors.get("weight_zero_point")
    if zeros is not None:
        _expect(name, "zero points", zeros, (ceil(rows * bits / 32), scales.shape[1]), (torch.int32,))
        parts["zeros"] = zeros
    order = _order(name, tensors.get("weight_g_idx"), group, columns)
    if order is not None:
        parts["g_idx"] = tensors["weight_g_idx"]
    return Matrix(RawMatrix("words", rows, columns, parts, _uniform(bits, group, scales, zeros is not None)), order)


def _qweight(name: str, tensors: Tensors, shape: tuple[int, int], quantization: Quantization) -> Matrix:
    """AutoAWQ and GPTQ: matrices [K, R] in 32-bit words, along R and along K."""
    rows, columns = shape
    scales, words, is_awq = tensors["scales"], tensors["qweight"], quantization.method == "awq"
    if quantization.method not in ("awq", "gptq"):
        said = f"says {quantization.method}" if quantization.method else "says nothing of quantization"
        raise CheckpointError(f"{name} has a qweight, as AWQ and GPTQ write it, but the config.json {said}")
    bits = 4 if is_awq else words.shape[0] * 32 // columns  # which single modules may have otherwise than the config
    if bits not in (4, 8):
        raise CheckpointError(f"{name} is {list(shape)}, but its words are {list(words.shape)}: not of 4 or 8 bits")
    each = 32 // bits  # codes of a word
    if rows % each or columns % each:
        raise CheckpointError(f"{name} is {list(shape)}, which {bits}-bit codes in 32-bit words do not divide")
    _expect(name, "weights", words, (columns, rows // each) if is_awq else (columns // each, rows), (torch.int32,))
    _expect(name, "scales", scales, (scales.shape[0], rows), _FLOATS)
    group = _group(name, scales.T, shape)
    parts, order = {"weight": words, "scales": scales}, None
    zeros = tensors.get("qzeros")
    if zeros is not None:
        _expect(name, "zeros", zeros, (scales.shape[0], rows // each), (torch.int32,))
    if not is_awq:
        order = _order(name, tensors.get("g_idx"), group, columns)
        if order is not None:
            parts["g_idx"] = tensors["g_idx"]
        ones = sum(1 << bits * i for i in range(each))
        if zeros is not None and quantization.zeros_less_one:
            zeros = ((zeros.long() + ones) & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)
        middle = (ones << bits - 1) - (1 << 32 if bits in (4, 8) else 0)
        if zeros is not None and bool((zeros == middle).all()):
            zeros = None  # symmetric: the zero is the middle of the codes
    if zeros is not None:
        parts["zeros"] = zeros
    fmt = _uniform(bits, group, scales, zeros is not None)
    return Matrix(RawMatrix(quantization.method, rows, columns, parts, fmt), order)


def _order(name: str, g_idx: Tensor | None, group: int, columns: int) -> Tensor | None:
    """The order of columns in which those of a group follow one another (GPTQ's act-order); None if they do already.

    Raises:
        CheckpointError: groups are not of equal size.
    """
    if g_idx is None or g_idx.numel() == 0 or group == 0:
        return None
    expected = torch.arange(columns) // group
    if tuple(g_idx.shape) != (columns,):
        raise CheckpointError(f"{name} has {columns} columns, but its g_idx is {list(g_idx.shape)}")
    if torch.equal(g_idx.long(), expected):
        return None
    order = g_idx.long().argsort(stable=True)
    if not torch.equal(g_idx.long()[order], expected):
        raise CheckpointError(f"{name} has a g_idx whose groups are not of {group} columns each")
    return order


def _scale_of(tensors: Tensors) -> Tensor:
    names = ("weight_scale_inv", "weight_scale", "scale_inv", "scale", "qscale_weight", "scales")
    return next(tensors[name] for name in names if name in tensors)


def _row_scales(name: str, scale: Tensor, shape: tuple[int, int]) -> Tensor:
    """Scales [R, G] of whole numbers; one for all weights is repeated for each row."""
    scale = scale.reshape(1, 1).expand(shape[0], 1) if scale.numel() == 1 else scale
    scale = scale[:, None] if scale.dim() == 1 else scale
    _expect(name, "scales", scale, (shape[0], scale.shape[-1]), _FLOATS)
    return scale


def _group(name: str, scales: Tensor, shape: tuple[int, int]) -> int:
    """Columns of a group, from scales [R, G]; 0 for a whole row.

    Raises:
        CheckpointError: groups of no known size fit.
    """
    groups = scales.shape[1]
    if groups == 1:
        return 0
    for group in (16, 32, 64, 128):
        if ceil(shape[1] / group) == groups:
            return group
    raise CheckpointError(f"{name} is {list(shape)}, but has {groups} scales a row: no groups of 16, 32, 64 or 128")


def _expect(name: str, what: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{name} has {what} of {list(tensor.shape)}, where the model needs {list(shape)}")
    if tensor.dtype not in dtypes:
        raise CheckpointError(f"{name} has {what} of {_name(tensor.dtype)}, not {' or '.join(map(_name, dtypes))}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _uniform(bits: int, group: int, scales: Tensor, zeros: bool) -> MatrixFormat:
    return uniform(bits, group, _SCALE_KINDS[scales.dtype], zeros)


_Reader = Callable[[str, Tensors, tuple[int, int], Quantization], Matrix]
_SCALES = ("weight_scale_inv", "weight_scale", "scale_inv", "scale", "qscale_weight")
_LAYOUTS: tuple[tuple[set[str], _Reader], ...] = (
    ({"W_q"}, lambda n, t, s, _: Matrix(read_hqq(n, t, s))),
    ({"blocks", "scales"}, _blocks),
    ({"weight_packed", "weight_scale"}, _words),
    (
        {"packed", "scale"},
        lambda n, t, s, q: _words(n, {**t, "weight_packed": t["packed"], "weight_scale": t["scale"]}, s, q),
    ),
    ({"qweight", "scales"}, _qweight),
    *(({"weight", scale}, _weight_and_scale) for scale in _SCALES),
)
