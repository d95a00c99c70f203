"""Matrices as files hold them, to panels: by the kernels' repacking, or by its torch twin without kernels.

Only places change, never a number. Legend: R rows, K columns, F expert neurons.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..memory.formats import FLOAT_FORMATS, ExpertFormat, ExpertShape, MatrixFormat, format_named
from ..memory.formats.raw import RawMatrix, flip, read_raw, read_strided, sides, strided_table
from ..memory.formats.strided import class_order, write_matrix, write_table
from ..planning.descriptor import Scale
from .cpu import _kernels, kernel_format, runner

Stored: TypeAlias = "_kernels.Stored"
StoredPart: TypeAlias = tuple[RawMatrix | Tensor, Tensor | None, Tensor | None]  # matrix, rows, order of columns

# a stored matrix, first row, rows, first column, columns, and the panels that these become
_Job: TypeAlias = "tuple[_kernels.Stored, int, int, int, int, Tensor]"

_ROWS_OF_JOB = 256  # of a matrix, on one thread


def format_of(raw: RawMatrix | Tensor) -> MatrixFormat:
    """The format that keeps a stored matrix as it is; a float tensor's own."""
    return raw.fmt if isinstance(raw, RawMatrix) else format_named(FLOAT_FORMATS[raw.dtype])


def pack_stored(
    packed: Tensor,
    fmt: ExpertFormat,
    shape: ExpertShape,
    parts: Mapping[str, StoredPart],
    *,
    threads: int,
) -> None:
    """Write matrices of one expert into its bytes.

    Args:
        packed: uint8 [expert_bytes], on the CPU.
        parts: "gate", "up" and "down": the stored matrix, which of its rows and in which order (int64), and the order
            of its columns (int64 [K]); None for all, in the file's order. Columns of gate and up in an order of their
            own need a format that keeps it. Rows of a matrix whose scales belong to columns are those of its classes.

    Raises:
        CheckpointError: FP8 whose blocks of 128 rows begin within 16 that are packed together, or with a NaN.
    """
    pack_stored_experts([(packed, parts)], fmt, shape, threads=threads)


def pack_stored_experts(
    experts: Iterable[tuple[Tensor, Mapping[str, StoredPart]]], fmt: ExpertFormat, shape: ExpertShape, *, threads: int
) -> None:
    """As `pack_stored`, of several experts of one format and shape, between which no thread waits for another.

    Args:
        experts: of each, `packed` and `parts`.

    Raises:
        CheckpointError: as in `pack_stored`.
    """
    jobs: list[_Job] = []
    for packed, parts in experts:
        fmt.pack_orders(packed, shape, orders_of(fmt, shape, parts))
        if _kernels is None:
            _pack_by_the_twin(packed, fmt, shape, parts)
        else:
            jobs += _jobs_of(packed, fmt, shape, parts)
            raws = {name: (raw, columns) for name, (raw, _, columns) in parts.items() if isinstance(raw, RawMatrix)}
            strided = {name: one for name, one in raws.items() if one[0].fmt.is_strided}
            tables = {name: (strided_table(*one), one[0].tensors["of_zeros"]) for name, one in strided.items()}
            fmt.pack_tables(packed, shape, tables)
    if not jobs:
        return
    try:
        _kernels.repack(runner(threads), jobs)
    except ValueError as error:
        raise CheckpointError(f"these experts cannot be kept as they are stored: {error}") from error


def _pack_by_the_twin(packed: Tensor, fmt: ExpertFormat, shape: ExpertShape, parts: Mapping[str, StoredPart]) -> None:
    for name, (raw, rows, columns) in parts.items():
        if isinstance(raw, Tensor):
            taken = raw if rows is None else raw[rows]
            fmt.pack(packed, shape, {name: taken if columns is None else taken[:, columns]})
        elif raw.fmt.is_strided:
            _check_classes(raw, rows)
            fmt.pack_coded(packed, shape, {name: read_strided(raw, columns)})
        else:
            fmt.pack_coded(packed, shape, {name: read_raw(raw, rows, columns)})


def _jobs_of(packed: Tensor, fmt: ExpertFormat, shape: ExpertShape, parts: Mapping[str, StoredPart]) -> list[_Job]:
    """What there is to do for one expert, as the kernels' `repack` takes it."""
    places, size, head = dict(fmt.places(shape)), fmt.block_bytes(shape), fmt.head_bytes(shape)
    jobs: list[_Job] = []
    for name, (raw, rows, columns) in parts.items():
        matrix, place = _stored(raw, rows, columns), places[name]
        for block in range(fmt.blocks(shape)):
            out = packed[head + block * size + place.start : head + block * size + place.stop]
            first = block * fmt.block
            jobs.append(
                (matrix, 0, shape.hidden, first, fmt.block, out)
                if name == "down"
                else (matrix, first, fmt.block, 0, shape.hidden, out)
            )
    return jobs


