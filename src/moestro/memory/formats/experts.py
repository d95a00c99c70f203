"""How an expert is written down: blocks of neurons, each with its part of all the matrices.

Legend: D model width, F expert neurons, B neurons a block, N = ceil(F / B) blocks.

Block b holds neurons [b*B, (b+1)*B): gate rows [B, D], up rows [B, D] and the matching down columns as
[D, B], each as a packed matrix in a format of its own, then gate and up biases [B] in float32 where the family
has them. After the last block comes the down bias [D] in float32. So a range of blocks is one run of bytes and
a split by neurons is one contiguous copy. A last block that is not full is padded with zero neurons, which contribute
nothing.

Before the first block come the orders of gate's and up's columns, where these have one that is not the file's own
(GPTQ's act-order): int32 [D] each, filled up to a cache line. Column k of such a matrix stands for number order[k] of a
hidden state. Of formats whose scales belong to columns (strided.py), the tables of gate, up and down stand there; the
neurons are then in the order of gate's classes of rows, and down's panels have the D outputs in that of down's own. A
range of blocks begins with all that stands before the first, whichever blocks these are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import CheckpointError
from ...planning.descriptor import PANEL
from ...planning.expert_sizes import BIAS_BYTES, ORDER_BYTES, ExpertShape, ExpertSizes, aligned
from .codes import Coded
from .hqq_solver import check_finite
from .matrix import MatrixFormat
from .strided import Strided, in_own_order, read_panels, read_table, values, write_panels, write_table


@dataclass(slots=True)
class UnpackedExpert:
    """Plain tensors of some neurons of one expert, f = number of neurons asked for."""

    up: Tensor  # [f, D]
    down: Tensor  # [D, f]
    gate: Tensor | None = None  # [f, D]
    up_bias: Tensor | None = None  # [f]
    gate_bias: Tensor | None = None  # [f]
    down_bias: Tensor | None = None  # [D]; only with the last neuron, so that a split adds it once
    gate_order: Tensor | None = None  # int32 [D]: which numbers of a hidden state gate's columns stand for
    up_order: Tensor | None = None  # int32 [D], for up's columns; gate's own tensor where they share an order


class ExpertFormat(ExpertSizes[MatrixFormat]):
    """Experts in blocks of neurons: sizes, and what writes and reads them."""

    def pack(self, packed: Tensor, shape: ExpertShape, parts: Mapping[str, Tensor], *, fast: bool = False) -> None:
        """Write some or all parts of an expert into its bytes.

        Args:
            packed: uint8 [expert_bytes], contiguous, on any device.
            parts: tensors named and shaped as `shape.parts`, of any float dtype and strides.
            fast: as in `MatrixFormat.pack`.

        Raises:
            ValueError: a format to which nothing here quantizes; see `pack_coded`.
        """
        n, d, size = self.blocks(shape), shape.hidden, self.block
        places = dict(self.places(shape))
        blocks = self._blocks(packed, shape)
        for name, tensor in parts.items():
            if name == "down_bias":
                self._down_bias(packed, shape).copy_(tensor)
                continue
            missing = n * size - shape.neurons
            place = places[name]
            target = blocks[:, place.start : place.stop]
            if name.endswith("_bias"):
                target.view(torch.float32).copy_(pad(tensor, (0, missing)).view(n, size))
                continue
            if name == "down":
                matrices = _padded(tensor, (0, missing)).unflatten(1, (n, size)).transpose(0, 1)  # [N, D, B]
                matrices = _padded(matrices, (0, 0, 0, -d % PANEL))
            else:
                matrices = _padded(tensor, (0, 0, 0, missing)).unflatten(0, (n, size))
            try:
                self.matrices[name].pack_blocks(matrices, target, fast=fast)
            except CheckpointError:
                check_finite(tensor)  # names the place in the matrix, not in its blocks
                raise

    def pack_coded(self, packed: Tensor, shape: ExpertShape, parts: Mapping[str, Coded | Strided]) -> None:
        """Write matrices that are quantized already into an expert's bytes: the twin of the kernels' repacking.

        Args:
            parts: "gate" and "up" [F, D], "down" [D, F], in the formats that these have here. Of `is_strided`, the
                neurons in the order of gate's classes.
        """
        places, blocks = dict(self.places(shape)), self._blocks(packed, shape)
        for name, coded in parts.items():
            fmt, place = self.matrices[name], places[name]
            for number, block in enumerate(blocks):
                neurons = range(number * self.block, min((number + 1) * self.block, shape.neurons))
                if isinstance(coded, Strided):
                    panels = self._strided_panels(name, coded, neurons, shape)
                else:
                    index = torch.arange(neurons.start, neurons.stop)
                    part = coded.columns(fmt, index).padded(self.block) if name == "down" else coded.rows(index)
                    panels = fmt.write(part).flatten()
                block[place.start : place.start + panels.numel()] = panels
                block[place.start + panels.numel() : place.stop] = 0
        strided = {name: one for name, one in parts.items() if isinstance(one, Strided)}
        self.pack_tables(packed, shape, {name: (one.of_scales, one.of_zeros) for name, one in strided.items()})

    def _strided_panels(self, name: str, coded: Strided, neurons: range, shape: ExpertShape) -> Tensor:
        """One block's part of a matrix, uint8 [bytes]."""
        fmt, n = self.matrices[name], slice(neurons.start, neurons.stop)
        if name == "down":
            parts = (coded.codes[:, n], coded.scales[:, n], coded.zeros[:, n])
            return write_panels(fmt, *parts, (shape.hidden, self.block)).flatten()
        of = slice(n.start // fmt.group, n.stop // fmt.group)
        parts = (coded.codes[n], coded.scales[of], coded.zeros[of])
        return write_panels(fmt, *parts, (self.block, shape.hidden)).flatten()

    def pack_tables(self, packed: Tensor, shape: ExpertShape, parts: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Write the tables of matrices into an expert's bytes.

        Args:
            parts: `of_scales` and `of_zeros` of `Strided`, by the names of the matrices.
        """
        tables = dict(self.tables(shape))
        for name, (of_scales, of_zeros) in parts.items():
            width = self.blocks(shape) * self.block if name == "down" else shape.hidden
            packed[tables[name].start : tables[name].stop] = write_table(of_scales, of_zeros, width)

    def pack_orders(self, packed: Tensor, shape: ExpertShape, orders: Sequence[Tensor]) -> None:
        """Write the orders of gate's and up's columns into an expert's bytes.

        Args:
            orders: as many as the format has, integers [D] each.

        Raises:
            ValueError: one is no permutation of 0 .. D - 1, or there are more or fewer.
        """
        columns = torch.arange(shape.hidden)
        if len(orders) != self.orders or not all(torch.equal(order.long().sort().values, columns) for order in orders):
            raise ValueError(f"expected {self.orders} orders of {shape.hidden} columns, each a permutation of them")
        size = aligned(shape.hidden * ORDER_BYTES)
        for number, order in enumerate(orders):
            head = packed[number * size : (number + 1) * size].view(torch.int32)
            head[: shape.hidden] = order
            head[shape.hidden :] = 0

    def unpack(self, packed: Tensor, shape: ExpertShape, neurons: range, dtype: torch.dtype) -> UnpackedExpert:
        """The plain tensors of `neurons`, on the device of `packed`, in `dtype`."""
        blocks = self._blocks(packed, shape)[neurons.start // self.block : -(-neurons.stop // self.block)]
        count = len(neurons)
        found: dict[str, Tensor] = {}
        for name, place in self.places(shape):
            part = blocks[:, place.start : place.stop]  # [n, bytes]
            if name.endswith("_bias"):
                found[name] = part.view(torch.float32).flatten()[:count].to(dtype)
                continue
            columns = self.block if name == "down" else shape.hidden
            fmt = self.matrices[name]
            if fmt.is_strided:
                found[name] = self._unpack_strided(name, packed, shape, part, neurons, dtype)
                continue
            rows = fmt.unpack(part.reshape(-1, fmt.panel_bytes(columns)), columns, dtype).unflatten(
                0, (len(blocks), -1)
            )
            if name == "down":
                found[name] = rows[:, : shape.hidden].transpose(0, 1).flatten(1)[:, :count]  # [D, f]
            else:
                found[name] = rows.flatten(0, 1)[:count]  # [f, D]
        if shape.has_bias and neurons.stop == shape.neurons:
            found["down_bias"] = self._down_bias(packed, shape).to(dtype)
        if self.orders:
            size = aligned(shape.hidden * ORDER_BYTES)
            heads = [packed[i * size :][: shape.hidden * ORDER_BYTES].view(torch.int32) for i in range(self.orders)]
            found |= {"gate_order": heads[0], "up_order": heads[-1]}
        return UnpackedExpert(**found)

    def _unpack_strided(
        self, name: str, packed: Tensor, shape: ExpertShape, part: Tensor, neurons: range, dtype: torch.dtype
    ) -> Tensor:
        """Of some blocks' bytes [n, bytes] of a matrix: [f, D], or [D, f] of down."""
        fmt, table = self.matrices[name], dict(self.tables(shape))[name]
        of_matrix = shape.hidden if name == "down" else shape.neurons
        of_scales, of_zeros = read_table(fmt, packed[table.start : table.stop], of_matrix)
        if name == "down":
            found = []
            for number, block in enumerate(part):
                first = neurons.start + number * self.block
                parts = read_panels(fmt, block.view(-1, fmt.panel_bytes(self.block)), self.block)
                of_block = of_scales[..., first : first + self.block]
                found.append(values(fmt, Strided(*parts, of_block, of_zeros), dtype))
            return in_own_order(fmt, torch.cat(found, 1)[:, : len(neurons)])
        parts = read_panels(fmt, part.reshape(-1, fmt.panel_bytes(shape.hidden)), shape.hidden)
        of_scales = of_scales[..., : shape.hidden].roll(-(neurons.start // fmt.group), 0)
        return values(fmt, Strided(*parts, of_scales, of_zeros), dtype)[: len(neurons)]

    def _blocks(self, packed: Tensor, shape: ExpertShape) -> Tensor:
        """uint8 [N, block_bytes], a view."""
        count, size = self.blocks(shape), self.block_bytes(shape)
        return packed[self.head_bytes(shape) :][: count * size].view(count, size)

    def _down_bias(self, packed: Tensor, shape: ExpertShape) -> Tensor:
        start = self.head_bytes(shape) + self.blocks(shape) * self.block_bytes(shape)
        return packed[start : start + shape.hidden * BIAS_BYTES].view(torch.float32)


def _padded(tensor: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Filled up with zeros as `pad` takes sizes, but not copied where there is nothing to fill."""
    return pad(tensor, sizes) if any(sizes) else tensor
