"""A packed matrix as constants that the Triton kernels are compiled for: all of it follows from its descriptor.

    >>> from moestro.memory.formats import format_named
    >>> panel_spec(format_named("q6_k"), columns=256).piece
    16

The bytes are those of docs/formats.md; this module knows of no device and needs no Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...memory.formats import MatrixFormat

CHUNK = 64  # columns
_WORD_BYTES = 4
_LOW_BITS = {2: 2, 3: 2, 4: 4, 5: 4, 6: 4}  # of the first plane of a code's bits; a second one has the rest
_LEAST_PRODUCT = 16  # columns that a tensor core multiplies at once


@dataclass(frozen=True)
class PanelSpec:
    """Where codes, scales and zeros of a matrix are, and what they mean. Sizes are in words of 4 bytes.

    A *piece* is 16, 32 or 64 columns that are multiplied before their scale is applied: a group, or a chunk where the
    group is larger. Its columns are multiplied in *planes*, each what one shift takes out of loaded words.

    code, scale, zero: the descriptor's, in lower case. constant: likewise.
    layout: "plain", a number a column; "pairs", two columns side by side; "nibbles", words of 8 columns.
    low_bits, high_bits: of a code in "nibbles", in words of their own.
    unit_chunks: chunks whose scales lie together before their codes.
    height: rows of numbers, or of pairs, of a panel of floats.
    """

    code: str
    scale: str
    zero: str
    constant: int
    group: int
    layout: str
    piece: int
    planes: int
    low_bits: int
    high_bits: int
    panel_words: int
    panel_header: int
    unit_header: int
    unit_chunks: int
    shared_words: int
    own_words: int
    code_words: int
    height: int

    @property
    def is_quantized(self) -> bool:
        """Whether groups have scales."""
        return self.scale != "none"

    @property
    def has_addend(self) -> bool:
        """Whether a group has something that the sum of its activations multiplies."""
        return self.zero in ("fp16", "int", "add", "min", "fixed")

    @property
    def pieces(self) -> int:
        """Of a chunk."""
        return CHUNK // self.piece

    @property
    def loads(self) -> int:
        """Of words, for a chunk's codes."""
        return self.pieces * (2 if self.high_bits else 1)

    @property
    def order(self) -> tuple[str, int]:
        """What the order of activations depends on."""
        return self.layout, self.piece


def panel_spec(fmt: MatrixFormat, columns: int) -> PanelSpec:
    """The constants of a matrix of so many columns."""
    bits = fmt.code_bits
    if fmt.is_float:
        layout, piece = "pairs" if fmt.code.name == "BF16" else "plain", CHUNK
    else:
        layout, piece = "pairs" if bits == 8 else "nibbles", min(fmt.group or CHUNK, CHUNK)
    planes = 1 if layout == "plain" else min(2 if layout == "pairs" else 4, piece // _LEAST_PRODUCT)
    low_bits = _LOW_BITS[bits] if layout == "nibbles" else 0
    panel, shared, own = (size // _WORD_BYTES for size in fmt.side_bytes)
    chunks = -(-columns // CHUNK)
    unit_chunks = chunks if fmt.unit is None else fmt.unit // CHUNK
    return PanelSpec(
        code=fmt.code.name.lower(),
        scale=fmt.scale.name.lower(),
        zero=fmt.zero.name.lower(),
        constant=fmt.constant,
        group=fmt.group,
        layout=layout,
        piece=piece,
        planes=planes,
        low_bits=low_bits,
        high_bits=bits - low_bits if layout == "nibbles" else 0,
        panel_words=fmt.panel_bytes(columns) // _WORD_BYTES,
        panel_header=panel,
        unit_header=fmt.unit_header_bytes // _WORD_BYTES,
        unit_chunks=unit_chunks,
        shared_words=shared,
        own_words=own,
        code_words=fmt.code_bytes // _WORD_BYTES,
        height=-(-columns // 2) if layout == "pairs" else columns,
    )
