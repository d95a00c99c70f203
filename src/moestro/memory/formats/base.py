"""What every format of expert weights offers, and the shape of an expert.

Legend: D model width, F expert neurons, B neurons a block, N = ceil(F / B) blocks.

All formats share one order of bytes. Block b holds neurons [b*B, (b+1)*B): gate rows [B, D], up rows
[B, D], the matching down columns as [D, B], then gate and up biases [B] in float32 where the family has
them. After the last block comes the down bias [D] in float32. So a range of blocks is one run of bytes,
a split by neurons is one contiguous copy, and dot products run along contiguous bytes on both halves of
the FFN. A last block that is not full is padded with zero neurons, which contribute nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BLOCK = 64
ALIGN_BYTES = 64  # an expert starts on a cache line


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The shape that all experts of a layer share."""

    hidden: int  # D
    neurons: int  # F
    has_gate: bool = True
    has_bias: bool = False

    @property
    def blocks(self) -> int:
        """N, the last one possibly padded."""
        return -(-self.neurons // BLOCK)

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each tensor of one expert, as `pack` takes them."""
        d, f = self.hidden, self.neurons
        parts: dict[str, tuple[int, ...]] = {"up": (f, d), "down": (d, f)}
        if self.has_gate:
            parts["gate"] = (f, d)
        if self.has_bias:
            parts |= {"up_bias": (f,), "down_bias": (d,)} | ({"gate_bias": (f,)} if self.has_gate else {})
        return parts


@dataclass(slots=True)
class UnpackedExpert:
    """Plain tensors of some neurons of one expert, f = number of neurons asked for."""

    up: Tensor  # [f, D]
    down: Tensor  # [D, f]
    gate: Tensor | None = None  # [f, D]
    up_bias: Tensor | None = None  # [f]
    gate_bias: Tensor | None = None  # [f]
    down_bias: Tensor | None = None  # [D]; only with the last neuron, so that a split adds it once


class ExpertFormat(Protocol):
    """One way to write an expert's weights down in bytes."""

    name: str

    def expert_bytes(self, shape: ExpertShape) -> int:
        """Bytes of one packed expert."""

    def byte_range(self, shape: ExpertShape, neurons: range) -> range:
        """The run of bytes that holds `neurons` (from a multiple of BLOCK to another, or to F)."""

    def pack(self, packed: Tensor, shape: ExpertShape, parts: Mapping[str, Tensor]) -> None:
        """Write some or all parts of an expert into its bytes.

        Args:
            packed: uint8 [expert_bytes], contiguous, on any device.
            parts: tensors named and shaped as `shape.parts`, of any float dtype and strides.
        """

    def unpack(self, packed: Tensor, shape: ExpertShape, neurons: range, dtype: torch.dtype) -> UnpackedExpert:
        """The plain tensors of `neurons`, on the device of `packed`, in `dtype`."""
