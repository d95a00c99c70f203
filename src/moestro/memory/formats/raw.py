"""A matrix as a checkpoint holds it: views of the file's bytes, and the layout that they are in.

`MatrixFormat`, `uniform` and `format_named` here stand in for those of the descriptor, with the same names.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class MatrixFormat:
    """A number format by name, and bits of a code."""

    name: str
    bits: int = 0


@dataclass(frozen=True, slots=True)
class RawMatrix:
    """A stored matrix of `rows` x `columns` weights.

    tensors, by layout, R rows, K columns, G groups of columns:
        "gguf"      weight uint8 [R, bytes of a row]; the type by fmt.name
        "mxfp4"     blocks uint8 [R, G, 16], scales uint8 [R, G]
        "nibbles"   weight uint8 [R, K / 2], scales [R, G] uint8 or e4m3, tensor float32 [] with e4m3
        "words"     weight int32 [R, K / 8 or / 4], scales [R, G], zeros int32 [R / 8 or / 4, G] and g_idx [K] if any
        "bytes"     weight int8 [R, K], scales [R, G], zeros int8 [R, G] if any
        "fp8"       weight e4m3 [R, K], scales [R / 128, K / 128], uint8 [R, K / 32], [R, 1] or []
        "awq"       weight int32 [K, R / 8], scales [G, R], zeros int32 [G, R / 8] if any
        "gptq"      weight int32 [K / 8 or / 4, R], scales [G, R], zeros int32 [G, R / 8 or / 4] as they are
                    subtracted, if they are not the middle of the codes, g_idx [K] if groups are not in order
    """

    layout: str
    rows: int
    columns: int
    tensors: dict[str, Tensor]
    fmt: MatrixFormat


@functools.lru_cache
def uniform(bits: int, group: int, scale: str, zero: bool) -> MatrixFormat:
    """Whole numbers of some bits: columns of a group (0 for a row), dtype of scales, whether each group has a zero."""
    size = f"g{group}" if group else "row"
    return MatrixFormat(f"int{bits}{size}{'' if scale == 'fp16' else scale}{'z' if zero else ''}", bits)


@functools.lru_cache
def format_named(name: str) -> MatrixFormat:
    """The format of that name."""
    return MatrixFormat(name)
