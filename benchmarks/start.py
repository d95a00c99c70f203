"""A packed model's start: seconds from `moestro.load` to the first token, and how fast a disk's files are read.

    python -m benchmarks.start --shape olmoe-1b-7b --bits 4

A packed folder with random weights of a shape is written. A fresh process, which has imported everything and loaded a
small packed folder, loads it and computes the token after a prompt: with the files' pages in memory, and without them.
Between these turns a reader with as many threads reads the same files without their pages, which is what the disk can
do. Prints medians, and a line of JSON last. Linux only: pages are dropped by posix_fadvise.
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
from typing import Any

import torch

from moestro.loading import plug  # noqa: F401  # registers the quantizer and the experts function
from moestro.loading.config import MoestroConfig
from moestro.loading.packed.manifest import Asked
from moestro.loading.packed.write import write_packed
from moestro.loading.random_model import build_random_model

PIECE_BYTES = 8 << 20

_CHILD = """
import sys, time
import torch, moestro
small, large, threads = sys.argv[1:]

def first_token(folder):
    start_s = time.perf_counter()
    model = moestro.load(folder, device="cpu", threads=int(threads))
    loaded_s = time.perf_counter() - start_s
    with torch.no_grad():
        model(torch.arange(3, 11)[None], use_cache=True, logits_to_keep=1).logits.argmax()
    return loaded_s, time.perf_counter() - start_s

first_token(small)
print(*first_token(large))
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


def first_token_s(small: Path, large: Path, threads: int) -> tuple[float, float]:
    """Seconds of the load, and with the first token, in a fresh process.

    Raises:
        RuntimeError: the process failed.
    """
    line = [sys.executable, "-c", _CHILD, str(small), str(large), str(threads)]
    found = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False).stdout.split()
    if len(found) != 2:
        raise RuntimeError(f"could not load {large}")
    return float(found[0]), float(found[1])


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
    first_token_s(small, large, threads)  # so that all pages are in memory
    warm, cold, disk = list[tuple[float, float]](), list[float](), list[float]()
    for _ in range(rounds):
        warm.append(first_token_s(small, large, threads))
        drop_pages(large)
        disk.append(read_s(large, threads))
        drop_pages(large)
        cold.append(first_token_s(small, large, threads)[0])
    row: dict[str, Any] = {"shape": shape, "bits": bits, "layers": layers, "threads": threads, "n_bytes": n_bytes}
    row |= {"load_s": median(one[0] for one in warm), "first_token_s": median(one[1] for one in warm)}
    row |= {"from_disk_s": median(cold), "disk_s": median(disk)}
    row |= {"from_disk_gbps": n_bytes / row["from_disk_s"] / 1e9, "disk_gbps": n_bytes / row["disk_s"] / 1e9}
    row["share"] = median(alone / ours for alone, ours in zip(disk, cold, strict=True))
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
    print(
        f"{row['n_bytes'] / 1e9:.2f} GB; pages in memory: loaded in {row['load_s']:.2f} s, first token after "
        f"{row['first_token_s']:.2f} s; from disk: loaded in {row['from_disk_s']:.2f} s, {row['from_disk_gbps']:.2f} "
        f"GB/s, {row['share']:.2f} of the disk's {row['disk_gbps']:.2f}"
    )
    print(json.dumps(row))


if __name__ == "__main__":
    main()
