"""Which layers the Triton kernels cover, and where the parts of such a layer's experts are within their bytes.

Legend: T tokens, D model width, N blocks of neurons, P pairs of a token and an expert.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass

import torch

from ..activations import recognize
from ..experts import ExpertMath

WORKSPACE_BYTES = 256 * 2**20  # for what stands between the kernels; a step that needs more goes in parts

_WORD_BYTES = {"fp32": 4, "fp16": 2, "bf16": 4, "int8": 2, "int4": 4}
_PLANES = {"fp32": 1, "fp16": 1, "bf16": 2, "int8": 2, "int4": 4}
_SIDE = 64  # neurons of a block, columns of a group: what the planes in `tiles` are cut for
_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class GpuKernel:
    """What the kernels are compiled for: a layer's experts, and the dtype in which weights meet hidden states.

    Places and sizes count words, as which a format is loaded: float32, float16, int16 (int8) or int32 (bf16, int4);
    those of biases count float32.
    """

    hidden: int  # D
    blocks: int  # N
    block: int  # neurons of a block
    group: int  # columns that are multiplied at once; they share a scale
    format: str
    dtype: str  # fp16, bf16 or fp32
    gate: str
    alpha: float
    limit: float
    offset: float
    has_gate: bool
    has_bias: bool
    word_bytes: int
    planes: int
    block_words: int
    row_panel_words: int  # of gate and up
    column_panel_words: int  # of down
    up_at: int  # within a block, where gate is at 0
    down_at: int
    gate_bias_at: int
    up_bias_at: int
    down_bias_at: int  # within an expert
    has_tensor_cores: bool  # that Triton uses: from compute capability 8.0

    @property
    def groups(self) -> int:
        """Groups of hidden states."""
        return -(-self.hidden // self.group)

    @property
    def is_quantized(self) -> bool:
        """Whether groups have scales."""
        return self.format in ("int8", "int4")

    @property
    def bytes_of_token(self) -> int:
        """Workspace of its ordered hidden states and their sums."""
        return self.groups * (self.group * (4 if self.dtype == "fp32" else 2) + 4)

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
    if triton_kernels() is None or math.post_norm is not None:
        return None
    shape, fmt, matrix = math.shape, math.format, math.format.matrices["down"]
    if fmt.name not in _WORD_BYTES or x_dtype not in _DTYPES or (fmt.block, matrix.group) != (_SIDE, _SIDE):
        return None
    gate = recognize(math.activation, shape.has_gate)
    if gate is None:
        return None
    word_bytes = _WORD_BYTES[fmt.name]
    starts = {name: place.start for name, place in fmt.places(shape)}
    return GpuKernel(
        shape.hidden,
        fmt.blocks(shape),
        fmt.block,
        matrix.group,
        fmt.name,
        _product_dtype(fmt.name, _DTYPES[x_dtype], device),
        *gate,
        has_gate=shape.has_gate,
        has_bias=shape.has_bias,
        word_bytes=word_bytes,
        planes=_PLANES[fmt.name],
        block_words=fmt.block_bytes(shape) // word_bytes,
        row_panel_words=matrix.panel_bytes(shape.hidden) // word_bytes,
        column_panel_words=matrix.panel_bytes(fmt.block) // word_bytes,
        up_at=starts["up"] // word_bytes,
        down_at=starts["down"] // word_bytes,
        gate_bias_at=starts.get("gate_bias", 0) // 4,
        up_bias_at=starts.get("up_bias", 0) // 4,
        down_bias_at=fmt.blocks(shape) * fmt.block_bytes(shape) // 4,
        has_tensor_cores=_has_tensor_cores(device),
    )


def _product_dtype(weights: str, x: str, device: torch.device) -> str:
    """One in which both are exact and that the device multiplies."""
    if weights not in ("int8", "int4") and weights != x:
        return "fp32"
    return "fp32" if x == "bf16" and not _has_tensor_cores(device) else x


def _has_tensor_cores(device: torch.device) -> bool:
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
