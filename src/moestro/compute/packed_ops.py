"""Packed linear layers and embeddings as operations of torch, which computes them where their tensors are.

On a GPU by the Triton kernels, on the CPU by the compiled ones. Unlike direct calls (`cpu.run_linear`), operations can
be captured in graphs and are seen by torch.compile; they cost some microseconds more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..memory.formats import format_named
from . import cpu, gpu
from .cpu import Matrix


def run_linear(matrix: Matrix, x: Tensor, *, threads: int) -> Tensor:
    """As `cpu.run_linear`, with all tensors on one device."""
    x = x if matrix.order is None else x.index_select(-1, matrix.order)
    done: Tensor = _linear(x, matrix.packed, matrix.bias, matrix.fmt.name, matrix.rows, threads)
    return done


def look_up(table: Matrix, ids: Tensor, dtype: torch.dtype, *, threads: int) -> Tensor:
    """As `cpu.look_up`, with all tensors on one device."""
    done: Tensor = _rows(ids, table.packed, table.fmt.name, table.rows, table.columns, dtype, threads)
    return done


@torch.library.custom_op("moestro::packed_linear", mutates_args=(), device_types="cpu")
def _linear(x: Tensor, packed: Tensor, bias: Tensor | None, fmt: str, rows: int, threads: int) -> Tensor:
    return cpu.run_linear(Matrix(packed, format_named(fmt), rows, x.shape[-1], bias), x, threads=threads)


@_linear.register_kernel("cuda")
def _linear_on_gpu(x: Tensor, packed: Tensor, bias: Tensor | None, fmt: str, rows: int, threads: int) -> Tensor:
    return gpu.run_linear(Matrix(packed, format_named(fmt), rows, x.shape[-1], bias), x)


@_linear.register_fake
def _linear_shape(x: Tensor, packed: Tensor, bias: Tensor | None, fmt: str, rows: int, threads: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.custom_op("moestro::packed_rows", mutates_args=(), device_types="cpu")
def _rows(ids: Tensor, packed: Tensor, fmt: str, rows: int, columns: int, dtype: torch.dtype, threads: int) -> Tensor:
    return cpu.look_up(Matrix(packed, format_named(fmt), rows, columns), ids, dtype, threads=threads)


@_rows.register_kernel("cuda")
def _rows_on_gpu(
    ids: Tensor, packed: Tensor, fmt: str, rows: int, columns: int, dtype: torch.dtype, threads: int
) -> Tensor:
    return gpu.look_up(Matrix(packed, format_named(fmt), rows, columns), ids, dtype)


@_rows.register_fake
def _rows_shape(
    ids: Tensor, packed: Tensor, fmt: str, rows: int, columns: int, dtype: torch.dtype, threads: int
) -> Tensor:
    return ids.new_empty((*ids.shape, columns), dtype=dtype)
