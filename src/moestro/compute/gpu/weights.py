"""Codes, scales and zeros out of panels, in Triton, for every format that a `PanelSpec` describes.

A code becomes a number of the dtype of the product, exactly: whole numbers below 256, e2m1, e4m3 and the table of
IQ4_NL are exact in float16 and bfloat16. Scales are float32 numbers, which multiply products; so no scale can take a
product out of float16's range.

Legend: N rows of a packed matrix. A chunk is 64 columns, a piece 16, 32 or 64 of them that share a scale, a plane what
one shift takes out of the loaded words of a piece. `m` is a `PanelSpec`; offsets are in words of 4 bytes. A matrix is
given by `pointers` to its first byte: words (int32), halves (int16) and octets (uint8).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...memory.formats import IQ4NL

PANEL = tl.constexpr(16)  # rows
_FIXED_STEP = tl.constexpr(1 / 256)  # of a zero in fixed point, in numbers of so many bits
_TABLE = bytes(number + 128 for number in IQ4NL)  # unsigned
_IQ4NL_0 = tl.constexpr(int.from_bytes(_TABLE[0:4], "little", signed=True))
_IQ4NL_4 = tl.constexpr(int.from_bytes(_TABLE[4:8], "little", signed=True))
_IQ4NL_8 = tl.constexpr(int.from_bytes(_TABLE[8:12], "little", signed=True))
_IQ4NL_12 = tl.constexpr(int.from_bytes(_TABLE[12:16], "little", signed=True))


@triton.jit
def column_at(place, m: tl.constexpr):
    """Which of a chunk's 64 columns stands at a place when pieces, and in a piece planes, follow one another."""
    start = place // m.piece * m.piece
    inner = place % m.piece
    if m.layout == "nibbles":
        steps: tl.constexpr = m.piece // 8
        nibble = inner % 16 // steps * m.planes + inner // 16
        column = start + inner % 16 % steps * 8 + nibble % 4 * 2 + nibble // 4
    elif m.layout == "pairs":
        column = start + inner % (m.piece // 2) * 2 + inner // (m.piece // 2)
    else:
        column = place
    return column


@triton.jit
def place_of(column, m: tl.constexpr):
    """The inverse of `column_at`; of columns beyond 64, in their chunk."""
    start = column // m.piece * m.piece
    inner = column % m.piece
    if m.layout == "nibbles":
        steps: tl.constexpr = m.piece // 8
        nibble = inner % 8 // 2 + inner % 2 * 4
        place = start + nibble % m.planes * 16 + nibble // m.planes * steps + inner // 8
    elif m.layout == "pairs":
        place = start + inner // 2 + inner % 2 * (m.piece // 2)
    else:
        place = column
    return place


@triton.jit
def _unit_at(chunk, m: tl.constexpr):
    """Where a chunk's unit is in its panel, with what its chunks share."""
    return m.panel_header + chunk // m.unit_chunks * (m.unit_header + m.unit_chunks * m.code_words)


@triton.jit
def _own_at(chunk, m: tl.constexpr):
    """Where a chunk's own scales are in its panel."""
    return _unit_at(chunk, m) + m.shared_words + chunk % m.unit_chunks * m.own_words


@triton.jit
def _codes_at(chunk, m: tl.constexpr):
    """Where a chunk's codes are in its panel."""
    return m.panel_header + (chunk // m.unit_chunks + 1) * m.unit_header + chunk * m.code_words


@triton.jit
def load_codes(pointers, row, fits, chunk, piece: tl.constexpr, m: tl.constexpr):
    """The words that a piece's codes are in, a row of them for each column of a plane, in two parts where bits are.

    row: int [N], of the matrix. fits: [N], whether there is such a row.
    """
    words, halves, _ = pointers
    lane = row // PANEL * m.panel_words
    if m.layout == "nibbles":
        low, high = _load_nibbles(words + lane + row % PANEL, fits, chunk, piece, m)
    elif not m.is_quantized:
        low = _load_floats(words, halves, lane, row % PANEL, fits, chunk, m)
        high = low
    else:
        side: tl.constexpr = m.piece // 2  # pairs
        place = tl.arange(0, 32 if m.planes == 2 and m.piece == 64 else 16)
        pair = piece * side + place % side
        at = 2 * (lane + _codes_at(chunk, m)) + row % PANEL
        loaded = tl.load(halves + (at[None, :] + (pair * PANEL)[:, None]), mask=fits[None, :], other=0)
        low = loaded.to(tl.int32) >> (place // side * 8)[:, None]
        high = low
    return low, high


@triton.jit
def _load_nibbles(at, fits, chunk, piece: tl.constexpr, m: tl.constexpr):
    """Words of 8 columns, 16 rows of them: each word as often as it takes to have a column for each row of a plane.

    at: pointers [N] to the first words of matrix rows, as if panels had no headers.
    """
    steps: tl.constexpr = m.piece // 8
    place = tl.arange(0, 16)
    step = piece * steps + place % steps
    nibble = place // steps * m.planes
    pair = nibble // 2 * 8 + nibble % 2 * 2 + step % 2 * 4  # where the two bits of a code are
    at += _codes_at(chunk, m)
    mask = fits[None, :]
    if m.low_bits == 4:
        low = tl.load(at[None, :] + (step * PANEL)[:, None], mask=mask, other=0) >> (nibble * 4)[:, None]
    else:
        low = tl.load(at[None, :] + (step // 2 * PANEL)[:, None], mask=mask, other=0) >> pair[:, None]
    high = low
    at += m.low_bits * 2 * PANEL
    if m.high_bits == 2:
        high = tl.load(at[None, :] + (step // 2 * PANEL)[:, None], mask=mask, other=0) >> pair[:, None]
    elif m.high_bits == 1:
        bit = nibble // 2 * 8 + nibble % 2 + step % 4 * 2
        high = tl.load(at[None, :] + (step // 4 * PANEL)[:, None], mask=mask, other=0) >> bit[:, None]
    return low, high


@triton.jit
def _load_floats(words, halves, lane, within, fits, chunk, m: tl.constexpr):
    """A chunk of floats, or of pairs of bfloat16, as they are."""
    width: tl.constexpr = m.piece // m.planes
    column = chunk * width + tl.arange(0, width)
    if m.code == "fp16":
        at = halves + (2 * lane + within)[None, :] + (column * PANEL)[:, None]
    else:
        at = words + (lane + within)[None, :] + (column * PANEL)[:, None]
    if m.height % width == 0:
        loaded = tl.load(at, mask=fits[None, :], other=0)
    else:
        loaded = tl.load(at, mask=(column < m.height)[:, None] & fits[None, :], other=0)
    return loaded


@triton.jit
def plane_of(low, high, plane: tl.constexpr, m: tl.constexpr, dtype: tl.constexpr):
    """A plane of loaded words in dtype, scales left out: [piece / planes, N]."""
    if m.is_quantized:
        numbers = _number(_code(low, high, plane, m), m, dtype)
    elif m.code == "fp32":
        numbers = low.to(tl.float32, bitcast=True).to(dtype)
    elif m.code == "fp16":
        numbers = low.to(tl.float16, bitcast=True).to(dtype)
    elif dtype == tl.bfloat16:
        numbers = (low >> (16 * plane)).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        numbers = ((low >> (16 * plane)) << 16).to(tl.float32, bitcast=True).to(dtype)
    return numbers


@triton.jit
def _code(low, high, plane: tl.constexpr, m: tl.constexpr):
    """int32 codes of a plane."""
    if m.layout == "pairs":
        code = (low >> (8 * plane)) & 255
    elif m.low_bits == 4:
        code = (low >> (4 * plane)) & 15
    else:
        code = (low >> (plane // 2 * 8 + plane % 2 * 2)) & 3
    if m.high_bits == 2:
        code |= ((high >> (plane // 2 * 8 + plane % 2 * 2)) & 3) << m.low_bits
    elif m.high_bits == 1:
        code |= ((high >> (plane // 2 * 8 + plane % 2)) & 1) << m.low_bits
    return code


@triton.jit
def _number(code, m: tl.constexpr, dtype: tl.constexpr):
    """What a code stands for, a constant zero subtracted."""
    if m.code == "s8":
        number = _whole(code ^ 128, 128, dtype)
    elif m.code == "e2m1":  # its bits are those of a float16 2**-14 times as large
        number = (((code & 7) << 9 | (code & 8) << 12).to(tl.int16).to(tl.float16, bitcast=True) * 16384.0).to(dtype)
    elif m.code == "e4m3":
        number = _e4m3(code).to(dtype)
    elif m.code == "iq4nl":
        four = tl.where(code < 4, _IQ4NL_0, tl.where(code < 8, _IQ4NL_4, tl.where(code < 12, _IQ4NL_8, _IQ4NL_12)))
        number = _whole((four >> (code % 4 * 8)) & 255, 128, dtype)
    else:
        number = _whole(code, m.constant, dtype)
    return number


@triton.jit
def _whole(number, offset: tl.constexpr, dtype: tl.constexpr):
    """int32 in [0, 256) -> number - offset, exactly: the low bits of a float so large that its last bit is 1."""
    if dtype == tl.float16:
        whole = (number | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - (1024.0 + offset)
    else:
        whole = ((number | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + offset)).to(dtype)
    return whole


@triton.jit
def _e4m3(code):
    """int32 bits of float8_e4m3fn -> float16; by bit operations, since older GPUs lack the type. NaN becomes 480."""
    return ((code & 127) << 7 | (code & 128) << 8).to(tl.int16).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def load_scale(pointers, row, fits, chunk, piece: tl.constexpr, m: tl.constexpr):
    """What a piece's codes are multiplied with, and what is added to each product: float32 [N] each."""
    words, halves, octets = pointers
    lane = row // PANEL * m.panel_words
    within = row % PANEL
    if m.scale == "k4" or m.scale == "k2" or m.scale == "k6" or m.scale == "k3" or m.scale == "iq4xs":
        d = _half(halves + 2 * (lane + _unit_at(chunk, m)) + within, fits, False)
        small = octets + 4 * (lane + _own_at(chunk, m)) + within
        scale = d * _small_scale(small, fits, piece, m)
    elif m.scale == "shifted":
        power = _power_of_two(_octet(octets + 4 * lane + within, fits))
        number = _octet(octets + 4 * (lane + _own_at(chunk, m)) + piece * PANEL + within, fits)
        scale = power * number.to(tl.float32)
    elif m.scale == "block":
        scale = tl.load(words + lane + _unit_at(chunk, m), mask=fits, other=0).to(tl.float32, bitcast=True)
    else:
        side = lane + _side_at(chunk, m)
        scale = _plain_scale(words, halves, octets, side, piece * PANEL + within, fits, m)
        if m.scale == "e4m3":
            scale *= tl.load(words + lane, mask=fits, other=0).to(tl.float32, bitcast=True)
    addend = scale
    if m.zero == "fixed":
        number = _octet(octets + 4 * (lane + _zeros_at(chunk, m)) + piece * PANEL + within, fits)
        addend = (0.5 - number.to(tl.float32) * _FIXED_STEP * (1 << (m.low_bits + m.high_bits))) * scale
    elif m.zero == "min":
        dmin = _half(halves + 2 * (lane + _unit_at(chunk, m)) + PANEL + within, fits, False)
        addend = -dmin * _small_min(octets + 4 * (lane + _own_at(chunk, m)) + within, fits, piece, m)
    elif m.zero == "int":
        addend = -scale * _whole_zero(octets + 4 * (lane + _zeros_at(chunk, m)) + within, fits, piece, m)
    elif m.zero == "fp16" or m.zero == "add":
        zero = _half(halves + 2 * (lane + _zeros_at(chunk, m)) + piece * PANEL + within, fits, False)
        addend = zero if m.zero == "add" else -zero * scale
    return scale, addend


@triton.jit
def _side_at(chunk, m: tl.constexpr):
    """Where the scales are that a chunk's groups have for themselves, in its panel."""
    return _unit_at(chunk, m) if m.group == 0 or m.group > 64 else _own_at(chunk, m)


@triton.jit
def _zeros_at(chunk, m: tl.constexpr):
    """Where the zeros are: behind those scales."""
    size: tl.constexpr = 4 if m.scale == "fp32" else 2 if m.scale == "fp16" or m.scale == "bf16" else 1
    return _side_at(chunk, m) + m.pieces * PANEL * size // 4


@triton.jit
def _half(at, fits, is_bfloat16: tl.constexpr):
    """float32 of float16 or bfloat16 bits."""
    bits = tl.load(at, mask=fits, other=0)
    if is_bfloat16:
        value = bits.to(tl.bfloat16, bitcast=True).to(tl.float32)
    else:
        value = bits.to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def _plain_scale(words, halves, octets, side, place, fits, m: tl.constexpr):
    """side: where the arrays are. place: of a number in them."""
    if m.scale == "fp32":
        scale = tl.load(words + side + place, mask=fits, other=0).to(tl.float32, bitcast=True)
    elif m.scale == "fp16" or m.scale == "bf16":
        scale = _half(halves + 2 * side + place, fits, m.scale == "bf16")
    elif m.scale == "e8m0":
        scale = _power_of_two(_octet(octets + 4 * side + place, fits))
    else:
        scale = _e4m3(tl.load(octets + 4 * side + place, mask=fits, other=0).to(tl.int32)).to(tl.float32)
    return scale


@triton.jit
def _power_of_two(exponent):
    """int32 -> float32 2 ** (exponent - 127)."""
    bits = tl.where(exponent == 0, 1 << 22, exponent << 23)  # 2**-127 is a number without a leading 1
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _octet(at, fits):
    return tl.load(at, mask=fits, other=0).to(tl.int32)


@triton.jit
def _top_bits(at, fits):
    """Six bits, two in each of three arrays."""
    first, second, third = _octet(at, fits), _octet(at + PANEL, fits), _octet(at + 2 * PANEL, fits)
    return first >> 6 | second >> 6 << 2 | third >> 6 << 4


@triton.jit
def _small_scale(at, fits, piece: tl.constexpr, m: tl.constexpr):
    """The whole number that d is multiplied with."""
    if m.scale == "k3" and piece == 3:
        number = _top_bits(at, fits) - 32
    else:
        octet = _octet(at + piece * PANEL, fits)
        if m.scale == "k4":
            number = octet & 63
        elif m.scale == "k2":
            number = octet & 15
        elif m.scale == "k3":
            number = (octet & 63) - 32
        else:
            number = (octet ^ 128) - 128
    return number.to(tl.float32)


@triton.jit
def _small_min(at, fits, piece: tl.constexpr, m: tl.constexpr):
    """The whole number that dmin is multiplied with."""
    if m.scale == "k2":
        number = _octet(at + piece * PANEL, fits) >> 4
    elif piece == 0:
        number = _top_bits(at, fits)
    else:
        number = _octet(at + 2 * PANEL, fits) & 63
    return number.to(tl.float32)


@triton.jit
def _whole_zero(at, fits, piece: tl.constexpr, m: tl.constexpr):
    """A zero that is a whole number: of up to 4 bits, two in a byte."""
    if m.layout == "nibbles" and m.low_bits + m.high_bits <= 4:
        zero = _octet(at + piece // 2 * PANEL, fits) >> (piece % 2 * 4) & 15
    else:
        zero = _octet(at + piece * PANEL, fits)
    return zero.to(tl.float32)
