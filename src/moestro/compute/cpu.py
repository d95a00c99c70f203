"""What the compiled kernels calculate on the CPU, bound to tensors; the machine's limits beside it.

Experts (`CpuExperts`; their twin is `experts.run_experts`), linear layers (`run_linear`), embeddings (`look_up`) and
norms (`rms_norm`); what goes together for a single token is in one_token.py. A layer's experts run in the kernels when
their format, and their family's gate, is one that the kernels have, else in the torch twin. Which gate it is, is found
by trying the family's own function on numbers, not by its name.

    CpuExperts(threads=8).run(math, x, work, out)

Legend: T tokens, D model width, n tokens of one expert, f neurons of a share.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import psutil
import torch
from torch import Tensor

from ..errors import RequestError
from ..memory.formats import FLOAT_FORMATS, PANEL, MatrixFormat
from .eager import outside_of_graphs
from .experts import Activation, ExpertMath, ExpertWork, run_experts

try:
    from . import _kernels as _kernels  # one_token.py has it from here
except ImportError:  # a pure wheel: no compiler was there when it was built
    _kernels = None  # type: ignore[assignment]

KERNEL_FORMATS = {} if _kernels is None else dict(_kernels.Format.__members__)

KernelShape: TypeAlias = "_kernels.Shape"  # a layer's experts, as the kernels take them
_ROWS_AT_ONCE = 256  # of a lookup in plain torch: each takes its panel of 16 along

Kernel = tuple[str, float, float, float]  # gate's name in the kernels; alpha, limit and offset of the clamped one


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
        if math.format.name not in KERNEL_FORMATS:
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
    return _kernels.Shape(
        hidden=math.shape.hidden,
        neurons=math.shape.neurons,
        has_gate=math.shape.has_gate,
        has_bias=math.shape.has_bias,
        format=KERNEL_FORMATS[math.format.name],
        activation=getattr(_kernels.Activation, name),
        alpha=alpha,
        limit=limit,
        offset=offset,
    )


@dataclass(frozen=True)
class Matrix:
    """A linear layer, or a table of rows: packed bytes of [rows, columns] in `fmt`, and its float32 bias."""

    packed: Tensor
    fmt: MatrixFormat
    rows: int
    columns: int
    bias: Tensor | None = None

    @functools.cached_property
    def linear(self) -> _kernels.Linear:
        """As the kernels take it; ValueError if bytes or bias are not of that size."""
        return _kernels.Linear(self.packed, KERNEL_FORMATS[self.fmt.name], self.rows, self.columns, self.bias)

    def __reduce__(self) -> tuple[type[Matrix], tuple[Any, ...]]:
        return Matrix, (self.packed, self.fmt, self.rows, self.columns, self.bias)  # a copy makes its own `linear`

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """[rows, columns], rounded once."""
        exact = dtype if dtype.itemsize > 4 else torch.float32
        return self.fmt.unpack(self.panels, self.columns, exact)[: self.rows].to(dtype)

    @property
    def panels(self) -> Tensor:
        """uint8 [P, panel_bytes], a view."""
        return self.packed.view(-1, self.fmt.panel_bytes(self.columns))


@outside_of_graphs
def run_linear(matrix: Matrix, x: Tensor, *, threads: int, level: str = "") -> Tensor:
    """x W^T + bias with a packed matrix, on the host.

    Args:
        x: [..., columns], float32, float16 or bfloat16.
        level: as in `CpuExperts`.

    Returns:
        [..., rows], in the dtype of `x`.
    """
    if _kernels is None or level == "torch":
        return torch.nn.functional.linear(x.float(), matrix.unpack(torch.float32), matrix.bias).to(x.dtype)
    x = _readable(x)
    out = x.new_empty((*x.shape[:-1], matrix.rows))
    runner(threads).run_linear(level, matrix.linear, x, out)
    return out


@outside_of_graphs
def look_up(table: Matrix, ids: Tensor, dtype: torch.dtype, *, threads: int, level: str = "") -> Tensor:
    """Rows of a packed table: int64 ids [...] -> [..., columns] in `dtype`, float32, float16 or bfloat16.

    Raises:
        IndexError: it has no such row.
    """
    if _kernels is None or level == "torch":
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
        x: [..., D], contiguous, float32, float16 or bfloat16. weight: float32 [D].
        offset: 0: norm(x), rounded to the dtype of x, times weight; else norm(x) * (offset + weight).

    Returns:
        [..., D], in the dtype of x.
    """
    assert _kernels is not None
    out = torch.empty_like(x)
    runner(threads).rms_norm(level, x, weight, offset, epsilon, out)
    return out


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


