"""CRC32C (Castagnoli; RFC 3720, appendix B.4), by the kernels or by their twin in numpy.

>>> hex(crc32c(b"123456789"))
'0xe3069283'
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cpu import _kernels

_POLYNOMIAL = 0x82F63B78  # bits reversed: the highest bit is x^0
_ONE = 1 << 31
_LANES = 1 << 16  # runs that the twin sums side by side, at the most
_LEAST_LANE = 64  # bytes

Words = np.ndarray[Any, np.dtype[np.uint32]]


def crc32c(data: Tensor | bytes, crc: int = 0) -> int:
    """The checksum of bytes that follow those that `crc` is of.

    Args:
        data: bytes, or uint8 contiguous on the CPU. crc: 0 where nothing comes before.
    """
    if isinstance(data, bytes):
        data = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return _twin(data.numpy(), crc) if _kernels is None else _kernels.crc32c(data, crc)


def bytes_of(data: Tensor) -> memoryview:
    """The memory of a tensor: uint8, contiguous on the CPU."""
    array: Any = data.numpy()
    return memoryview(array)


def combined(first: int, second: int, second_bytes: int) -> int:
    """The checksum of two runs of bytes that follow one another, from that of each."""
    if _kernels is not None:
        return _kernels.crc32c_combine(first, second, second_bytes)
    return int(_multiply(_power(second_bytes), np.array([first], np.uint32))[0]) ^ second


def _twin(data: Any, crc: int) -> int:
    """As the kernel's: runs of equal length are summed side by side, then joined in pairs."""
    lanes = min(_LANES, 1 << max(len(data) // _LEAST_LANE, 1).bit_length() - 1)
    each = len(data) // lanes
    state = np.full(lanes, 0xFFFFFFFF, np.uint32)
    for column in np.ascontiguousarray(data[: lanes * each].reshape(lanes, each).T):
        state = _TABLE[(state ^ column) & 255] ^ state >> 8
    state ^= 0xFFFFFFFF
    size = each
    while len(state) > 1:
        state = _multiply(_power(size), state[::2]) ^ state[1::2]
        size *= 2
    crc = combined(crc, int(state[0]), lanes * each) if each else crc
    rest = data[lanes * each :]
    return _twin(rest, crc) if len(rest) else crc


def _multiply(a: int, b: Words) -> Words:
    """The products of one polynomial with each of `b`, modulo that of the checksum."""
    product = np.zeros_like(b)
    for place in range(31, -1, -1):
        if a >> place & 1:
            product ^= b
        b = np.where(b & 1, b >> 1 ^ _POLYNOMIAL, b >> 1).astype(np.uint32)
    return product


def _power(n_bytes: int) -> int:
    """x^(8 n): what a checksum is multiplied by when n zero bytes follow."""
    result, square = _ONE, _ONE >> 8
    while n_bytes:
        if n_bytes & 1:
            result = int(_multiply(result, np.array([square], np.uint32))[0])
        square = int(_multiply(square, np.array([square], np.uint32))[0])
        n_bytes >>= 1
    return result


def _table() -> Words:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ _POLYNOMIAL, table >> 1).astype(np.uint32)
    return table


_TABLE = _table()
