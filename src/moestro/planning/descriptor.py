"""A number format as a value: which codes, how many columns share a scale, and how scales and zeros are written down.

    >>> Descriptor("q4_k", Code.U4, 32, Scale.K4, Zero.MIN).bits_per_weight
    4.5

Everything that depends on a format follows from its descriptor: the bytes of a panel (docs/formats.md), the torch
twin (`memory/formats/codes.py`), and the C++ and Triton kernels. A weight is scale * (code - zero), or
scale * code + zero where the zero is additive.

Legend: R rows, K columns. A chunk is 64 columns, a unit the chunks whose scales lie together: 1, 2, 4 or all of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import gcd

PANEL = 16  # rows
CHUNK = 64  # columns
SUPER = 256  # columns of a super-group, in llama.cpp's K-quants and IQ4_XS
ROW = 0  # as a group: all columns of a row
_LINE = 64  # bytes of a cache line
_LEAST_PER_LINE = 100  # bytes of a unit for each byte that fills a line up
_BLOCK = 128  # rows and columns that share a scale of `Scale.BLOCK`


class Code(Enum):
    """What stands for one weight. The values are those of the kernels."""

    FP32, FP16, BF16 = 0, 1, 2
    S8 = 3  # a signed byte
    U2, U3, U4, U5, U6, U8 = 4, 5, 6, 7, 8, 9  # whole numbers from 0
    E2M1 = 10  # float4: 0 0.5 1 1.5 2 3 4 6 and their negatives (OCP Microscaling, 5.3.3)
    IQ4NL = 11  # a table of 16 whole numbers of llama.cpp
    E4M3 = 12  # float8_e4m3fn (OCP Microscaling, 5.3.1)


class Scale(Enum):
    """What multiplies the codes of a row and group. The values are those of the kernels."""

    NONE = 0
    FP16, BF16, FP32 = 1, 2, 3
    E8M0 = 4  # a byte, 2 ** (byte - 127)
    E4M3 = 5  # a byte, times a float32 of the whole tensor
    BLOCK = 6  # a float32 for 128 x 128 weights
    # Small whole numbers, times an fp16 of each super-group: llama.cpp's Q4_K and Q5_K, Q2_K, Q6_K, Q3_K and IQ4_XS.
    K4, K2, K6, K3, IQ4XS = 7, 8, 9, 10, 11
    SHIFTED = 12  # a byte, times 2 ** (byte - 127) of each row
    COLUMN = 13  # (byte - fp16) * fp16, of a class of rows and a column (memory/formats/strided.py)


class Zero(Enum):
    """What is subtracted from a code, or added to its product. The values are those of the kernels."""

    NONE = 0
    CONSTANT = 1  # one whole number for all
    FP16 = 2  # of each row and group
    INT = 3  # a whole number of each row and group
    ADD = 4  # fp16 of each row and group, added to scale * code
    MIN = 5  # small whole numbers of each row and group, times an fp16 of each super-group, subtracted
    FIXED = 6  # a byte of each row and group, in fixed point: byte * 2 ** (bits - 8) - 0.5
    COLUMN = 7  # (byte - float32) * float32, of a class of rows and a column; the floats are of the whole matrix


_BITS = {Code.FP32: 32, Code.FP16: 16, Code.BF16: 16, Code.U2: 2, Code.U3: 3, Code.U5: 5, Code.U6: 6}
_BITS |= dict.fromkeys((Code.U4, Code.E2M1, Code.IQ4NL), 4)
_SCALE_BYTES = {Scale.FP16: 2, Scale.BF16: 2, Scale.FP32: 4, Scale.E8M0: 1, Scale.E4M3: 1}
_TWO_LEVEL_BYTES = {Scale.K4: 48, Scale.K3: 48, Scale.K2: 64, Scale.K6: 64, Scale.IQ4XS: 32}  # of a chunk, 16 rows
_UNSIGNED = (Code.U2, Code.U3, Code.U4, Code.U5, Code.U6, Code.U8)
_TWO_LEVEL_GROUPS = {Scale.K4: 32, Scale.K3: 16, Scale.K2: 16, Scale.K6: 16, Scale.IQ4XS: 32}


@dataclass(frozen=True, slots=True)
class Descriptor:
    """One way to write a matrix down.

    group: columns that share a scale: 16, 32, 64, 128, or ROW; of floats, as many as kernels take at once. Of
        `Scale.COLUMN`, the rows of a class: 16, 32, 64, 128 or 256.
    constant: the zero, where it is one for all.
    super_group: of `Scale.COLUMN`, how many scales share two fp16.

    Raises:
        ValueError: parts that do not go together.
    """

    name: str
    code: Code
    group: int = CHUNK
    scale: Scale = Scale.NONE
    zero: Zero = Zero.NONE
    constant: int = 0
    super_group: int = 0

    def __post_init__(self) -> None:
        if (fault := self._fault()) is not None:
            raise ValueError(f"{self.name} is no format: {fault}")

    def _fault(self) -> str | None:
        if self.is_float:
            return None if (self.scale, self.zero) == (Scale.NONE, Zero.NONE) else "floats have no scales"
        if self.scale is Scale.NONE:
            return "codes without a scale"
        if self.is_strided or self.zero is Zero.COLUMN or self.super_group:
            return self._fault_of_strided()
        wanted = _TWO_LEVEL_GROUPS.get(self.scale, _BLOCK if self.scale is Scale.BLOCK else self.group)
        if self.group != wanted or self.group not in (ROW, 16, 32, 64, 128):
            return f"groups of {self.group} columns"
        if (self.zero is Zero.MIN) != (self.scale in (Scale.K4, Scale.K2)):
            return "a zero of two levels goes with a scale of two levels that has one"
        if (self.zero is Zero.FIXED) != (self.scale is Scale.SHIFTED):
            return "a zero in fixed point goes with a shifted scale"
        if self.scale is Scale.SHIFTED and not (CHUNK % (self.group or 1) == 0 < self.group and self.code_bits < 8):
            return f"shifted scales of {self.code_bits} bits and groups of {self.group} columns"
        if self.zero is not Zero.NONE and self.code not in _UNSIGNED:
            return "a zero for codes that are signed"
        fits = 0 < self.constant < 2**self.code_bits if self.zero is Zero.CONSTANT else self.constant == 0
        return None if fits else f"a constant zero of {self.constant}"

    def _fault_of_strided(self) -> str | None:
        if (self.scale, self.zero) != (Scale.COLUMN, Zero.COLUMN) or self.code not in _UNSIGNED or self.constant:
            return "scales and zeros of columns go together, with codes from 0"
        if self.group not in (16, 32, 64, 128, 256):
            return f"groups of {self.group} rows"
        return None if self.super_group > 0 else f"super-groups of {self.super_group} groups"

    @property
    def is_float(self) -> bool:
        """Whether codes are the weights themselves."""
        return self.code in (Code.FP32, Code.FP16, Code.BF16)

    @property
    def is_quantized(self) -> bool:
        """Whether groups have scales."""
        return not self.is_float

    @property
    def is_two_level(self) -> bool:
        """Whether the scales of groups are whole numbers times a number of a super-group or of a row."""
        return self.scale in _TWO_LEVEL_BYTES or self.scale is Scale.SHIFTED

    @property
    def meets_integers(self) -> bool:
        """Whether kernels multiply its codes with activations as integers: all codes but e4m3 and strided ones."""
        return self.is_quantized and self.code is not Code.E4M3 and not self.is_strided

    @property
    def is_strided(self) -> bool:
        """Whether a group is some rows of one column, far apart, which packing makes neighbours."""
        return self.scale is Scale.COLUMN

    @property
    def code_bits(self) -> int:
        """Bits of a code."""
        return _BITS.get(self.code, 8)

    @property
    def unit(self) -> int | None:
        """Columns whose scales lie together before their codes; None for all of a row."""
        if self.is_two_level:
            return SUPER
        if self.is_strided:
            return CHUNK
        if self.group == ROW:
            return None
        return CHUNK if self.is_float or self.group == CHUNK else 2 * CHUNK

    @property
    def groups_of_chunk(self) -> int:
        """Groups of a chunk that have scales of their own."""
        return 1 if self.group == ROW or self.is_strided else max(1, CHUNK // self.group)

    @property
    def block(self) -> int:
        """Neurons of an expert's block at the least, so that down's columns are whole units; whole classes of rows."""
        if self.is_float or self.scale is Scale.BLOCK:
            return CHUNK
        if self.is_strided:
            return max(CHUNK, self.group)
        return SUPER if self.unit is None else self.unit

    @property
    def bits_per_weight(self) -> float:
        """Of a wide matrix, headers included."""
        return 8 * self.panel_bytes(2**16) / PANEL / 2**16

    def zero_bytes(self, groups: int) -> int:
        """Bytes of the zeros of 16 rows and so many groups: whole numbers of up to 4 bits lie two in a byte."""
        if self.zero in (Zero.FP16, Zero.ADD):
            return 2 * PANEL * groups
        if self.zero is not Zero.INT:
            return 0
        return PANEL * (-(-groups // 2) if self.code_bits <= 4 else groups)

    @property
    def side_bytes(self) -> tuple[int, int, int]:
        """Bytes of what a panel has before its units, what chunks of a unit share, and what each has for itself."""
        if self.scale is Scale.SHIFTED:
            return PANEL, 0, 2 * PANEL * self.groups_of_chunk
        if self.is_strided:  # the panels of a class have equal shares of its columns' scales and zeros
            return 0, 0, 2 * CHUNK * PANEL // self.group
        if self.is_two_level:
            return 0, PANEL * (4 if self.zero is Zero.MIN else 2), _TWO_LEVEL_BYTES[self.scale]
        if self.is_float:
            return 0, 0, 0
        if self.scale is Scale.BLOCK:
            return 0, 4, 0
        groups, tensor = self.groups_of_chunk, 4 if self.scale is Scale.E4M3 else 0
        sides = PANEL * groups * _SCALE_BYTES[self.scale] + self.zero_bytes(groups)
        return (tensor, sides, 0) if self.group == ROW or self.group > CHUNK else (tensor, 0, sides)

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of a chunk."""
        return PANEL * CHUNK * self.code_bits // 8

    @property
    def unit_header_bytes(self) -> int:
        """Bytes before the codes of a unit: with scales of two levels, up to a whole cache line where that is cheap."""
        _, shared, own = self.side_bytes
        chunks = 1 if self.unit is None else self.unit // CHUNK
        header = shared + chunks * own
        more = -header % _LINE
        is_cheap = _LEAST_PER_LINE * more <= header + chunks * self.code_bytes
        return header + (more if self.is_two_level and is_cheap else 0)

    def panel_bytes(self, columns: int) -> int:
        """Bytes of a panel of so many columns."""
        if self.is_float:
            together = 2 if self.code is Code.BF16 else 1
            return -(-columns // together) * together * PANEL * self.code_bits // 8
        chunks = -(-columns // CHUNK)
        units = 1 if self.unit is None else -(-columns // self.unit)
        return self.side_bytes[0] + units * self.unit_header_bytes + chunks * self.code_bytes

    def panels_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the panels of a matrix."""
        return -(-rows // PANEL) * self.panel_bytes(columns)

    def divides(self, rows: int) -> bool:
        """Whether a matrix of so many rows can be in this format: classes of rows are whole."""
        return not self.is_strided or rows % self.group == 0

    def table_rows(self, rows: int) -> int:
        """Of `Scale.COLUMN`: after how many classes of rows the numbers of super-groups repeat; 0 of other scales."""
        classes = max(1, rows // self.group) if self.is_strided else 0
        return classes // gcd(classes, self.super_group) if classes else 0

    def table_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the numbers of super-groups and those of the zeros, which a matrix has once; 0 where it has none."""
        width = -(-columns // CHUNK) * CHUNK
        return (_LINE + self.table_rows(rows) * width * 4) if self.is_strided else 0

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a packed matrix: its panels, then its table."""
        return self.panels_bytes(rows, columns) + self.table_bytes(rows, columns)
