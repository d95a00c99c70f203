"""HQQ's matrices with axis 0 and quantized scales and zeros, as mixtral-offloading published them.

Beside its codes `W_q` a matrix has `meta.scale_q` and `meta.zero_q`, a byte for each group, and scale and zero of these
bytes. Bits and groups are not written down; they follow from the shapes, since the model's config says how large a
matrix is. The layout is that of hqq 0.2.8 (its `Quantizer` and `BitPack`), under names of mixtral-offloading (its
`HQQLinearTritonSavable`); memory/formats/strided.py says what the numbers stand for.

Legend: R rows, K columns, g rows of a group, C = R / g classes, S super-groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

import torch
from torch import Tensor

from ...errors import CheckpointError, ModelError
from ...memory.formats import strided_format
from ...memory.formats.raw import RawMatrix
from ...memory.formats.strided import class_order
from .base import ExpertWeights, Part

_NEEDED = (
    "meta.scale_q",
    "meta.zero_q",
    *(f"meta.meta_{of}.{one}" for of in ("scale", "zero") for one in ("scale", "zero")),
)
_GROUPS = (16, 32, 64, 128, 256)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_AGAIN = "it is incomplete or damaged: download it again"


def read_hqq(name: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> RawMatrix:
    """One matrix of a checkpoint, without a copy of its codes.

    Args:
        name: for errors. tensors: by their endings (`tensor_names.split_hqq`). shape: R and K that the model needs.

    Raises:
        ModelError: scales or zeros are not quantized, or zeros in several super-groups.
        CheckpointError: a tensor is absent, or dtypes or shapes do not belong together or not to the model.
    """
    if not any(ending in tensors for ending in _NEEDED):
        raise ModelError(
            f"{name} is of HQQ, which Moestro does not read where scales and zeros are not quantized too; "
            "use another checkpoint"
        )
    if lacking := [ending for ending in _NEEDED if ending not in tensors]:
        raise CheckpointError(f"{name} has no {lacking[0]}; {_AGAIN}")
    rows, columns = shape
    codes, scales, zeros = (tensors[ending] for ending in ("W_q", "meta.scale_q", "meta.zero_q"))
    group = rows * columns // scales.numel() if scales.numel() else 0
    if group not in _GROUPS or rows % group or group * scales.numel() != rows * columns:
        raise CheckpointError(
            f"{name} is {list(shape)}, but has {scales.numel()} scales: no groups of 16, 32, 64, 128 or 256 rows"
        )
    bits = _bits_of(name, codes, shape, group)
    count = rows // group * columns
    pair = [_half(name, f"meta.meta_scale.{one}", tensors) for one in ("scale", "zero")]
    supers = len(pair[0])
    if len(pair[1]) != supers or supers == 0 or count % supers:
        sizes = f"{supers} scales and {len(pair[1])} zeros"
        raise CheckpointError(f"{name} has {count} scales, which super-groups of {sizes} do not divide; {_AGAIN}")
    for what, side, wanted in (
        ("scale_q", scales, {(count // supers, supers), (1, count)}),
        ("zero_q", zeros, {(1, count)}),
    ):
        if side.dtype != torch.uint8 or tuple(side.shape) not in wanted:
            found = f"{list(side.shape)} of {_name(side)}"
            raise CheckpointError(
                f"{name} has meta.{what} {found}, where {list(min(wanted))} of uint8 is needed; {_AGAIN}"
            )
    parts = {
        "weight": codes,
        "scales": scales.reshape(rows // group, columns),
        "zeros": zeros.reshape(rows // group, columns),
        "of_scales": torch.stack(pair),
        "of_zeros": torch.cat([_one(name, f"meta.meta_zero.{one}", tensors) for one in ("scale", "zero")]),
    }
    return RawMatrix("strided", rows, columns, parts, strided_format(bits, group, count // supers))


def by_class(module: str, weights: ExpertWeights) -> ExpertWeights:
    """Give the down matrix of an expert of such matrices the order of gate's and up's classes of rows.

    Raises:
        ModelError: neurons of an expert are in several orders, or it has biases.
    """
    formats = {part: one.raw.fmt for part, one in weights.matrices.items() if isinstance(one.raw, RawMatrix)}
    if not any(fmt.is_strided for fmt in formats.values()):
        return weights
    groups = {fmt.group for part, fmt in formats.items() if part != "down"}
    is_whole = formats.keys() == weights.matrices.keys() and all(fmt.is_strided for fmt in formats.values())
    if (
        not is_whole
        or len(groups) > 1
        or weights.biases
        or any(one.rows is not None for one in weights.matrices.values())
    ):
        raise ModelError(
            f"{module} has experts of HQQ's axis 0 with other matrices, groups or biases beside, which Moestro does "
            "not keep; use a checkpoint in which all three matrices are alike"
        )
    down = weights.matrices["down"].raw
    assert isinstance(down, RawMatrix)
    weights.matrices["down"] = Part(down, None, class_order(down.columns, groups.pop()))
    return weights


def _bits_of(name: str, codes: Tensor, shape: tuple[int, int], group: int) -> int:
    """Bits of a code, from the shape of the words that hold all.

    Raises:
        CheckpointError: no packing of hqq has that shape.
    """
    (rows, columns), count = shape, shape[0] * shape[1]
    if codes.dtype == torch.int32 and tuple(codes.shape) == (ceil(group / 10), count // group):
        return 3
    # The bytes are the same whether they were packed before or after the matrix got its own shape.
    for bits in (2, 4, 8) if codes.dtype == torch.uint8 else ():
        if tuple(codes.shape) in ((group * bits // 8, count // group), (rows * bits // 8, columns)):
            return bits
    found = f"{list(codes.shape)} of {_name(codes)}"
    raise CheckpointError(
        f"{name} is {list(shape)} in groups of {group} rows, but has W_q {found}: not of 2, 3, 4 or 8 bits"
    )


def _numbers(name: str, ending: str, tensors: Mapping[str, Tensor]) -> Tensor:
    numbers = tensors[ending].reshape(-1)
    if numbers.dtype not in _FLOATS or not bool(numbers.isfinite().all()):
        raise CheckpointError(f"{name} has {ending} of {_name(numbers)} that are no finite floats; {_AGAIN}")
    return numbers


def _half(name: str, ending: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """As float16 [S].

    Raises:
        CheckpointError: that does not hold them.
    """
    numbers = _numbers(name, ending, tensors)
    if not torch.equal(numbers.half().float(), numbers.float()):
        raise CheckpointError(
            f"{name} has {ending} of {_name(numbers)} that float16 does not hold; save them in float16"
        )
    return numbers.half()


def _one(name: str, ending: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """As float32 [1].

    Raises:
        ModelError: there are several.
    """
    numbers = _numbers(name, ending, tensors)
    if numbers.numel() != 1:
        raise ModelError(
            f"{name} has {numbers.numel()} numbers in {ending}; Moestro reads zeros that all share one; "
            "use another checkpoint"
        )
    return numbers.float()


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
