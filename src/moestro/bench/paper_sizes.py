"""The sizes in Table 1 of Eliseev and Mazur (arXiv 2312.17238): as printed, rebuilt from hqq's packing, and ours.

The paper quantizes Mixtral-8x7B by HQQ with one number of bits for attention and another for the experts; embedding,
output head, gates and norms stay 16-bit. Its column says GB, but the first row, 93.41 GB, is printed as 86.99: it is in
GiB.

hqq's `BitPack` fixes what a weight takes. It packs a table with a column for each group of weights. Codes of 4 and 2
bits fill bytes. Codes of 3 bits are packed ten to a word of 32 bits, so the 64 of a group are filled up to 70, which
makes 3.5 bits of a code. A group has a scale and a zero of 8 bits, and each super-group of scales has a scale and a
zero of 16 bits of its own; the zeros have one such pair for the whole matrix, which is not counted here. Group sizes
are the paper's; how zeros are quantized is in its code (dvmazur/mixtral-offloading, its module build_model).

    >>> round(hqq_bits(3), 3)
    3.754
    >>> round(rebuilt_bytes(16, 16) / GIB, 2)
    86.99
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..memory.formats import ExpertShape, expert_format_named, format_named
from ..planning.formats import QUANTIZED
from ..planning.shapes import shape_named
from .options import TABLE_BITS

GIB = 2**30
SHAPE = "mixtral-8x7b"
# GiB, by bits of attention, then by bits of the experts: 16, 4, 3, 2.
PAPER_GIB = {
    16: (86.99, 25.82, 23.21, 19.33),
    4: (85.16, 23.99, 21.37, 17.54),
    3: (85.08, 23.92, 21.31, 17.46),
    2: (84.96, 23.79, 21.18, 17.30),
}
# Wherever experts are quantized, the paper's sizes are 0.505 to 0.553 GiB above what its packing takes, whatever the
# bits. The paper does not say of what; embedding and head in 32 bits instead of 16 would be 0.49.
UNEXPLAINED_BYTES = GIB // 2
_META_BITS = 8  # a scale's or zero's own bits
_PAIR_BITS = 2 * 16  # a super-group's scale and zero, in float16


class Grouping(NamedTuple):
    """How the paper groups weights of so many bits. group: weights a scale. super_group: scales a scale of theirs."""

    group: int
    super_group: int


PAPER_GROUPS = {4: Grouping(64, 256), 3: Grouping(64, 128), 2: Grouping(16, 128)}


@dataclass(frozen=True, slots=True)
class PaperSize:
    """A cell of the size column, in GiB with the two decimals that the paper prints.

    ours_gib: of the same weights in our formats.
    """

    dense_bits: int
    expert_bits: int
    paper_gib: float
    rebuilt_gib: float
    ours_gib: float


def paper_sizes() -> tuple[PaperSize, ...]:
    """All cells of the size column, attention's bits outermost, as in the paper."""
    return tuple(
        PaperSize(
            dense, expert, gib, round(rebuilt_bytes(dense, expert) / GIB, 2), round(our_bytes(dense, expert) / GIB, 2)
        )
        for dense, row in PAPER_GIB.items()
        for expert, gib in zip(TABLE_BITS, row, strict=True)
    )


def hqq_bits(bits: int) -> float:
    """Bits that a weight takes in hqq's packing with the paper's groups, scales and zeros included; 16 are 16."""
    if bits == 16:
        return 16.0
    group, super_group = PAPER_GROUPS[bits]
    code_bits = -(-group // 10) * 32 / group if bits == 3 else bits
    return code_bits + (2 * _META_BITS + _PAIR_BITS / super_group) / group


def rebuilt_bytes(dense_bits: int, expert_bits: int) -> float:
    """Bytes of Mixtral-8x7B as the paper packs it. dense_bits: of attention."""
    counts = _count_weights()
    packed_bits = counts.attention * hqq_bits(dense_bits) + counts.experts * hqq_bits(expert_bits)
    return packed_bits / 8 + counts.other * 2 + (UNEXPLAINED_BYTES if expert_bits < 16 else 0)


def our_bytes(dense_bits: int, expert_bits: int) -> int:
    """Bytes of Mixtral-8x7B in our formats, from the formats' own account of their bytes. dense_bits: of attention."""
    counts = _count_weights()
    expert_format, dense_format = expert_format_named(name_of_bits(expert_bits)), format_named(name_of_bits(dense_bits))
    experts = counts.layers * counts.experts_of_layer * expert_format.expert_bytes(counts.expert)
    attention = counts.layers * sum(dense_format.matrix_bytes(*size) for size in counts.projections)
    return experts + attention + counts.other * 2


class _Counts(NamedTuple):
    """Sizes of a shape. other: the weights of embedding, head, gates and norms."""

    layers: int
    experts_of_layer: int
    expert: ExpertShape
    projections: tuple[tuple[int, int], ...]
    other: int

    @property
    def experts(self) -> int:
        matrices = sum(rows * columns for rows, columns in self.expert.parts.values())
        return self.layers * self.experts_of_layer * matrices

    @property
    def attention(self) -> int:
        return self.layers * sum(rows * columns for rows, columns in self.projections)


def _count_weights() -> _Counts:
    shape = shape_named(SHAPE)
    width, neurons, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    experts, kv_rows = shape["num_local_experts"], width * shape["num_key_value_heads"] // shape["num_attention_heads"]
    projections = ((width, width), (kv_rows, width), (kv_rows, width), (width, width))  # q, k, v, output
    norms, gates = (2 * layers + 1) * width, layers * experts * width
    other = 2 * shape["vocab_size"] * width + norms + gates
    return _Counts(layers, experts, ExpertShape(width, neurons), projections, other)


def name_of_bits(bits: int) -> str:
    """The format of weights of so many bits that a bfloat16 checkpoint is loaded in."""
    return "bf16" if bits == 16 else QUANTIZED[bits]
