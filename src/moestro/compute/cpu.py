"""What the compiled kernels calculate on the CPU, bound to tensors; the machine's limits beside it.

Experts (`CpuExperts`; their twin is `experts.run_experts`), linear layers (`run_linear`), embeddings (`look_up`), norms
(`rms_norm`) and the solver that quantizes (`solve_hqq`); what goes together for few tokens is in few_tokens.py. A
layer's experts run in the kernels when these have their format and their family's gate (activations.py), else in the
torch twin.

Legend: T tokens, D model width, n tokens of one expert, f neurons of a share.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import RequestError
from ..memory.formats import FLOAT_FORMATS, PANEL, MatrixFormat, hqq_solver, quantize
from ..planning.descriptor import Descriptor
from .activations import Kernel, recognize
from .cores import core_cpus as core_cpus
from .eager import outside_of_graphs
from .experts import ExpertMath, ExpertWork, run_experts

try:
    from . import _kernels as _kernels  # few_tokens.py has it from here
except ImportError:  # a pure wheel: no compiler was there when it was built
    _kernels = None  # type: ignore[assignment]

KernelShape: TypeAlias = "_kernels.Shape"  # a layer's experts, as the kernels take them
_BLOCKS = (64, 128, 256)  # neurons
PREFETCH_FLOATS = (0, 256, 1024, -1)  # how far ahead to prefetch; -1: read four streams instead, as the kernels do
_ROWS_AT_ONCE = 256  # of a lookup in plain torch: each takes its panel of 16 along


class CpuExperts:
    """Computes a layer step's CPU experts on a pool of threads of its own.

    Args:
        threads: of the pool, the caller included; None for one on each physical core.
        level: ISA level to force, or "torch" for the twin: for tests; None for the best that this CPU runs.
    """

    def __init__(self, threads: int | None = None, level: str | None = None) -> None:
        self.threads = threads or len(core_cpus())
        self._level = level or ""
        self._known: dict[int, _Known] = {}  # by the id of its math

    def kernel(self, math: ExpertMath) -> Kernel | None:
        """Which kernel computes these experts; None for the torch twin."""
        return self._know(math).kernel

    def kernel_shape(self, math: ExpertMath) -> KernelShape | None:
        """The experts as the kernels take them; None for the torch twin."""
        return self._know(math).shape

    def _know(self, math: ExpertMath) -> _Known:
        known = self._known.get(id(math))
        if known is None:
            kernel = self._find_kernel(math)
            known = self._known[id(math)] = _Known(math, kernel, None if kernel is None else _shape(math, kernel))
        return known

    def _find_kernel(self, math: ExpertMath) -> Kernel | None:
        if _kernels is None or self._level == "torch" or math.post_norm is not None:
            return None
        block = math.format.block
        if block not in _BLOCKS or block % math.format.matrices["down"].block:
            return None
        return recognize(math.activation, math.shape.has_gate)

    def run(self, math: ExpertMath, x: Tensor, work: Sequence[ExpertWork], out: Tensor) -> None:
        """As `run_experts`: adds the work's result to `out`, float32 [T, D], on the host."""
        shape = self._know(math).shape
        if shape is None:
            run_experts(math, x, work, out)
            return
        runner(self.threads).run(self._level, shape, _readable(x), work, out)


@dataclass(frozen=True, slots=True)
class _Known:
    """What was found of a layer's experts. Holds its math, so that no other can take that one's id."""

    math: ExpertMath
    kernel: Kernel | None
    shape: KernelShape | None


def _shape(math: ExpertMath, kernel: Kernel) -> KernelShape:
    name, alpha, limit, offset = kernel
    formats: dict[str, Any] = {part: kernel_format(fmt) for part, fmt in math.format.matrices.items()}
    return _kernels.Shape(
        hidden=math.shape.hidden,
        neurons=math.shape.neurons,
        has_gate=math.shape.has_gate,
        has_bias=math.shape.has_bias,
        **formats,
        block=math.format.block,
        activation=getattr(_kernels.Activation, name),
        alpha=alpha,
        limit=limit,
        offset=offset,
        orders=math.format.orders,
    )


@dataclass(frozen=True)
class Matrix:
    """A linear layer, or a table of rows: packed bytes of [rows, columns] in `fmt`, and its float32 bias.

    order: int64 [columns], in which columns are packed and activations are gathered; None for their own.
    """

    packed: Tensor
    fmt: MatrixFormat
    rows: int
    columns: int
    bias: Tensor | None = None
    order: Tensor | None = None

    @functools.cached_property
    def linear(self) -> _kernels.Linear:
        """As the kernels take it; they read no `order`.

        Raises:
            ValueError: they lack the format, or bytes or bias are not of that size.
        """
        fmt = kernel_format(self.fmt)
        if fmt is None:
            raise ValueError(f"the kernels do not take matrices in {self.fmt.name}")
        return _kernels.Linear(self.packed, fmt, self.rows, self.columns, self.bias)

    def __reduce__(self) -> tuple[type[Matrix], tuple[Any, ...]]:
        parts = (self.packed, self.fmt, self.rows, self.columns, self.bias, self.order)
        return Matrix, parts  # a copy makes its own `linear`

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """[rows, columns], rounded once."""
        exact = dtype if dtype.itemsize > 4 else torch.float32
        found = self.fmt.unpack_matrix(self.packed, self.rows, self.columns, exact).to(dtype)
        return found if self.order is None else torch.empty_like(found).index_copy_(1, self.order, found)

    @property
    def panels(self) -> Tensor:
        """uint8 [P, panel_bytes], a view; without the table that some formats have behind them."""
        size = self.fmt.panels_bytes(self.rows, self.columns)
        return self.packed.view(-1)[:size].view(-1, self.fmt.panel_bytes(self.columns))


