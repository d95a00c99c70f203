"""Quantized matrices of safetensors files by their headers: which format each is kept in, and how large it is.

As `loading/sources/layouts.py` reads them, without their numbers: zeros that all say the middle, which that leaves out,
are taken from what the config says.

Legend: R rows, K columns, G groups of columns that share a scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import ceil, prod
from typing import Any

from ...errors import CheckpointError, ModelError
from ...planning.formats import uniform_name
from ..headers import TensorHeader
from ..quantization import Quantization
from ..tensor_names import WEIGHTS, split_name
from .roles import Matrix

_FLOATS = ("F64", "F32", "F16", "BF16")
_POWERS = ("U8", "F8_E8M0")
_SCALES = ("weight_scale_inv", "weight_scale", "scale_inv", "scale", "qscale_weight", "scales")
_SCALE_KINDS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}


def matrices_of(tensors: Iterable[TensorHeader], quantization: Quantization, text: Mapping[str, Any]) -> list[Matrix]:
    """The weights that tensors are of.

    Raises:
        ModelError, CheckpointError: a layout that is not known; as the reader of such a file says.
    """
    groups: dict[str, dict[str, TensorHeader]] = {}
    for tensor in tensors:
        base, ending = split_name(tensor.name)
        groups.setdefault(base, {})[ending] = tensor
    found = []
    for base, parts in groups.items():
        main = next((ending for ending in WEIGHTS if ending in parts), None)
        if main is None or len(parts) == 1 or parts[main].dtype in _FLOATS:  # parameters that only sound like scales
            found += [_plain(one) for one in parts.values()]
        else:
            found.append(_quantized(base, parts, quantization, text))
    return found


def _plain(tensor: TensorHeader) -> Matrix:
    base, _, ending = tensor.name.rpartition(".")
    if ending in ("weight", "bias"):
        return Matrix(base, tensor.shape, tensor.dtype, ending)
    return Matrix(tensor.name, tensor.shape, tensor.dtype, "")


def _quantized(
    base: str, parts: Mapping[str, TensorHeader], quantization: Quantization, text: Mapping[str, Any]
) -> Matrix:
    """One matrix, or those of all experts, stacked: their first dimension stays."""
    if "W_q" in parts:
        return _hqq(base, parts, text)
    if {"blocks", "scales"} <= parts.keys():
        *outer, rows, groups, _ = parts["blocks"].shape
        return _matrix(base, (*outer, rows, 32 * groups), "mxfp4")
    if "qweight" in parts:
        return _of_words(base, parts, quantization)
    packed = parts.get("weight_packed", parts.get("packed"))
    scale = next((parts[name] for name in _SCALES if name in parts), None)
    if scale is None:
        raise ModelError(f"{base} has {', '.join(sorted(parts))}, a layout that Moestro does not read")
    if packed is not None and packed.dtype == "I32":
        bits, zeros = quantization.bits_of(base), "weight_zero_point" in parts
        rows, columns = packed.shape[-2], packed.shape[-1] * 32 // bits
        return _matrix(base, (*packed.shape[:-2], rows, columns), _uniform(bits, columns, scale, zeros))
    weight = packed or parts["weight"]
    *outer, rows, columns = weight.shape
    if weight.dtype == "F8_E4M3":
        return _matrix(base, weight.shape, _fp8(base, rows, columns, scale))
    is_four_bit = scale.dtype in ("F8_E4M3", *_POWERS) and weight.dtype in ("U8", "I8")
    if packed is not None or is_four_bit:
        return _matrix(base, (*outer, rows, 2 * columns), "nvfp4" if scale.dtype == "F8_E4M3" else "mxfp4")
    if weight.dtype == "I8":
        zeros = "weight_zero_point" in parts and not _is_symmetric(quantization)
        return _matrix(base, weight.shape, _uniform(8, columns, scale, zeros))
    raise ModelError(f"{base} has weights of {weight.dtype}, which Moestro does not read")


def _of_words(base: str, parts: Mapping[str, TensorHeader], quantization: Quantization) -> Matrix:
    """AutoAWQ and GPTQ: [K, R] in 32-bit words, along R and along K."""
    words, scales = parts["qweight"], parts["scales"]
    groups, rows = scales.shape[-2:]
    bits = 4
    if quantization.method == "awq":
        columns = words.shape[-2]
    else:
        bits = quantization.bits_of(base)
        columns = words.shape[-2] * 32 // bits
    zeros = "qzeros" in parts and (quantization.method == "awq" or not _is_symmetric(quantization))
    name = uniform_name(bits, _group(base, groups, columns), _SCALE_KINDS[scales.dtype], zeros)
    return _matrix(base, (rows, columns), name)


def _hqq(base: str, parts: Mapping[str, TensorHeader], text: Mapping[str, Any]) -> Matrix:
    """mixtral-offloading's form, in which a matrix's size stands in the config alone."""
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    width = text.get("head_dim") or hidden // heads
    last = base.rpartition(".")[2]
    sizes = {
        "w1": (text["intermediate_size"], hidden),
        "w3": (text["intermediate_size"], hidden),
        "w2": (hidden, text["intermediate_size"]),
        "q_proj": (heads * width, hidden),
        "o_proj": (hidden, heads * width),
    }
    rows, columns = sizes.get(last, ((text.get("num_key_value_heads") or heads) * width, hidden))
    codes, scales, supers = parts["W_q"], parts["meta.scale_q"], parts["meta.meta_scale.scale"]
    count = prod(scales.shape)
    bits = 3 if codes.dtype == "I32" else 8 * codes.n_bytes // (rows * columns)
    name = f"hqq{bits}r{rows * columns // count}s{count // prod(supers.shape)}"
    return _matrix(base, (rows, columns), name)


def _matrix(base: str, shape: tuple[int, ...], name: str) -> Matrix:
    return Matrix(base, tuple(shape), "", "weight", name)


def _fp8(base: str, rows: int, columns: int, scale: TensorHeader) -> str:
    shape = scale.shape[-2:] if len(scale.shape) > 1 else scale.shape
    if scale.dtype in _POWERS and tuple(shape) == (rows, ceil(columns / 32)):
        return "mxfp8"
    if tuple(shape) == (ceil(rows / 128), ceil(columns / 128)):
        return "fp8"
    if prod(shape) in (1, rows):
        return "fp8row"
    raise CheckpointError(f"{base} is {[rows, columns]} in FP8, but its scales are {list(shape)}")


def _uniform(bits: int, columns: int, scale: TensorHeader, zeros: bool) -> str:
    groups = scale.shape[-1] if len(scale.shape) > 1 else 1
    return uniform_name(bits, _group(scale.name, groups, columns), _SCALE_KINDS[scale.dtype], zeros)


def _group(name: str, groups: int, columns: int) -> int:
    if groups == 1:
        return 0
    found = next((group for group in (16, 32, 64, 128) if ceil(columns / group) == groups), None)
    if found is None:
        raise CheckpointError(f"{name} has {groups} scales for {columns} columns: no groups of 16, 32, 64 or 128")
    return found


def _is_symmetric(quantization: Quantization) -> bool:
    return bool(quantization.config.get("sym", quantization.config.get("symmetric", True)))
