"""In what pieces a prompt is read, so that what it takes beside weights and cache does not grow with its length.

>>> largest_chunk(5000, lambda tokens: tokens <= 1500)
1250
"""

from __future__ import annotations

from collections.abc import Callable

LEAST_CHUNK = 512  # tokens: with fewer, experts are read or copied again and again for little
MOST_IN_RAM = 2048  # where no expert crosses a link: with more, an expert's products get no faster
GPU_SHARE = 1 / 16  # of a GPU's budget that activations may take before a prompt is cut for them
RAM_SHARE = 1 / 2  # of the RAM that is free when a prompt comes


def largest_chunk(tokens: int, fits: Callable[[int], bool]) -> int:
    """The largest of the prompt's own length, its half, quarter and so on that fits; at least `LEAST_CHUNK`."""
    chunk = tokens
    while chunk > LEAST_CHUNK and not fits(chunk):
        chunk = max(LEAST_CHUNK, -(-chunk // 2))
    return chunk
