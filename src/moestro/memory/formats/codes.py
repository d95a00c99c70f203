"""The codes and scales of a matrix as plain tensors, to and from panels: the torch twin of all packing and unpacking.

    >>> whole = Coded(torch.zeros(16, 128, dtype=torch.uint8), torch.ones(16, 4, dtype=torch.float16))
    >>> pack_codes(Descriptor("q8_0", Code.S8, 32, Scale.FP16), whole).shape
    torch.Size([1, 2176])

Legend: R rows, K columns, G groups of columns that share a scale, S super-groups of 256 columns, P panels of 16 rows.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import CheckpointError
from ...planning.descriptor import CHUNK, PANEL, ROW, SUPER, Code, Descriptor, Scale, Zero

E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
IQ4NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_DTYPES = {Code.FP32: torch.float32, Code.FP16: torch.float16, Code.BF16: torch.bfloat16}
_SCALE_DTYPES = {Scale.FP16: torch.float16, Scale.BF16: torch.bfloat16, Scale.FP32: torch.float32}
_PLANES = {Code.U2: (2,), Code.U3: (2, 1), Code.U5: (4, 1), Code.U6: (4, 2)}  # bits of each, the lowest first
_QUADS = ((0, 4, 1, 5), (2, 6, 3, 7))  # columns of eight whose bits lie side by side, in either half
_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # columns of eight in the order of a word's nibbles


@dataclass(frozen=True, slots=True)
class Coded:
    """A matrix in a quantized format.

    codes: uint8 [R, K]; bytes that are signed, or e4m3, as they are. scales: [R, G] in the scale's dtype, bytes as
    uint8; for `Scale.BLOCK` float32 [R, ceil(K / 128)]. zeros: [R, G], float16, or uint8 where they are whole numbers.
    d, dmin: float16 [R, S]; of `Scale.SHIFTED` d is uint8 [R, 1]. tensor: float32 [], of `Scale.E4M3`.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    d: Tensor | None = None
    dmin: Tensor | None = None
    tensor: Tensor | None = None

    def rows(self, index: Tensor) -> Coded:
        """Some rows, in the order of an index int64 [n]."""
        taken = {
            each.name: value[index]
            for each in fields(self)
            if (value := getattr(self, each.name)) is not None and each.name != "tensor"
        }
        return replace(self, **taken)

    def columns(self, fmt: Descriptor, index: Tensor) -> Coded:
        """Some whole groups of columns, int64 [n]: what is written down of one block of an expert's neurons."""
        groups = index[:1] * 0 if fmt.group == ROW else index[:: fmt.group] // fmt.group
        supers = index[:1] * 0 if fmt.scale is Scale.SHIFTED else index[::SUPER] // SUPER
        sides = {"codes": index, "scales": groups, "zeros": groups, "d": supers, "dmin": supers}
        taken = {name: value[:, at] for name, at in sides.items() if (value := getattr(self, name)) is not None}
        return replace(self, **taken)

    def padded(self, columns: int) -> Coded:
        """With codes of zero up to so many columns."""
        return replace(self, codes=pad(self.codes, (0, columns - self.codes.shape[1])))


