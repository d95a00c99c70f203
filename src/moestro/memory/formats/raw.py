"""Stub until the formats are merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class MatrixFormat:
    name: str
    bits: int = 0


@dataclass(frozen=True)
class RawMatrix:
    layout: str
    rows: int
    columns: int
    tensors: dict[str, Tensor]
    fmt: Any


def uniform(bits: int, group: int, scale: Any, zero: Any) -> Any:
    return MatrixFormat(f"int{bits}g{group}{scale}{'z' if zero else ''}", bits)


def format_named(name: str) -> Any:
    return MatrixFormat(name)


def dequantize(raw: RawMatrix) -> Any:
    import sys

    return sys.modules["raw_reader"].read_raw(raw)
