"""A packed model's start: seconds from `moestro.load` to the first token, and how fast a disk's files are read.

    python -m benchmarks.start --shape olmoe-1b-7b --bits 4

A packed folder with random weights of a shape is written. A fresh process, which has imported everything and loaded a
small packed folder, loads it and computes the token after a prompt, twice: with the files' pages in memory, and without
them. The first model is gone before the second load, which so gets memory that the process had; a first one gets fresh
memory, which a virtual machine may give slowly: how long as much takes alone is measured in the same process. Between
these turns a reader with as many threads reads the same files without their pages, which is what the disk can do.
Prints medians, and a line of JSON last. Linux only: pages are dropped by posix_fadvise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from moestro.loading import plug  # noqa: F401  # registers the quantizer and the experts function
from moestro.loading.config import MoestroConfig
from moestro.loading.packed.manifest import Asked
from moestro.loading.packed.write import write_packed
from moestro.loading.random_model import build_random_model

PIECE_BYTES = 8 << 20

_CHILD = """
import gc, sys, time
from pathlib import Path
import torch, moestro
from benchmarks.start import drop_pages
from moestro.compute.cpu import first_touch
from moestro.memory.store import map_memory
small, large, threads, is_cold = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "cold"

def first_token(folder):
    start_s = time.perf_counter()
    model = moestro.load(folder, device="cpu", threads=threads)
    loaded_s = time.perf_counter() - start_s
    with torch.no_grad():
        model(torch.arange(3, 11)[None], use_cache=True, logits_to_keep=1).logits.argmax()
    return model, loaded_s, time.perf_counter() - start_s

found, model = [], first_token(small)[0]
for _ in range(2):
    model = None
    gc.collect()
    if is_cold:
        drop_pages(Path(large))
    model, *seconds = first_token(large)
    found += seconds
memory = map_memory(sum(path.stat().st_size for path in Path(large).iterdir()))
start_s = time.perf_counter()
first_touch(memory, threads)
print(*found, time.perf_counter() - start_s)
"""


def write_folder(folder: Path, shape: str, bits: int, layers: int | None, threads: int) -> None:
    """Write a packed folder of a shape with random weights."""
    config = MoestroConfig(device="cpu", threads=threads, bits=bits, fuse=False)
    model: Any = build_random_model(shape, config, dtype=torch.bfloat16, seed=0, layers=layers)

    def beside(target: Path) -> None:
        values = model.config.to_dict()
        values.pop("quantization_config", None)
        (target / "config.json").write_text(json.dumps(values, default=str))

    write_packed(model, folder, source={"model": shape}, asked=Asked(bits, bits, bits), beside=beside)


class Start(NamedTuple):
    """Seconds of a first and a second load in a process, each without and with the first token; and of fresh memory."""

    load_s: float
    token_s: float
    again_load_s: float
    again_token_s: float
    touch_s: float


def start_s(small: Path, large: Path, threads: int, *, cold: bool) -> Start:
    """Load a folder in a fresh process, with its pages in memory or without.

    Raises:
        RuntimeError: the process failed.
    """
    line = [sys.executable, "-c", _CHILD, str(small), str(large), str(threads), "cold" if cold else "warm"]
    found = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False).stdout.split()
    if len(found) != 5:
        raise RuntimeError(f"could not load {large}")
    return Start(*map(float, found))


def drop_pages(folder: Path) -> None:
    """Have the system forget what it holds of a folder's files, so that the next reader reads the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_s(folder: Path, threads: int) -> float:
    """Seconds of reading all files of a folder in pieces, each thread into memory of its own."""
    pieces = [
        (path, offset)
        for path in sorted(folder.iterdir())
        for offset in range(0, max(path.stat().st_size, 1), PIECE_BYTES)
    ]
    shares = [pieces[len(pieces) * n // threads : len(pieces) * (n + 1) // threads] for n in range(threads)]

    def read(share: list[tuple[Path, int]]) -> None:
        room = bytearray(PIECE_BYTES)
        for path, offset in share:
            with path.open("rb", buffering=0) as file:
                os.preadv(file.fileno(), [room], offset)

    start_s = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, shares))
    return time.perf_counter() - start_s


def measure(folder: Path, shape: str, bits: int, layers: int | None, threads: int, rounds: int) -> dict[str, Any]:
    """The figures: medians of the rounds."""
    small, large = folder / "small", folder / "large"
    write_folder(small, "tiny", bits, None, threads)
    write_folder(large, shape, bits, layers, threads)
    n_bytes = sum(path.stat().st_size for path in large.iterdir())
    warm, cold, disk = list[Start](), list[Start](), list[float]()
    for _ in range(rounds):
        read_s(large, threads)  # so that all pages are in memory
        warm.append(start_s(small, large, threads, cold=False))
        drop_pages(large)
        disk.append(read_s(large, threads))
        cold.append(start_s(small, large, threads, cold=True))
    row: dict[str, Any] = {"shape": shape, "bits": bits, "layers": layers, "threads": threads, "n_bytes": n_bytes}
    for name, starts in (("in_memory", warm), ("from_disk", cold)):
        row[name] = {one: median(getattr(each, one) for each in starts) for one in Start._fields}
    row |= {"disk_s": median(disk), "disk_gbps": n_bytes / median(disk) / 1e9}
    row["share_of_disk"] = median(alone / ours.load_s for alone, ours in zip(disk, cold, strict=True))
    row["again_share_of_disk"] = median(alone / ours.again_load_s for alone, ours in zip(disk, cold, strict=True))
    return row


def main() -> None:
    """Parse, write, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="olmoe-1b-7b")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--layers", type=int, help="cut the depth; default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="on the disk to measure; default: the one of temporary files")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moestro-start-", dir=given.folder) as folder:
        row = measure(Path(folder), given.shape, given.bits, given.layers, given.threads, given.rounds)
    print(f"{row['n_bytes'] / 1e9:.2f} GB; the disk alone {row['disk_gbps']:.2f} GB/s")
    for name in ("in_memory", "from_disk"):
        one = row[name]
        print(
            f"{name:10} loaded in {one['load_s']:.2f} s, first token after {one['token_s']:.2f} s; again "
            f"{one['again_load_s']:.2f} and {one['again_token_s']:.2f} s; fresh memory alone {one['touch_s']:.2f} s"
        )
    print(f"from disk {row['share_of_disk']:.2f} of the disk's rate, again {row['again_share_of_disk']:.2f}")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