def fma_gflops(threads: int) -> float:
    """How fast a register-only loop multiplies and adds in float32, in 1e9 operations a second."""
    return runner(threads).fma_flops("", 20_000_000) / 1e9


def core_cpus() -> list[int]:
    """One processor of each physical core that this process may use."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(psutil.cpu_count(logical=False) or 1))
    first: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        first.setdefault(siblings.read_text().strip() if siblings.exists() else str(cpu), cpu)
    return list(first.values())


@functools.cache
def runner(threads: int) -> _kernels.Runner:
    """One pool for each number of threads, shared by all models of the process."""
    best_level()  # refuses one that was named and is not here
    cpus = core_cpus()
    return _kernels.Runner(threads, cpus if threads <= len(cpus) else [])


def _readable(x: Tensor) -> Tensor:
    """Contiguous, in a dtype that the kernels read."""
    return (x if x.dtype in FLOAT_FORMATS else x.float()).contiguous()


def type_of(dtype: torch.dtype) -> _kernels.Format:
    """What the kernels call float32, float16 or bfloat16; ValueError for others."""
    if dtype not in FLOAT_FORMATS:
        raise ValueError(f"the kernels do not compute in {dtype}")
    return KERNEL_FORMATS[FLOAT_FORMATS[dtype]]


def recognize(activation: Activation, has_gate: bool) -> Kernel | None:
    """Which of the kernels' gates computes what `activation` does, found by trying it on numbers.

    The numbers go far enough out to meet a clamp. Compared in float32, in which families compute it.
    """
    # A dimension of its own for each of the two, and not square, so that nothing is mixed up unnoticed.
    gate = torch.cat([torch.linspace(-12, 12, 97), torch.tensor([-60.0, -25.0, 25.0, 60.0])])[:, None]
    up = torch.tensor([-60.0, -8.0, -1.0, -0.1, 0.0, 0.3, 2.0, 7.5, 60.0])[None]
    gate, up = (part.expand(gate.shape[0], up.shape[1]).contiguous() for part in (gate, up))
    try:
        with torch.no_grad():
            wanted = activation(gate, up) if has_gate else activation(None, gate)
    except Exception as error:  # a family's function may refuse such input: then the twin calls it in earnest
        warnings.warn(f"the gate {activation} could not be tried ({error}); it runs in plain torch", stacklevel=2)
        return None
    plain = {
        "silu": torch.nn.functional.silu(gate),
        "gelu": torch.nn.functional.gelu(gate),
        "gelu_tanh": torch.nn.functional.gelu(gate, approximate="tanh"),
        "relu2": torch.relu(gate).square(),
    }
    for name, value in plain.items():
        if _same(wanted, value * up if has_gate else value):
            return (name, 0.0, 0.0, 0.0)
    return _recognize_clamped(activation, gate, up, wanted) if has_gate else None


def _recognize_clamped(activation: Activation, gate: Tensor, up: Tensor, wanted: Tensor) -> Kernel | None:
    """gate' * sigmoid(alpha gate') * (up' + offset), both clamped at a limit: solve for the three, then compare."""

    def at(g: float, u: float) -> float:
        return float(activation(torch.tensor([[g]], dtype=torch.float64), torch.tensor([[u]], dtype=torch.float64)))

    small = 0.0625  # below any clamp
    slope = (at(small, small) - at(small, 0.0)) / small  # small * sigmoid(alpha * small)
    if not 0 < slope < small:
        return None
    alpha = float(torch.logit(torch.tensor(slope / small, dtype=torch.float64))) / small
    offset = at(small, 0.0) / slope
    limit = at(small, 1e6) / slope - offset
    alpha, offset, limit = (float(f"{value:.6g}") for value in (alpha, offset, limit))
    clamped = gate.clamp(max=limit)
    value = clamped * torch.sigmoid(alpha * clamped) * (up.clamp(-limit, limit) + offset)
    return ("clamped_swiglu", alpha, limit, offset) if _same(wanted, value) else None


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-5, atol=1e-6)
