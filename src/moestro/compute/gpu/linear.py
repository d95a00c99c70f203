"""Linear layers and embeddings on a GPU, straight from packed bytes of any format, by Triton kernels.

`run_linear` takes [..., columns] to [..., rows], `look_up` ids [...] to rows [..., columns].

The matrix is a `compute.cpu.Matrix` whose tensors are on the device. As with experts (`tiles.py`), codes are multiplied
exactly, activations are rounded no further than their own dtype, and sums are float32. The same call gives the same
bits, and nothing waits for the device, so calls fit in a CUDA graph. Tile sizes and splits were chosen by arithmetic;
no GPU has run them yet. Their twin is `compute.cpu`'s at level "torch".

Legend: T tokens, K columns, R rows.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import RequestError
from ...memory.formats import MatrixFormat
from ..cpu import Matrix
from .kernel import ENOUGH_PROGRAMS, MOST_SPLITS, SUM_BYTES, has_tensor_cores, product_dtype, triton_kernels
from .launch import TILINGS, TORCH_DTYPES, Tiling, pipeline_stages, warps_of
from .panels import CHUNK, PanelSpec, panel_spec
from .plan import tile_sizes

_LEAST_CHUNKS = 4  # of a segment
_ROWS = 32  # of a program that has few tokens
_ADDED = 512  # rows of one program that adds splits
_TAKEN = 32  # rows of a table that one program unpacks
_INT32_BYTES = 2**31


@dataclass(frozen=True)
class LinearSpec:
    """What the kernels are compiled for."""

    rows: int  # R
    columns: int  # K
    matrix: PanelSpec
    dtype: str  # in which is multiplied: fp16, bf16 or fp32
    has_bias: bool
    is_wide: bool  # whether bytes of the matrix take 64 bits to count
    has_tensor_cores: bool

    @property
    def chunks(self) -> int:
        """Of 64 columns."""
        return -(-self.columns // CHUNK)

    @property
    def on_tensor_cores(self) -> bool:
        """Whether it is multiplied there."""
        return self.has_tensor_cores and self.dtype != "fp32"

    @property
    def segments(self) -> int:
        """Into how many shares of its columns a result's sum is cut, by the shape alone."""
        programs = -(-self.rows // _ROWS)
        return max(1, min(ENOUGH_PROGRAMS // programs, self.chunks // _LEAST_CHUNKS, MOST_SPLITS))


def run_linear(matrix: Matrix, x: Tensor) -> Tensor:
    """x W^T + bias with a packed matrix in any format.

    Args:
        matrix: uint8 bytes and float32 bias on the device of `x`.
        x: [..., K], float16, bfloat16 or float32.

    Returns:
        [..., R], in the dtype of `x`.

    Raises:
        RequestError: Triton is not installed.
        ValueError: tensors whose size, dtype or device is another than the matrix says.
    """
    spec, flat = _spec_of(matrix, x), x.reshape(-1, matrix.columns).contiguous()
    out = torch.empty((*x.shape[:-1], matrix.rows), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    kernels, linears = _kernels()
    tokens = len(flat)
    ordered = torch.empty(tokens, spec.chunks * CHUNK, dtype=TORCH_DTYPES[spec.dtype], device=x.device)
    sums = torch.empty(tokens, spec.chunks * SUM_BYTES // 4, dtype=torch.float32, device=x.device)
    grid = tokens, -(-spec.chunks // kernels.CHUNKS_AT_ONCE.value)
    kernels.order[grid](flat, ordered, sums, spec.columns, 0, 1, spec.matrix, spec.matrix.has_addend)
    tile_tokens, tiling, splits = _tiles(spec, tokens)
    parts = out if splits == 1 else torch.empty(splits, tokens, matrix.rows, dtype=torch.float32, device=x.device)
    linears.multiply[(-(-tokens // tile_tokens), -(-matrix.rows // tiling.down), splits)](
        ordered,
        sums,
        *_views(matrix),
        matrix.bias,
        parts,
        tokens,
        spec,
        M=tile_tokens,
        N=tiling.down,
        SPLITS=splits,
        num_warps=warps_of(tile_tokens, spec.on_tensor_cores),
        num_stages=2 if spec.dtype == "fp32" else pipeline_stages(tiling, spec.matrix),
    )
    if splits > 1:
        added = tokens, -(-matrix.rows // _ADDED)
        linears.add_splits[added](parts, matrix.bias, out, tokens, spec, SPLITS=splits, N=_ADDED)
    return out


def linear_workspace_bytes(matrix: Matrix, tokens: int, x_dtype: torch.dtype, device: torch.device) -> int:
    """Bytes that `run_linear` allocates besides its result for so many tokens."""
    spec = _spec(matrix.fmt, matrix.rows, matrix.columns, matrix.bias is not None, x_dtype, device)
    splits = _tiles(spec, tokens)[2] if tokens else 1
    ordered = tokens * spec.chunks * (CHUNK * TORCH_DTYPES[spec.dtype].itemsize + SUM_BYTES)
    return ordered + (splits * tokens * matrix.rows * 4 if splits > 1 else 0)


def look_up(table: Matrix, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a packed table in any format: int64 ids [...] -> [..., K] in `dtype`, float32, float16 or bfloat16.

    Raises:
        IndexError: the table has no such row, and ids are on the host; on a GPU its assertion fails, as torch's do.
        RequestError: Triton is not installed.
        ValueError: tensors whose size, dtype or device is another than the table says.
    """
    out = torch.empty((*ids.shape, table.columns), dtype=dtype, device=ids.device)
    spec, ids = _spec_of(table, out), ids.long().contiguous()
    if not ids.numel():
        return out
    _, linears = _kernels()
    is_row = ((ids >= 0) & (ids < table.rows)).all()
    if ids.device.type == "cuda":
        torch._assert_async(is_row, f"an id that is no row of a table of {table.rows}")
    elif not is_row:
        raise IndexError(f"ids from {int(ids.min())} to {int(ids.max())} in a table of {table.rows} rows")
    linears.take[(-(-ids.numel() // _TAKEN), spec.chunks)](*_views(table), ids, out, ids.numel(), spec, N=_TAKEN)
    return out


def _kernels() -> tuple[types.ModuleType, types.ModuleType]:
    """The modules of Triton's functions."""
    kernels = triton_kernels()
    if kernels is None:
        raise RequestError("Triton is not installed, which packed layers on a GPU need: pip install triton")
    from . import linears

    return kernels, linears


def _spec_of(matrix: Matrix, x: Tensor) -> LinearSpec:
    """Check the tensors of a call."""
    wanted = matrix.fmt.matrix_bytes(matrix.rows, matrix.columns)
    packed, bias = matrix.packed, matrix.bias
    if packed.dtype != torch.uint8 or packed.numel() != wanted or not packed.is_contiguous():
        found = f"{packed.numel()} of {packed.dtype}"
        raise ValueError(
            f"a matrix of {matrix.rows} x {matrix.columns} in {matrix.fmt.name} is {wanted} bytes, not {found}"
        )
    if bias is not None and (bias.dtype != torch.float32 or bias.numel() != matrix.rows or not bias.is_contiguous()):
        raise ValueError(f"a bias of {matrix.rows} float32, not {bias.numel()} of {bias.dtype}")
    if x.dtype not in TORCH_DTYPES.values() or x.shape[-1:] != (matrix.columns,):
        raise ValueError(f"x [..., {matrix.columns}] in float16, bfloat16 or float32, not {list(x.shape)} of {x.dtype}")
    if {packed.device, x.device} | ({bias.device} if bias is not None else set()) != {x.device}:
        raise ValueError(f"a matrix on {packed.device} for activations on {x.device}")
    return _spec(matrix.fmt, matrix.rows, matrix.columns, bias is not None, x.dtype, x.device)


@functools.cache
def _spec(
    fmt: MatrixFormat, rows: int, columns: int, has_bias: bool, x_dtype: torch.dtype, device: torch.device
) -> LinearSpec:
    return LinearSpec(
        rows,
        columns,
        panel_spec(fmt, columns),
        product_dtype(fmt, x_dtype, device),
        has_bias,
        is_wide=fmt.matrix_bytes(rows, columns) >= _INT32_BYTES,
        has_tensor_cores=has_tensor_cores(device),
    )


def _tiles(spec: LinearSpec, tokens: int) -> tuple[int, Tiling, int]:
    """Tokens of a tile, how it is cut, and how many programs share its columns."""
    rows = tile_sizes([spec.on_tensor_cores], tokens, 1, tokens)[-1]
    tiling = TILINGS[rows]
    programs = -(-tokens // rows) * -(-spec.rows // tiling.down)
    return rows, tiling, spec.segments if programs < ENOUGH_PROGRAMS else 1


def _views(matrix: Matrix) -> tuple[Tensor, ...]:
    """Its bytes as words, halves and octets."""
    flat = matrix.packed.flatten()
    return flat.view(torch.int32), flat.view(torch.int16), flat
