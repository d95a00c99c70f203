"""The expert FFN of one layer step in plain torch: the reference that every kernel is tested against.

Computes down(activation(gate(x), up(x))) for any share of an expert's neurons and adds it, times the
routing weight, into a float32 result. An FFN is a sum over neurons, so shares computed in different
places add up exactly. Does not know where the bytes came from or which device it runs on.

Legend: T tokens, D model width, F expert neurons, f neurons of a share, n tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..memory.formats import ExpertFormat, ExpertShape

# Tokens of one expert that go through the FFN at once: bounds the intermediate [n, F] in memory.
TOKENS_AT_ONCE = 1024

Activation = Callable[[Tensor | None, Tensor], Tensor]  # gate [n, f] or None, up [n, f] -> [n, f]


@dataclass(frozen=True, slots=True)
class ExpertMath:
    """What the experts of one layer compute.

    activation: joins gate and up, neuron by neuron.
    post_norm: what the family applies to an expert's whole output; such experts cannot be split.
    """

    shape: ExpertShape
    format: ExpertFormat
    activation: Activation
    post_norm: Callable[[Tensor], Tensor] | None = None


class ExpertWork(NamedTuple):
    """One expert's share of one layer step.

    packed: uint8 bytes of the whole expert. neurons: the share of [0, F). rows: int64, tokens routed to experts of
    this step; weights: float32, their routing weights, in any shape; both contiguous. span: which of them are this
    expert's; None for all. A span costs a decode step less than a slice of each tensor. expert: number in the layer.
    """

    packed: Tensor
    neurons: range
    rows: Tensor
    weights: Tensor
    span: range | None = None
    expert: int = -1

    def routed(self) -> tuple[Tensor, Tensor]:
        """This expert's rows and weights, [n] each."""
        part = slice(None) if self.span is None else slice(self.span.start, self.span.stop)
        return self.rows[part], self.weights.flatten()[part]


@torch.no_grad()
def run_experts(math: ExpertMath, x: Tensor, work: Iterable[ExpertWork], out: Tensor) -> None:
    """Add the work's result to `out`, one expert at a time, in the order given.

    Args:
        x: hidden states [T, D], any float dtype, on the device of the packed bytes.
        out: float32 [T, D]; added to.
    """
    for item in work:
        expert = math.format.unpack(item.packed, math.shape, item.neurons, torch.float32)
        for rows, weights in zip(*(part.split(TOKENS_AT_ONCE) for part in item.routed()), strict=True):
            of_gate = h = x[rows].float()  # [n, D]
            if expert.up_order is not None:
                h = h[:, expert.up_order]
                of_gate = h if expert.gate_order is expert.up_order else x[rows].float()[:, expert.gate_order]
            up = linear(h, expert.up, expert.up_bias)  # [n, f]
            gate = None if expert.gate is None else linear(of_gate, expert.gate, expert.gate_bias)  # [n, f]
            y = linear(math.activation(gate, up), expert.down, expert.down_bias)  # [n, D]
            if math.post_norm is not None:
                y = math.post_norm(y)
            out.index_add_(0, rows, y.float() * weights[:, None])
        del expert  # before the next one is unpacked
