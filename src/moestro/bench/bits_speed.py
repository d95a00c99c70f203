"""Decode speed of a random-weight model with different bits for its dense layers and its experts, in turns.

The machinery is that of `moestro bench decode`: each model in a process of its own, and turns of decoded tokens; a
figure is the median of a model's turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median

from ..compute.cpu import core_cpus
from ..machine.kernel_rates import torch_threads
from ..machine.probe import available_ram_bytes
from ..memory.formats import expert_format_named
from ..planning.budget import check_ram
from ..planning.shapes import depth_of_shape, least_depth, spec_of_shape
from .decode import CONTEXT, NEW_TOKENS
from .kernels import moe_layer
from .models import OURS, ModelWorker
from .paper_sizes import name_of_bits
from .report import check_kernels

_RAM_SHARE = 0.92  # of what is free, for all models together


@dataclass(frozen=True, slots=True)
class BitsSpeed:
    """Decode speed of one model: the median of its turns."""

    dense_bits: int
    expert_bits: int
    decode_tok_s: float


def measure_bits(
    shape: str,
    cells: Sequence[tuple[int, int]],
    *,
    layers: int | None = None,
    rounds: int = 5,
    threads: int | None = None,
) -> tuple[BitsSpeed, ...]:
    """Decode with models of one shape in turns.

    Args:
        cells: of each model, the bits of its dense layers and of its experts. Embedding and head have 16.
        layers: the depth to cut the models to, so that all fit in RAM together; None for all layers.
        rounds: turns of each model.
        threads: of each model; None for one on each physical core.

    Raises:
        RequestError: no kernels, or no such shape. BudgetError: too little RAM for all of them.
    """
    check_kernels()
    depth = depth_of_shape(shape, layers)
    _check_ram(shape, depth, cells)
    count = threads or len(core_cpus())
    speeds: dict[tuple[int, int], list[float]] = {cell: [] for cell in cells}
    with ExitStack() as stack, torch_threads(1):
        workers = {
            (dense, expert): stack.enter_context(
                ModelWorker(OURS, shape, bits=dense, expert_bits=expert, layers=depth, threads=count)
            )
            for dense, expert in cells
        }
        for _ in range(rounds):
            for cell, worker in workers.items():
                speeds[cell].append(1 / worker.decode_s(CONTEXT, NEW_TOKENS))
    return tuple(BitsSpeed(dense, expert, median(turns)) for (dense, expert), turns in speeds.items())


def _check_ram(shape: str, layers: int, cells: Sequence[tuple[int, int]]) -> None:
    moe = moe_layer(shape)

    def need_bytes(depth: int) -> float:
        spec = spec_of_shape(shape, depth)
        experts = [
            depth * moe.experts * expert_format_named(name_of_bits(bits)).expert_bytes(moe.expert) for _, bits in cells
        ]
        # Dense layers as if all had 16 bits. A twentieth and half a GiB a model are added, as in `measure_decode`.
        return (sum(experts) + len(cells) * spec.dense_bytes) * 1.05 + len(cells) * 2**29

    free_bytes = available_ram_bytes() * _RAM_SHARE
    fits = max((depth for depth in range(least_depth(shape), layers) if need_bytes(depth) <= free_bytes), default=0)
    remedy = f"--layers {fits} would fit" if fits else "no depth would fit"
    check_ram(f"decoding with {len(cells)} models of {shape}, {layers} layers", need_bytes(layers), free_bytes, remedy)