@outside_of_graphs
def run_linear(matrix: Matrix, x: Tensor, *, threads: int, level: str = "") -> Tensor:
    """x W^T + bias with a packed matrix, on the host.

    Args:
        x: [..., columns], float32, float16 or bfloat16.
        level: as in `CpuExperts`.

    Returns:
        [..., rows], in the dtype of `x`.
    """
    if kernel_format(matrix.fmt) is None or level == "torch":
        return torch.nn.functional.linear(x.float(), matrix.unpack(torch.float32), matrix.bias).to(x.dtype)
    x = _readable(x if matrix.order is None else x.index_select(-1, matrix.order))
    out = x.new_empty((*x.shape[:-1], matrix.rows))
    runner(threads).run_linear(level, matrix.linear, x, out)
    return out


@outside_of_graphs
def look_up(table: Matrix, ids: Tensor, dtype: torch.dtype, *, threads: int, level: str = "") -> Tensor:
    """Rows of a packed table: int64 ids [...] -> [..., columns] in `dtype`, float32, float16 or bfloat16.

    Raises:
        IndexError: it has no such row.
    """
    if kernel_format(table.fmt) is None or level == "torch":
        if table.fmt.is_strided:  # whose panels need the table of the whole
            return table.unpack(torch.float32)[ids].to(dtype)
        parts = []
        for rows in ids.flatten().split(_ROWS_AT_ONCE):
            if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < table.rows:
                raise IndexError(f"no row {rows.tolist()} in a table of {table.rows}")
            near = table.fmt.unpack(table.panels[rows // PANEL], table.columns, torch.float32)
            parts.append(near.unflatten(0, (-1, PANEL))[torch.arange(len(rows)), rows % PANEL].to(dtype))
        return torch.cat(parts).view(*ids.shape, table.columns)
    ids = ids.long().contiguous()
    out = torch.empty((*ids.shape, table.columns), dtype=dtype)
    runner(threads).look_up(level, table.linear, ids, out)
    return out


@outside_of_graphs
def rms_norm(x: Tensor, weight: Tensor, offset: float, epsilon: float, *, threads: int, level: str = "") -> Tensor:
    """Root-mean-square norm over the last dimension.

    Args:
        x: [..., D], contiguous, float32, float16 or bfloat16. weight: [D], contiguous, of these dtypes.
        offset: 0: norm(x), rounded to the dtype of x, times weight; else norm(x) * (offset + weight).

    Returns:
        [..., D], in the dtype of x.
    """
    assert _kernels is not None
    out = torch.empty_like(x)
    runner(threads).rms_norm(level, x, weight, offset, epsilon, out)
    return out


def solve_hqq(
    matrix: Tensor, *, bits: int, group: int, fit: bool, threads: int | None = None, level: str = ""
) -> hqq_solver.Fitted:
    """As `hqq_solver.solve_in_torch`, for a matrix [R, K] on the CPU.

    Results do not depend on the number of threads. Those of two levels are equal while all errors are below 0.17, and
    else agree to some units in the last place before they are rounded.

    Args:
        threads: of the pool, the caller included; None for one on each physical core.
        level: as in `CpuExperts`.

    Raises:
        CheckpointError: a weight is NaN or infinite.
    """
    if _kernels is None or level == "torch" or not matrix.numel():
        return hqq_solver.solve_in_torch(matrix, bits=bits, group=group, fit=fit)
    (rows, columns), weights = matrix.shape, _readable(matrix)
    groups = -(-columns // group)
    codes = torch.empty(rows, groups * group, dtype=torch.uint8)
    scales, zeros = (torch.empty(rows, groups) for _ in range(2))
    pool = runner(threads or len(core_cpus()))
    try:
        _kernels.solve(pool, level, weights, rows, columns, bits, group, fit, bits == 4, codes, scales, zeros)
    except ValueError:
        hqq_solver.check_finite(matrix)
        raise
    return hqq_solver.Fitted(codes, scales, zeros)


def write_fitted(
    matrix: Tensor, fmt: Descriptor, fitted: hqq_solver.Fitted, out: Tensor, *, threads: int | None = None
) -> None:
    """As `quantize.write_in_torch`, bit for bit, for a matrix [R, K] and bytes on the CPU."""
    kernel = kernel_format(fmt)
    if _kernels is None or kernel is None or not matrix.numel():
        quantize.write_in_torch(matrix, fmt, fitted, out)
        return
    (rows, columns), pool = matrix.shape, runner(threads or len(core_cpus()))
    _kernels.write_fitted(pool, kernel, _readable(matrix), rows, columns, fitted.scales, fitted.zeros, out)


def write_int8(blocks: Tensor, fmt: Descriptor, out: Tensor, *, threads: int | None = None) -> None:
    """As `quantize.write_int8_in_torch`, bit for bit, for matrices [N, R, K] and bytes on the CPU.

    Raises:
        CheckpointError: a weight is NaN or infinite, or larger than a float16 scale covers.
    """
    kernel = kernel_format(fmt)
    if _kernels is None or kernel is None or not blocks.numel():
        quantize.write_int8_in_torch(blocks, fmt, out)
        return
    (_, rows, columns), pool = blocks.shape, runner(threads or len(core_cpus()))
    readable = blocks if blocks.dtype in FLOAT_FORMATS and blocks.stride(2) == 1 else _readable(blocks)
    try:
        _kernels.write_signed_bytes(pool, kernel, readable, rows, columns, out)
    except ValueError:
        quantize.quantize_int8(blocks.flatten(0, 1), fmt.group)  # says which weight
        raise


def first_touch(memory: Tensor, threads: int) -> None:
    """Zero a page's first byte by the threads that will read it, so that fresh memory is laid near them.

    Args:
        memory: uint8 of a fresh mapping, all zeros.
    """
    if _kernels is not None:
        runner(threads).touch(memory)


def levels() -> dict[str, bool]:
    """ISA levels that are compiled in, best first, and whether this CPU runs each; empty without kernels."""
    return dict(_kernels.levels()) if _kernels is not None else {}


def best_level() -> str:
    """The best that this CPU runs, or what MOESTRO_LEVEL names; "torch", the twin, without kernels.

    Raises:
        RequestError: this CPU does not run the level that was named.
    """
    if _kernels is None:
        return "torch"
    try:
        return _kernels.best_level()
    except ValueError:
        named, usable = os.environ.get("MOESTRO_LEVEL"), [name for name, runs in levels().items() if runs]
        raise RequestError(
            f"MOESTRO_LEVEL={named}: this CPU runs {', '.join(usable)}; name one of them, or none"
        ) from None


def read_gbps(memory: Tensor, threads: int, prefetch_floats: int) -> float:
    """How fast a summing loop reads a float32 tensor, in GB/s (1e9 bytes a second)."""
    return memory.nbytes / runner(threads).read_seconds("", memory, prefetch_floats) / 1e9


def read_limit_gbps(memory: Tensor, threads: int) -> float:
    """The best of the summing loops with so many threads, in GB/s. memory: float32, more than the caches hold."""
    return max(read_gbps(memory, threads, ahead) for ahead in PREFETCH_FLOATS)


def fma_gflops(threads: int) -> float:
    """How fast a register-only loop multiplies and adds in float32, in 1e9 operations a second."""
    return runner(threads).fma_flops("", 20_000_000) / 1e9


def dot_gflops(threads: int) -> float:
    """How fast codes are multiplied with 16-bit integers, in vectors or in matrix tiles, in 1e9 operations a second."""
    return runner(threads).dot_flops("", 20_000_000) / 1e9


@functools.cache
def runner(threads: int) -> _kernels.Runner:
    """One pool for each number of threads, shared by all models of the process."""
    best_level()  # refuses one that was named and is not here
    cpus = core_cpus()
    return _kernels.Runner(threads, cpus if threads <= len(cpus) else [])


def _readable(x: Tensor) -> Tensor:
    """Contiguous, in a dtype that the kernels read."""
    return (x if x.dtype in FLOAT_FORMATS else x.float()).contiguous()


@functools.cache
def kernel_format(fmt: Descriptor) -> _kernels.MatrixFormat | None:
    """A format as the kernels take it; None without kernels."""
    if _kernels is None:
        return None
    return _kernels.MatrixFormat(
        code=_kernels.Code[fmt.code.name],
        group=fmt.group,
        scale=_kernels.Scale[fmt.scale.name],
        zero=_kernels.Zero[fmt.zero.name],
        constant=fmt.constant,
        super_group=fmt.super_group,
    )


def type_of(dtype: torch.dtype) -> _kernels.Type:
    """What the kernels call float32, float16 or bfloat16; ValueError for others."""
    if dtype not in FLOAT_FORMATS:
        raise ValueError(f"the kernels do not compute in {dtype}")
    found: _kernels.Type = getattr(_kernels.Type, FLOAT_FORMATS[dtype])
    return found


hqq_solver.use_solver(solve_hqq)
quantize.use_writers(write_fitted, write_int8)