def values(fmt: Descriptor, coded: Coded, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights [R, K], computed in `dtype` in the order of operations that each format's own library has."""
    columns = coded.codes.shape[1]
    numbers = _numbers(fmt, coded.codes, dtype)
    scales = _scales(fmt, coded, dtype)
    spread = _spread(scales, fmt.group, columns)
    if fmt.zero is Zero.CONSTANT:
        numbers = numbers - fmt.constant
    if fmt.zero is Zero.NONE or fmt.zero is Zero.CONSTANT:
        return numbers * spread
    assert coded.zeros is not None
    zeros = coded.zeros.to(dtype)
    if fmt.zero is Zero.FIXED:
        zeros = zeros * 2 ** (fmt.code_bits - 8) - 0.5
    if fmt.zero is Zero.MIN:
        assert coded.dmin is not None
        mins = zeros * coded.dmin.to(dtype).repeat_interleave(SUPER // fmt.group, 1)[:, : zeros.shape[1]]
        return numbers * spread - _spread(mins, fmt.group, columns)
    zeros = _spread(zeros, fmt.group, columns)
    return numbers * spread + zeros if fmt.zero is Zero.ADD else (numbers - zeros) * spread


def pack_codes(fmt: Descriptor, coded: Coded) -> Tensor:
    """Write a matrix down: uint8 [P, panel_bytes]. What fills up is zero.

    Raises:
        CheckpointError: blocks of 128 rows begin within a panel, so that its rows have two scales.
    """
    rows, columns = coded.codes.shape
    chunks, panels = -(-columns // CHUNK), -(-rows // PANEL)
    codes = _padded(coded.codes, rows=panels * PANEL, columns=chunks * CHUNK).view(panels, PANEL, chunks, CHUNK)
    packed = write_codes(fmt.code, codes)  # [P, chunks, bytes]
    tensor, shared, own = _write_sides(fmt, coded, panels, chunks)
    of_unit = chunks if fmt.unit is None else fmt.unit // CHUNK
    parts = [part for part in (shared, None if own is None else _of_units(own, of_unit)) if part is not None]
    header = torch.cat(parts, -1)
    header = pad(header, (0, fmt.unit_header_bytes - header.shape[-1]))
    units = torch.cat((header, _of_units(packed, of_unit)), -1).flatten(1)
    whole = units if tensor is None else torch.cat((tensor, units), -1)
    return whole[:, : fmt.panel_bytes(columns)].contiguous()


def read_codes(fmt: Descriptor, panels: Tensor, columns: int) -> Coded:
    """The matrix [P * 16, K] that panels uint8 [P, panel_bytes] hold."""
    tensor_bytes, shared_bytes, own_bytes = fmt.side_bytes
    chunks = -(-columns // CHUNK)
    of_unit = chunks if fmt.unit is None else fmt.unit // CHUNK
    tensor, body = panels[:, :tensor_bytes], panels[:, tensor_bytes:]
    unit_bytes = fmt.unit_header_bytes + of_unit * fmt.code_bytes
    units = pad(body, (0, -body.shape[1] % unit_bytes)).unflatten(1, (-1, unit_bytes))
    header, packed = units[..., : fmt.unit_header_bytes], units[..., fmt.unit_header_bytes :]
    packed = packed.unflatten(2, (of_unit, -1)).flatten(1, 2)[:, :chunks]
    codes = read_code_bytes(fmt.code, packed)  # [P, 16, chunks, 64]
    found = Coded(codes.flatten(2).flatten(0, 1)[:, :columns], torch.empty(0))
    shared, own = header[..., :shared_bytes], header[..., shared_bytes : shared_bytes + of_unit * own_bytes]
    own = own.unflatten(2, (of_unit, own_bytes)).flatten(1, 2)
    return _read_sides(fmt, found, tensor, shared, own, columns)


def unpack(fmt: Descriptor, panels: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """uint8 [P, panel_bytes] -> [P * 16, K] in `dtype`: what the kernels compute with."""
    if fmt.is_float:
        together = 2 if fmt.code is Code.BF16 else 1
        lanes = panels.view(_DTYPES[fmt.code]).unflatten(1, (-1, PANEL, together))
        matrix: Tensor = lanes.to(dtype).transpose(1, 2).flatten(2).flatten(0, 1)
        return matrix[:, :columns]
    return values(fmt, read_codes(fmt, panels, columns), dtype)


def pack_floats(fmt: Descriptor, matrix: Tensor) -> Tensor:
    """[R, K] -> uint8 [P, panel_bytes]: [K, 16], for bf16 [K / 2, 16, 2], an even and an odd column side by side."""
    together = 2 if fmt.code is Code.BF16 else 1
    rows, columns = (-(-size // unit) * unit for size, unit in zip(matrix.shape, (PANEL, together), strict=True))
    padded = _padded(matrix.to(_DTYPES[fmt.code]), rows, columns).view(-1, PANEL, columns // together, together)
    packed: Tensor = padded.transpose(1, 2).contiguous().flatten(1).view(torch.uint8)
    return packed


# Codes.


def _numbers(fmt: Descriptor, codes: Tensor, dtype: torch.dtype) -> Tensor:
    if fmt.code is Code.S8:
        return codes.view(torch.int8).to(dtype)
    if fmt.code is Code.E4M3:
        return codes.view(torch.float8_e4m3fn).to(dtype)
    if fmt.code is Code.E2M1:
        return torch.tensor(E2M1_DOUBLED, dtype=dtype, device=codes.device)[codes.int()] / 2
    if fmt.code is Code.IQ4NL:
        return torch.tensor(IQ4NL, dtype=dtype, device=codes.device)[codes.int()]
    return codes.to(dtype)


def write_codes(code: Code, codes: Tensor) -> Tensor:
    """uint8 [P, 16, chunks, 64] -> uint8 [P, chunks, bytes]."""
    if code in (Code.S8, Code.U8, Code.E4M3):
        pairs: Tensor = codes.unflatten(3, (-1, 2)).permute(0, 2, 3, 1, 4)  # [P, chunks, 32, 16, 2]
        return pairs.flatten(2)
    planes, shift = [], 0
    for bits in _PLANES.get(code, (4,)):
        part = (codes >> shift & (1 << bits) - 1).unflatten(3, (8, 8))  # [P, 16, chunks, step, column of eight]
        words = _nibble_words(part) if bits == 4 else _plane_words(part, bits)  # [P, 16, chunks, words]
        planes.append(_as_bytes(words.permute(0, 2, 3, 1)))
        shift += bits
    return torch.cat(planes, -1)


def _nibble_words(part: Tensor) -> Tensor:
    words = sum(part[..., column].int() << 4 * nibble for nibble, column in enumerate(_NIBBLES))
    assert isinstance(words, Tensor)
    return words


def _plane_words(part: Tensor, bits: int) -> Tensor:
    steps = 4 // bits  # that share a word
    part = part.int().unflatten(3, (-1, steps))
    words = torch.zeros(part.shape[:4], dtype=torch.int32, device=part.device)
    for step in range(steps):
        for half, columns in enumerate(_QUADS):
            for byte, column in enumerate(columns):
                words |= part[..., step, column] << 8 * byte + bits * (2 * step + half)
    return words


def read_code_bytes(code: Code, packed: Tensor) -> Tensor:
    """uint8 [P, chunks, bytes] -> uint8 [P, 16, chunks, 64]."""
    if code in (Code.S8, Code.U8, Code.E4M3):
        pairs: Tensor = packed.unflatten(2, (-1, PANEL, 2)).permute(0, 3, 1, 2, 4)
        return pairs.flatten(3)
    found, shift, at = None, 0, 0
    for bits in _PLANES.get(code, (4,)):
        size = PANEL * CHUNK * bits // 8
        words = packed[..., at : at + size].contiguous().view(torch.int32).unflatten(2, (-1, PANEL)).permute(0, 3, 1, 2)
        part = torch.empty(*words.shape[:3], 8, 8, dtype=torch.int32, device=packed.device)
        if bits == 4:
            for nibble, column in enumerate(_NIBBLES):
                part[..., column] = words >> 4 * nibble & 15
        else:
            steps = 4 // bits
            of_steps = part.unflatten(3, (-1, steps))
            for step in range(steps):
                for half, columns in enumerate(_QUADS):
                    for byte, column in enumerate(columns):
                        of_steps[..., step, column] = words >> 8 * byte + bits * (2 * step + half) & (1 << bits) - 1
        found = part << shift if found is None else found | part << shift
        at, shift = at + size, shift + bits
    assert found is not None
    return found.flatten(3).to(torch.uint8)


# Scales and zeros.


def _scales(fmt: Descriptor, coded: Coded, dtype: torch.dtype) -> Tensor:
    """[R, G] of each group."""
    scales = coded.scales
    if fmt.scale is Scale.E8M0:
        return _powers_of_two(scales, dtype)
    if fmt.scale is Scale.E4M3:
        assert coded.tensor is not None
        return scales.view(torch.float8_e4m3fn).to(dtype) * coded.tensor.to(dtype)
    if not fmt.is_two_level:
        return scales.to(dtype)
    assert coded.d is not None
    whole = scales.view(torch.int8) if fmt.scale in (Scale.K6, Scale.IQ4XS) else scales
    whole = whole.to(dtype) - (32 if fmt.scale is Scale.K3 else 0)
    if fmt.scale is Scale.SHIFTED:
        return _powers_of_two(coded.d, dtype) * whole
    d = coded.d.to(dtype)
    return d.repeat_interleave(SUPER // fmt.group, 1)[:, : whole.shape[1]] * whole


def _powers_of_two(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """2 ** (byte - 127)."""
    return torch.ldexp(torch.ones_like(exponents, dtype=dtype), exponents.int() - 127)


def _spread(of_groups: Tensor, group: int, columns: int) -> Tensor:
    """[R, G] -> [R, K]."""
    return of_groups if group == ROW else of_groups.repeat_interleave(group, 1)[:, :columns]


def _of_units(of_chunks: Tensor, of_unit: int) -> Tensor:
    """[P, chunks, bytes] -> [P, units, bytes of some chunks], filled up with zeros."""
    whole: Tensor = pad(of_chunks, (0, 0, 0, -of_chunks.shape[1] % of_unit)).unflatten(1, (-1, of_unit))
    return whole.flatten(2)


def _write_sides(
    fmt: Descriptor, coded: Coded, panels: int, chunks: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Bytes of what a panel has [P, bytes], of what units share [P, units, bytes], and of chunks [P, chunks, bytes]."""
    units = 1 if fmt.unit is None else -(-chunks * CHUNK // fmt.unit)
    if fmt.scale is Scale.BLOCK:
        scales = _sides(coded.scales, panels, units)  # [P, 16, units]
        used = torch.arange(panels * PANEL, device=scales.device).view(panels, PANEL) < coded.scales.shape[0]
        if bool(((scales != scales[:, :1]) & used[..., None]).any()):
            raise CheckpointError("blocks of 128 rows that begin within 16 rows of a matrix cannot be kept in FP8")
        return None, _as_bytes(scales[:, 0, :, None]), None
    if fmt.is_two_level:
        assert coded.d is not None
        of_chunk = CHUNK // fmt.group
        small = [
            None if one is None else _sides(one, panels, chunks * of_chunk).unflatten(2, (chunks, of_chunk))
            for one in (coded.scales, coded.zeros)
        ]
        own = _two_level_bytes(fmt.scale, *small)
        if fmt.scale is Scale.SHIFTED:
            return _sides(coded.d, panels, 1)[:, :, 0], None, own
        both = [coded.d] if coded.dmin is None else [coded.d, coded.dmin]
        unit = torch.cat([_as_bytes(_sides(one, panels, units).transpose(1, 2)) for one in both], -1)
        return None, unit, own
    groups = fmt.groups_of_chunk
    count = units if fmt.unit is None or fmt.group > CHUNK else chunks
    sides = [_as_bytes(_sides(coded.scales, panels, count * groups).unflatten(2, (count, groups)).permute(0, 2, 3, 1))]
    if coded.zeros is not None:
        zeros = _sides(coded.zeros, panels, count * groups).unflatten(2, (count, groups)).permute(0, 2, 3, 1)
        if fmt.zero is Zero.INT and fmt.code_bits <= 4:
            zeros = pad(zeros, (0, 0, 0, groups % 2))
            zeros = zeros[:, :, 0::2] | zeros[:, :, 1::2] << 4
        sides.append(_as_bytes(zeros))
    together = torch.cat(sides, -1)  # [P, count, bytes]
    tensor = None
    if fmt.scale is Scale.E4M3:
        assert coded.tensor is not None
        tensor = coded.tensor.float().reshape(1).view(torch.uint8).expand(panels, 4)
    return (tensor, together, None) if fmt.group == ROW or fmt.group > CHUNK else (tensor, None, together)


def _read_sides(fmt: Descriptor, found: Coded, tensor: Tensor, shared: Tensor, own: Tensor, columns: int) -> Coded:
    groups = 1 if fmt.group == ROW else -(-columns // fmt.group)
    if fmt.scale is Scale.BLOCK:
        scales = shared.contiguous().view(torch.float32)[:, None, :, 0].expand(-1, PANEL, -1)
        return replace(found, scales=scales.flatten(0, 1)[:, :groups])
    if fmt.is_two_level:
        scales, mins = _two_level_numbers(fmt.scale, own.unflatten(2, (-1, PANEL)))
        d, dmin = (tensor.flatten()[:, None], None) if fmt.scale is Scale.SHIFTED else _of_supers(shared)
        return replace(
            found, scales=_rows(scales, groups), zeros=None if mins is None else _rows(mins, groups), d=d, dmin=dmin
        )
    sides = shared if fmt.group == ROW or fmt.group > CHUNK else own
    size = fmt.groups_of_chunk * PANEL * {Scale.FP16: 2, Scale.BF16: 2, Scale.FP32: 4}.get(fmt.scale, 1)
    scales = sides[..., :size].contiguous()
    if fmt.scale in _SCALE_DTYPES:
        scales = scales.view(_SCALE_DTYPES[fmt.scale])
    scales = _rows(scales.unflatten(2, (-1, PANEL)), groups)
    zeros: Tensor | None = sides[..., size:].contiguous()
    if fmt.zero is Zero.INT and zeros is not None:
        zeros = zeros.unflatten(2, (-1, PANEL))
        if fmt.code_bits <= 4:
            zeros = torch.stack((zeros & 15, zeros >> 4), 3).flatten(2, 3)[:, :, : fmt.groups_of_chunk]
    elif fmt.zero in (Zero.FP16, Zero.ADD) and zeros is not None:
        zeros = zeros.view(torch.float16).unflatten(2, (-1, PANEL))
    else:
        zeros = None
    of_tensor = tensor[0].contiguous().view(torch.float32)[0] if fmt.scale is Scale.E4M3 else None
    return replace(found, scales=scales, zeros=None if zeros is None else _rows(zeros, groups), tensor=of_tensor)


def _of_supers(shared: Tensor) -> tuple[Tensor, Tensor | None]:
    """What units share, uint8 [P, units, bytes] -> float16 [P * 16, units] of d, and of dmin where there is one."""
    parts = shared.contiguous().view(torch.float16).unflatten(2, (-1, PANEL))  # [P, units, d and dmin, 16]
    d, *dmin = (_rows(part, parts.shape[1]) for part in parts.unbind(2))
    return d, dmin[0] if dmin else None


def _two_level_bytes(scale: Scale, s: Any, m: Any) -> Tensor:
    """The small numbers of each chunk's groups, uint8 [P, 16, chunks, g], as bytes [P, chunks, bytes]."""
    if scale is Scale.SHIFTED:
        arrays = [*s.unbind(-1), *m.unbind(-1)]
    elif scale is Scale.K4:
        assert m is not None
        arrays = [
            s[..., 0] | (m[..., 0] & 3) << 6,
            s[..., 1] | (m[..., 0] >> 2 & 3) << 6,
            m[..., 1] | m[..., 0] >> 4 << 6,
        ]
    elif scale is Scale.K3:
        arrays = [s[..., i] | (s[..., 3] >> 2 * i & 3) << 6 for i in range(3)]
    elif scale is Scale.K2:
        assert m is not None
        arrays = [s[..., i] | m[..., i] << 4 for i in range(4)]
    else:
        arrays = list(s.unbind(-1))
    return torch.stack(arrays, 2).permute(0, 3, 2, 1).flatten(2)  # [P, 16, arrays, chunks] -> [P, chunks, arrays * 16]


def _two_level_numbers(scale: Scale, b: Tensor) -> tuple[Tensor, Tensor | None]:
    """[P, chunks, arrays, 16] -> scales and mins, [P, chunks, g, 16] each."""
    if scale is Scale.SHIFTED:
        half = b.shape[2] // 2
        return b[:, :, :half], b[:, :, half:]
    if scale is Scale.K4:
        first = b[:, :, 0] >> 6 | b[:, :, 1] >> 6 << 2 | b[:, :, 2] >> 6 << 4
        return b[:, :, :2] & 63, torch.stack((first, b[:, :, 2] & 63), 2)
    if scale is Scale.K3:
        last = b[:, :, 0] >> 6 | b[:, :, 1] >> 6 << 2 | b[:, :, 2] >> 6 << 4
        return torch.cat((b & 63, last[:, :, None]), 2), None
    return (b & 15, b >> 4) if scale is Scale.K2 else (b, None)


def _sides(of_rows: Tensor, panels: int, count: int) -> Tensor:
    """[R, n] -> [P, 16, count], filled up with zeros."""
    return _padded(of_rows, panels * PANEL, count).view(panels, PANEL, count)


def _rows(sides: Tensor, count: int) -> Tensor:
    """[P, ..., 16] -> [P * 16, count]."""
    return sides.flatten(1, -2).transpose(1, 2).flatten(0, 1)[:, :count]


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    if tuple(matrix.shape) == (rows, columns):
        return matrix.contiguous()
    whole = matrix.new_zeros(rows, columns)
    whole[: matrix.shape[0], : min(columns, matrix.shape[1])] = matrix[:, :columns]
    return whole


def _as_bytes(part: Tensor) -> Tensor:
    """[P, n, ...] -> uint8 [P, n, bytes]."""
    return part.contiguous().flatten(2).view(torch.uint8)