def pack_stored_matrix(
    packed: Tensor, raw: RawMatrix | Tensor, rows: Tensor | None, columns: Tensor | None, *, threads: int
) -> None:
    """Write one matrix into panels of `format_of(raw)`.

    Args:
        packed: uint8 [matrix_bytes], on the CPU.
        rows, columns: as in `pack_stored`.

    Raises:
        CheckpointError: as in `pack_stored`.
    """
    fmt = format_of(raw)
    n_rows, n_columns = raw.shape if isinstance(raw, Tensor) else (raw.rows, raw.columns)
    n_rows = n_rows if rows is None else len(rows)
    if isinstance(raw, RawMatrix) and fmt.is_strided:
        if _kernels is None:
            _check_classes(raw, rows)
            packed.copy_(write_matrix(fmt, read_strided(raw, columns)))
            return
        panels_bytes = fmt.panels_bytes(n_rows, n_columns)
        packed[panels_bytes:] = write_table(strided_table(raw, columns), raw.tensors["of_zeros"], n_columns)
        packed = packed[:panels_bytes]
    elif _kernels is None:
        if isinstance(raw, Tensor):
            taken = raw if rows is None else raw[rows]
            panels = fmt.pack(taken if columns is None else taken[:, columns])
        else:
            panels = fmt.write(read_raw(raw, rows, columns))
        packed.copy_(panels.view(-1))
        return
    matrix, job_bytes = _stored(raw, rows, columns), fmt.panels_bytes(_ROWS_OF_JOB, n_columns)
    outs = packed.split(job_bytes)
    firsts = range(0, n_rows, _ROWS_OF_JOB)
    jobs = [
        (matrix, first, min(_ROWS_OF_JOB, n_rows - first), 0, n_columns, out)
        for first, out in zip(firsts, outs, strict=True)
    ]
    try:
        _kernels.repack(runner(threads), jobs)
    except ValueError as error:
        raise CheckpointError(f"this matrix cannot be kept as it is stored: {error}") from error


def orders_of(fmt: ExpertFormat, shape: ExpertShape, parts: Mapping[str, StoredPart]) -> list[Tensor]:
    """The orders of gate's and up's columns that a format keeps, int64 [D] each.

    Raises:
        ValueError: a matrix has one that the format does not keep.
    """
    own = torch.arange(shape.hidden)
    found = [parts[name][2] for name in ("gate", "up") if name in parts]
    orders = [own if order is None else order for order in found]
    kept = [orders[0], orders[-1]][: fmt.orders]
    for order in orders:
        if not any(torch.equal(order, one) for one in kept or [own]):
            raise ValueError(f"{fmt.name} does not keep the order of these columns")
    return kept


def _stored(raw: RawMatrix | Tensor, rows: Tensor | None, columns: Tensor | None) -> Stored:
    """A stored matrix as the kernels take it."""
    layouts = _kernels.Layout
    if isinstance(raw, RawMatrix) and raw.fmt.is_strided:
        _check_classes(raw, rows)
        fmt = kernel_format(raw.fmt)
        assert fmt is not None
        return _kernels.Stored(
            format=fmt,
            layout=layouts.strided,
            rows=raw.rows,
            columns=raw.columns,
            codes=_flat(raw.tensors["weight"]),
            scales=_flat(raw.tensors["scales"]),
            zeros=_flat(raw.tensors["zeros"]),
            column_order=columns,
        )
    given: dict[str, Any] = {"row_order": rows, "column_order": columns, "format": kernel_format(format_of(raw))}
    if isinstance(raw, Tensor):
        size = raw.element_size()
        given |= {"rows": raw.shape[0], "columns": raw.shape[1], "layout": layouts.plain, "codes": _bytes_of(raw)}
        return _kernels.Stored(**given, row_stride=raw.stride(0) * size, column_stride=raw.stride(1) * size)
    given |= {"rows": raw.rows, "columns": raw.columns}
    codes = raw.tensors["blocks" if raw.layout == "mxfp4" else "weight"]
    if raw.layout == "gguf":
        given["tensor_scale"] = float(raw.tensors.get("tensor", 1.0))
        return _kernels.Stored(**given, layout=layouts.gguf, codes=_flat(codes))
    given["flip"] = flip(raw)
    if raw.fmt.scale is Scale.BLOCK:
        given["scales"] = _flat(raw.tensors["scales"].float())  # of blocks, not of rows
    else:
        beside = sides(raw)
        given["scales"] = _flat(beside.scales)
        if beside.zeros is not None:
            given["zeros"] = _flat(beside.zeros)
        if beside.tensor is not None:
            given["tensor_scale"] = float(beside.tensor)
    if raw.layout in ("fp8", "bytes") or (raw.layout == "words" and raw.fmt.code_bits == 8):
        return _kernels.Stored(
            **given, layout=layouts.plain, codes=_flat(codes), row_stride=raw.columns, column_stride=1
        )
    layout = {"awq": layouts.awq, "gptq": layouts.gptq}.get(raw.layout, layouts.nibbles)
    return _kernels.Stored(**given, layout=layout, codes=_flat(codes))


def _check_classes(raw: RawMatrix, rows: Tensor | None) -> None:
    """Refuse rows in another order than that of a strided matrix's classes.

    Raises:
        ValueError: they are.
    """
    if rows is not None and not torch.equal(rows, class_order(raw.rows, raw.fmt.group)):
        raise ValueError(f"rows of a matrix in {raw.fmt.name} in another order than its own")


def _flat(tensor: Tensor) -> Tensor:
    """Its bytes, uint8 [n]; a copy where it is not one piece."""
    return tensor.reshape(-1).contiguous().view(torch.uint8) if tensor.numel() else tensor.view(torch.uint8)


def _bytes_of(tensor: Tensor) -> Tensor:
    """The bytes from the first element of a view to its last, uint8 [n], however it lies."""
    size = tensor.element_size()
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = torch.empty(0, dtype=torch.uint8)
    return flat.set_(tensor.untyped_storage(), tensor.storage_offset() * size, ((last + 1) * size,))  # type: ignore[no-any-return, call-overload]
