"""How fast the bytes of a GGUF file become panels: GB of file bytes a second, by type, with pages in memory.

python -m benchmarks.repack --threads 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from moestro.compute.repack import pack_stored
from moestro.memory.formats import ExpertShape, expert_format_named
from moestro.memory.formats.raw import GGUF_BLOCKS, RawMatrix

SHAPE = ExpertShape(2048, 1024)  # OLMoE's


def main() -> None:
    """Parse, repack one expert of each type some times, print the medians, and a line of JSON last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    found: dict[str, float] = {}
    for name, (columns, block_bytes) in GGUF_BLOCKS.items():
        fmt, parts, n_bytes = expert_format_named(name), {}, 0
        for part, (rows, width) in SHAPE.parts.items():
            stored = torch.randint(0, 256, (rows, width // columns * block_bytes), dtype=torch.uint8)
            n_bytes += stored.numel()
            parts[part] = (RawMatrix("gguf", rows, width, {"weight": stored}, fmt.matrices[part]), None, None)
        packed = torch.empty(fmt.expert_bytes(SHAPE), dtype=torch.uint8)
        seconds = []
        for _ in range(given.rounds):
            start_s = time.perf_counter()
            pack_stored(packed, fmt, SHAPE, parts, threads=given.threads)
            seconds.append(time.perf_counter() - start_s)
        found[name] = round(n_bytes / statistics.median(seconds) / 1e9, 2)
        print(f"{name:8} {found[name]:6.2f} GB/s")
    print(json.dumps({"threads": given.threads, "gbps": found}))


if __name__ == "__main__":
    main()
