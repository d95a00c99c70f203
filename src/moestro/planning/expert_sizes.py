"""How large an expert is in blocks of neurons, each with its part of all the matrices. Bytes alone.

    >>> ExpertSizes(descriptor_named("bf16")).expert_bytes(ExpertShape(hidden=64, neurons=128))
    49152

memory/formats/experts.py says what stands in them.

Legend: D model width, F expert neurons, B neurons a block, N = ceil(F / B) blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from .descriptor import Descriptor
from .formats import descriptor_named

ALIGN_BYTES = 64  # an expert starts on a cache line
ORDERS = ("", "@order", "@orders")  # what a format's name ends in, by how many orders of columns its experts have
BIAS_BYTES = 4  # float32, so that no dtype of bias loses a bit
ORDER_BYTES = 4  # int32

F = TypeVar("F", bound=Descriptor)


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The shape that all experts of a layer share."""

    hidden: int  # D
    neurons: int  # F
    has_gate: bool = True
    has_bias: bool = False

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


class ExpertSizes(Generic[F]):
    """Sizes of experts in blocks of neurons.

    Args:
        matrix: the format of all matrices, but for those that `gate` and `up` name: files mix formats.
        block: neurons of a block, B; an expert can be divided between blocks. None for the least that `down` needs.
        orders: of columns: 0, 1 that gate and up share, or 2, gate's and up's.

    Raises:
        ValueError: some matrices have scales of columns (`is_strided`) and others not, or their neurons are in other
            orders.
    """

    def __init__(
        self,
        matrix: F,
        block: int | None = None,
        *,
        gate: F | None = None,
        up: F | None = None,
        orders: int = 0,
    ) -> None:
        self.matrices: dict[str, F] = {"gate": gate or matrix, "up": up or gate or matrix, "down": matrix}
        self.is_strided = self.matrices["gate"].is_strided
        self.block = block or max(matrix.block, self.matrices["gate"].block if self.is_strided else 0)
        names = [fmt.name for fmt in self.matrices.values()]
        self.orders = orders
        joined = names[0] if len({*names}) == 1 else "+".join(names)
        self.name = f"{joined}{ORDERS[orders]}"  # as `expert_format_named` takes it
        kinds = {fmt.is_strided for fmt in self.matrices.values()}
        groups = {self.matrices[part].group for part in ("gate", "up")}
        if len(kinds) > 1 or (self.is_strided and (orders or len(groups) > 1 or self.block % min(groups))):
            raise ValueError(f"{self.name} has neurons in several orders")

    def divides(self, shape: ExpertShape) -> bool:
        """Whether experts of that shape can be in this format: classes of rows are whole, and without biases."""
        whole = self.matrices["up"].divides(shape.neurons) and self.matrices["down"].divides(shape.hidden)
        return whole and not (self.is_strided and shape.has_bias)

    def blocks(self, shape: ExpertShape) -> int:
        """N, the last one possibly padded."""
        return -(-shape.neurons // self.block)

    def expert_bytes(self, shape: ExpertShape) -> int:
        """Bytes of one packed expert."""
        blocks = self.blocks(shape) * self.block_bytes(shape)
        return aligned(self.head_bytes(shape) + blocks + (shape.hidden * BIAS_BYTES if shape.has_bias else 0))

    def head_bytes(self, shape: ExpertShape) -> int:
        """Bytes before the first block: the orders of columns and the tables of `is_strided`."""
        orders = self.orders * aligned(shape.hidden * ORDER_BYTES)
        return max((table.stop for _, table in self.tables(shape)), default=orders)

    def tables(self, shape: ExpertShape) -> Iterator[tuple[str, range]]:
        """Name -> where the table of each matrix is within an expert, in bytes; none of formats that have none."""
        sizes = dict.fromkeys(("gate", "up") if shape.has_gate else ("up",), (shape.neurons, shape.hidden))
        sizes["down"] = (shape.hidden, self.blocks(shape) * self.block)
        start = 0
        for name, size in sizes.items() if self.is_strided else ():
            stop = start + self.matrices[name].table_bytes(*size)
            yield name, range(start, stop)
            start = stop

    def byte_range(self, shape: ExpertShape, neurons: range) -> range:
        """The run of bytes that holds `neurons` (from a multiple of `block` to another, or to F), with the head."""
        block_bytes, head = self.block_bytes(shape), self.head_bytes(shape)
        last = neurons.stop >= shape.neurons
        stop = self.expert_bytes(shape) if last else head + neurons.stop // self.block * block_bytes
        return range(0 if head else neurons.start // self.block * block_bytes, stop)

    def places(self, shape: ExpertShape) -> Iterator[tuple[str, range]]:
        """Name -> where each part is within a block, in bytes, in this order."""
        parts = ("gate", "up") if shape.has_gate else ("up",)
        sizes = {part: self.matrices[part].panels_bytes(self.block, shape.hidden) for part in parts}
        sizes["down"] = self.matrices["down"].panels_bytes(shape.hidden, self.block)
        if shape.has_bias:
            sizes |= dict.fromkeys((["gate_bias"] if shape.has_gate else []) + ["up_bias"], self.block * BIAS_BYTES)
        start = 0
        for name, size in sizes.items():
            yield name, range(start, start + size)
            start += size

    @functools.cache  # noqa: B019  # formats live as long as the process
    def block_bytes(self, shape: ExpertShape) -> int:
        """Bytes of a block."""
        return max(place.stop for _, place in self.places(shape))


def aligned(n_bytes: int) -> int:
    """So many bytes, filled up to the next expert's start."""
    return -(-n_bytes // ALIGN_BYTES) * ALIGN_BYTES


def names_of_parts(name: str) -> tuple[str, str, str, int]:
    """Of the name of a format of experts: those of gate, up and down, and how many orders of columns there are.

    Raises:
        KeyError: it ends in no known order.
    """
    matrices, at, order = name.partition("@")
    gate, up, down = (matrices.split("+") * 3)[:3]
    if at + order not in ORDERS:
        raise KeyError(name)
    return gate, up, down, ORDERS.index(at + order)


@functools.cache
def expert_sizes_named(name: str) -> ExpertSizes[Descriptor]:
    """The sizes of experts in the format of that name, such as "q4_k", "q4_k+q4_k+q6_k" or "int4g128@order".

    Raises:
        KeyError: there is none. ValueError: its parts do not go together.
    """
    gate, up, down, orders = names_of_parts(name)
    return ExpertSizes(descriptor_named(down), gate=descriptor_named(gate), up=descriptor_named(up), orders=orders)
