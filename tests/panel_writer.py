"""An independent writer of panels: docs/formats.md byte by byte, slowly, from the parts of a format alone."""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from moestro.memory.formats import Coded, MatrixFormat

BITS = {"U2": 2, "U3": 3, "U4": 4, "U5": 5, "U6": 6, "E2M1": 4, "IQ4NL": 4}
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight columns each nibble of a word is, the lowest first
TWO_LEVEL = ("K4", "K2", "K6", "K3", "IQ4XS", "SHIFTED")
UNITS = dict.fromkeys(TWO_LEVEL, 256)  # columns; of other scales as their group says


class PanelWriter:
    """Writes the panels of one matrix [R, K]."""

    def __init__(self, fmt: MatrixFormat, coded: Coded) -> None:
        self.fmt, self.coded = fmt, coded
        self.rows, self.columns = coded.codes.shape
        self.codes = coded.codes.tolist()
        self.scale, self.zero = fmt.scale.name, fmt.zero.name

    def write(self) -> Tensor:
        """uint8 [P, bytes of a panel]."""
        panels = [self._panel(row) for row in range(0, self.rows, 16)]
        return torch.tensor([list(panel) for panel in panels], dtype=torch.uint8)

    def _panel(self, row: int) -> bytes:
        out = b""
        if self.scale == "E4M3":
            out += struct.pack("<f", float(self.coded.tensor))  # type: ignore[arg-type]
        if self.scale == "SHIFTED":
            out += self._column(self.coded.d, row, 0)
        unit = UNITS.get(self.scale, {0: self.columns, 64: 64}.get(self.fmt.group, 128))
        for start in range(0, max(1, self.columns), unit or 1):
            header = self._shared(row, start)
            for chunk in range(start, start + unit, 64):
                header += self._own(row, chunk)
            out += header + bytes(self._fills_up(len(header), unit))
            for chunk in range(start, min(start + unit, self.columns), 64):
                out += self._chunk_codes(row, chunk)
        return out

    def _fills_up(self, header: int, unit: int) -> int:
        """Bytes that bring the header of a unit of two levels to a multiple of 64, if they are 1 % of it or less."""
        whole = header + unit * 16 * BITS.get(self.fmt.code.name, 8) // 8
        return -header % 64 if self.scale in TWO_LEVEL and -header % 64 * 100 <= whole else 0

    def _shared(self, row: int, start: int) -> bytes:
        """What all chunks of a unit share."""
        if self.scale == "BLOCK":
            return struct.pack("<f", float(self.coded.scales[row, start // 128]))
        if self.scale == "SHIFTED":
            return b""
        if self.scale in TWO_LEVEL:
            d = self._column(self.coded.d, row, start // 256)
            return d + (self._column(self.coded.dmin, row, start // 256) if self.zero == "MIN" else b"")
        if self.fmt.group in (16, 32, 64):
            return b""
        group = start // self.fmt.group if self.fmt.group else 0
        return self._column(self.coded.scales, row, group) + self._zeros(row, group, 1)

    def _own(self, row: int, start: int) -> bytes:
        """What a chunk has for itself."""
        if self.scale in TWO_LEVEL:
            return self._small(row, start)
        if self.fmt.group not in (16, 32, 64):
            return b""
        first, count = start // self.fmt.group, 64 // self.fmt.group
        scales = b"".join(self._column(self.coded.scales, row, first + g) for g in range(count))
        return scales + self._zeros(row, first, count)

    def _zeros(self, row: int, first: int, count: int) -> bytes:
        """Zeros of some groups: fp16, or whole numbers of which two of up to 4 bits share a byte."""
        if self.zero in ("FP16", "ADD"):
            return b"".join(self._column(self.coded.zeros, row, first + g) for g in range(count))
        if self.zero != "INT":
            return b""
        columns = [self._column(self.coded.zeros, row, first + g) for g in range(count)]
        if BITS.get(self.fmt.code.name, 8) > 4:
            return b"".join(columns)
        columns += [bytes(16)] * (count % 2)
        return b"".join(
            bytes(low | high << 4 for low, high in zip(*columns[g : g + 2], strict=True)) for g in range(0, count, 2)
        )

    def _small(self, row: int, start: int) -> bytes:
        """Small scales (and mins) of a chunk, of formats with two levels."""
        count = 64 // self.fmt.group
        first = start // self.fmt.group
        s = [self._column(self.coded.scales, row, first + g) for g in range(count)]
        if self.scale in ("K6", "IQ4XS"):
            return b"".join(s)
        if self.scale == "K3":
            return b"".join(bytes(s[i][r] | (s[3][r] >> 2 * i & 3) << 6 for r in range(16)) for i in range(3))
        m = [self._column(self.coded.zeros, row, first + g) for g in range(count)]
        if self.scale == "SHIFTED":
            return b"".join(s + m)
        if self.scale == "K2":
            return b"".join(bytes(s[g][r] | m[g][r] << 4 for r in range(16)) for g in range(4))
        b0 = bytes(s[0][r] | (m[0][r] & 3) << 6 for r in range(16))
        b1 = bytes(s[1][r] | (m[0][r] >> 2 & 3) << 6 for r in range(16))
        return b0 + b1 + bytes(m[1][r] | (m[0][r] >> 4) << 6 for r in range(16))

    def _column(self, side: Any, row: int, group: int) -> bytes:
        """A group's numbers of 16 rows, in their dtype; zero where the matrix has none."""
        out = b""
        for r in range(row, row + 16):
            inside = r < side.shape[0] and group < side.shape[1]
            out += bytes(side[r, group].reshape(1).view(torch.uint8).tolist()) if inside else bytes(side.itemsize)
        return out

    def _code(self, row: int, column: int) -> int:
        return self.codes[row][column] if row < self.rows and column < self.columns else 0

    def _chunk_codes(self, row: int, start: int) -> bytes:
        bits = BITS.get(self.fmt.code.name, 8)
        if bits == 8:
            places = ((r, start + 2 * pair + odd) for pair in range(32) for r in range(16) for odd in range(2))
            return bytes(self._code(row + r, column) for r, column in places)
        out, shift = b"", 0
        for plane in PLANES[bits]:
            out += self._nibbles(row, start) if plane == 4 else self._plane(row, start, plane, shift)
            shift += plane
        return out

    def _nibbles(self, row: int, start: int) -> bytes:
        words = b""
        for step in range(8):
            for r in range(16):
                word = 0
                for nibble, column in enumerate(NIBBLES):
                    word |= (self._code(row + r, start + 8 * step + column) & 15) << 4 * nibble
                words += struct.pack("<I", word)
        return words

    def _plane(self, row: int, start: int, bits: int, shift: int) -> bytes:
        """Bits of the codes from `shift` on: of 32 / bits columns a word."""
        together = 4 // bits  # steps
        words = [[0] * 16 for _ in range(8 // together)]
        for step in range(8):
            for half, columns in enumerate(((0, 4, 1, 5), (2, 6, 3, 7))):
                for byte, column in enumerate(columns):
                    at = 8 * byte + bits * (2 * (step % together) + half)
                    for r in range(16):
                        code = self._code(row + r, start + 8 * step + column) >> shift & (1 << bits) - 1
                        words[step // together][r] |= code << at
        return b"".join(struct.pack("<16I", *of_rows) for of_rows in words)
