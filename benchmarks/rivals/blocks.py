"""Random weights in the blocks that GGUF files store, made at memory speed instead of by rounding floats.

A pool of a few MiB is random. It repeats after a prime number of blocks, so that the rows of a matrix differ.

    pool = random_blocks(bits=4, size_bytes=2**30, seed=0)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STD = 0.02  # of the weights


@dataclass(frozen=True, slots=True)
class Packing:
    """How llama.cpp stores weights of some bits: `values` weights in each block of `block_bytes`."""

    name: str  # of gguf.GGMLQuantizationType, and MOSTLY_<name> of gguf.LlamaFileType
    values: int
    block_bytes: int


PACKINGS = {16: Packing("BF16", 1, 2), 8: Packing("Q8_0", 32, 34), 4: Packing("Q4_0", 32, 18)}
# Prime, so that rows, which are a whole number of blocks, never repeat in step with the pool. About 4 MiB.
POOL_BLOCKS = {16: 2097143, 8: 131071, 4: 131071}


def random_blocks(bits: int, size_bytes: int, seed: int, std: float = STD) -> NDArray[np.uint8]:
    """At least `size_bytes` of random weights, a pool of whole blocks again and again: uint8 [bytes].

    The weights have mean 0 and about the given standard deviation. All scales are normal numbers, since CPUs are slow
    at denormals and infinities.
    """
    generator = np.random.default_rng(seed)
    count = POOL_BLOCKS[bits]
    pool = np.empty((count, PACKINGS[bits].block_bytes), np.uint8)
    if bits == 16:
        weights = generator.standard_normal(count, dtype=np.float32) * np.float32(std)
        pool[:] = (weights.view(np.uint32) >> 16).astype("<u2").view(np.uint8).reshape(count, 2)
    else:
        limit = 127 if bits == 8 else 7
        scale = std * np.sqrt(3) / limit  # the deviation of a uniform number in -limit..limit
        scales = scale * generator.uniform(0.7, 1.3, count)
        pool[:, :2] = scales.astype("<f2").view(np.uint8).reshape(count, 2)
        if bits == 8:
            pool[:, 2:] = generator.integers(-limit, limit + 1, (count, 32), dtype=np.int8).view(np.uint8)
        else:  # two to a byte, each 8 more than its value
            low, high = generator.integers(1, 16, (2, count, 16), dtype=np.uint8)
            pool[:, 2:] = low | high << 4
    return np.resize(pool, (-(-size_bytes // pool.size) * count, pool.shape[1])).reshape(-1)
