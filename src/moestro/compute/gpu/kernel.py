"""Which layers the Triton kernels cover, and where the parts of such a layer's experts are within their bytes.

Legend: T tokens, D model width, N blocks of neurons, P pairs of a token and an expert.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass

import torch

from ...memory.formats import MatrixFormat
from ..activations import recognize
from ..experts import ExpertMath
from .panels import CHUNK, PanelSpec, panel_spec

WORKSPACE_BYTES = 256 * 2**20  # for what stands between the kernels; a step that needs more goes in parts
SUM_BYTES = 16  # of a chunk of activations: float32, one for each of up to four pieces
ENOUGH_PROGRAMS = 512  # keep a large GPU's memory busy; with fewer, several share a result's columns
MOST_SPLITS = 8
_LEAST_BLOCKS = 4  # of a segment
_COLUMNS = 32  # of a program that has few pairs
_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class GpuKernel:
    """What the kernels are compiled for: a layer's experts, and the dtype in which weights meet hidden states.

    Places and sizes count words of 4 bytes.
    """

    hidden: int  # D
    blocks: int  # N
    block: int  # neurons of a block
    gate_matrix: PanelSpec  # as `up` where there is no gate
    up_matrix: PanelSpec
    down_matrix: PanelSpec
    dtype: str  # in which gate and up are multiplied: fp16, bf16 or fp32
    down_is_fp32: bool  # whether down is multiplied in float32
    gate: str
    alpha: float
    limit: float
    offset: float
    has_gate: bool
    has_bias: bool
    block_words: int
    up_at: int  # within a block, where gate is at 0
    down_at: int
    gate_bias_at: int
    up_bias_at: int
    down_bias_at: int  # within an expert
    has_tensor_cores: bool  # that Triton uses: from compute capability 8.0

    @property
    def chunks(self) -> int:
        """Of 64 hidden states."""
        return -(-self.hidden // CHUNK)

    @property
    def orders(self) -> int:
        """In how many orders hidden states are written down: gate and up may want two."""
        return 1 if self.gate_matrix.order == self.up_matrix.order else 2

    @property
    def on_tensor_cores(self) -> tuple[bool, bool]:
        """Whether gate and up, and down, are multiplied there."""
        return self.has_tensor_cores and self.dtype != "fp32", self.has_tensor_cores and not self.down_is_fp32

    @property
    def segments(self) -> int:
        """Into how many shares of its blocks an expert's sum over neurons is cut, by its shape alone.

        As many programs as are needed for the two experts of a token of Mixtral.
        """
        programs = 2 * -(-self.hidden // _COLUMNS)
        return max(1, min(ENOUGH_PROGRAMS // programs, self.blocks // _LEAST_BLOCKS, MOST_SPLITS))

    @property
    def segment_blocks(self) -> int:
        """Blocks of a segment; the last one may have fewer."""
        return -(-self.blocks // self.segments)

    @property
    def either_has_addend(self) -> bool:
        """Whether gate or up, in one order, take the sums of hidden states."""
        return self.gate_matrix.has_addend or self.up_matrix.has_addend

    @property
    def bytes_of_token(self) -> int:
        """Workspace of its ordered hidden states and their sums."""
        return self.orders * self.chunks * (CHUNK * (4 if self.dtype == "fp32" else 2) + SUM_BYTES)

    @property
    def bytes_of_row(self) -> int:
        """Workspace of what a pair gets from its expert: float32 [D]."""
        return self.hidden * 4


def kernel_of(math: ExpertMath, x_dtype: torch.dtype, device: torch.device) -> GpuKernel | None:
    """The kernels' form of a layer's experts; None where the twin has to compute them. Takes milliseconds: keep it.

    Args:
        x_dtype: of the hidden states: float16, bfloat16 or float32.
        device: where the slots are; one without bfloat16 units multiplies in float32 where bfloat16 is asked for.
    """
    if triton_kernels() is None or math.post_norm is not None or x_dtype not in _DTYPES:
        return None
    shape, fmt, matrices = math.shape, math.format, math.format.matrices
    if fmt.block % matrices["down"].block or fmt.head_bytes(shape):  # orders and tables, which the kernels do not read
        return None
    gate = recognize(math.activation, shape.has_gate)
    if gate is None:
        return None
    parts = ("gate", "up") if shape.has_gate else ("up",)
    dtypes = [product_dtype(matrices[part], x_dtype, device) for part in parts]
    starts = {name: place.start // 4 for name, place in fmt.places(shape)}
    up = panel_spec(matrices["up"], shape.hidden)
    return GpuKernel(
        shape.hidden,
        fmt.blocks(shape),
        fmt.block,
        panel_spec(matrices["gate"], shape.hidden) if shape.has_gate else up,
        up,
        panel_spec(matrices["down"], fmt.block),
        "fp32" if "fp32" in dtypes else dtypes[0],
        product_dtype(matrices["down"], x_dtype, device) == "fp32",
        *gate,
        has_gate=shape.has_gate,
        has_bias=shape.has_bias,
        block_words=fmt.block_bytes(shape) // 4,
        up_at=starts["up"],
        down_at=starts["down"],
        gate_bias_at=starts.get("gate_bias", 0),
        up_bias_at=starts.get("up_bias", 0),
        down_bias_at=fmt.blocks(shape) * fmt.block_bytes(shape) // 4,
        has_tensor_cores=has_tensor_cores(device),
    )


def product_dtype(weights: MatrixFormat, x_dtype: torch.dtype, device: torch.device) -> str:
    """One in which codes and activations are exact, and that the device multiplies: fp16, bf16 or fp32."""
    x = _DTYPES[x_dtype]
    if weights.is_float and weights.name != x:
        return "fp32"
    return "fp32" if x == "bf16" and not has_tensor_cores(device) else x


def has_tensor_cores(device: torch.device) -> bool:
    """Triton 3.6 compiles for 7.0 and 7.5 as well, but multiplies there without; nor have these any for bfloat16."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def triton_kernels() -> types.ModuleType | None:
    """Imported when first asked for: `import moestro` needs no Triton and takes none along."""
    try:
        from . import kernels
    except ImportError:
        return None
    return kernels
