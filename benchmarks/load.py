"""Loading a quantized checkpoint: GB of its bytes a second in the whole of `moestro.load`, and the memory it takes.

    python -m benchmarks.load --size 2GiB --threads 2

For each kind a random checkpoint is written (benchmarks/checkpoints.py) and read once, so that its pages are in memory.
A fresh process imports everything by loading a small checkpoint of the kind, then loads the large one, timed, while its
anonymous memory (RssAnon) is sampled every 2 ms. Then it touches as much fresh memory as the packed experts take, with
the same threads: the time that no load can go below. Prints a line for each kind, and a line of JSON last. Linux only.
"""

from __future__ import annotations

import argparse
import json
import select
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from moestro.bench.loading import anonymous_bytes
from moestro.planning.budget import parse_bytes

from .checkpoints import KINDS, Sizes

SAMPLE_S = 0.002
SMALL = Sizes(layers=1, experts=2, hidden=256, neurons=256)

_CHILD = """
import sys, time
import moestro
small, large, threads = sys.argv[1:]
moestro.load(small, device="cpu", threads=int(threads))
print("ready", flush=True)
sys.stdin.readline()
start_s = time.perf_counter()
model = moestro.load(large, device="cpu", threads=int(threads))
seconds = time.perf_counter() - start_s
layers = list(zip(model.moestro.math, model.moestro.spec.layers, strict=True))
each = [math.format.expert_bytes(math.shape) * layer.experts for math, layer in layers]
print(seconds, sum(each), max(each), flush=True)
sys.stdin.readline()
from moestro.compute.cpu import first_touch
from moestro.memory.store import map_memory
memory = map_memory(sum(each))
start_s = time.perf_counter()
first_touch(memory, int(threads))
print(time.perf_counter() - start_s, flush=True)
"""


@dataclass(frozen=True, slots=True)
class Load:
    """One load: seconds of the call, bytes of the packed experts, of a layer of them, and the peak above the start.

    touch_s: how long the machine takes to give as much fresh memory as the packed experts.
    """

    seconds: float
    touch_s: float
    packed_bytes: int
    layer_bytes: int
    peak_bytes: int


def watch_load(small: Path, large: Path, threads: int) -> Load:
    """Load a checkpoint in a fresh process that has loaded a small one of the kind.

    Raises:
        RuntimeError: the process failed.
    """
    line = [sys.executable, "-c", _CHILD, str(small), str(large), str(threads)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        if child.stdout.readline().strip() != "ready":
            raise RuntimeError(f"could not load {small}")
        before_bytes = peak_bytes = anonymous_bytes(child.pid)
        child.stdin.write("go\n")
        child.stdin.flush()
        while not select.select([child.stdout], [], [], SAMPLE_S)[0]:
            peak_bytes = max(peak_bytes, anonymous_bytes(child.pid))
        found = child.stdout.readline().split()
        peak_bytes = max(peak_bytes, anonymous_bytes(child.pid))
        child.stdin.close()
        touch = child.stdout.readline()
    if len(found) != 3 or not touch:
        raise RuntimeError(f"could not load {large}")
    return Load(float(found[0]), float(touch), int(found[1]), int(found[2]), peak_bytes - before_bytes)


def file_bytes(path: Path) -> int:
    """Bytes of a file or of a folder's files, each of which is read once."""
    total = 0
    for one in sorted(path.iterdir()) if path.is_dir() else [path]:
        with one.open("rb") as file:
            while chunk := len(file.read(1 << 24)):
                total += chunk
    return total


def main() -> None:
    """Parse, write, load and print each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1GiB", help="of the packed experts, about")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kind", choices=tuple(KINDS), action="append", help="default: all")
    given = parser.parse_args()
    rows = []
    for kind in given.kind or KINDS:
        per_weight = 1.0 if kind == "fp8" else 0.55
        layer_bytes = int(32 * 3 * 1024 * 1024 * per_weight)
        sizes = Sizes(max(4, parse_bytes(given.size, "--size") // layer_bytes), 32, 1024, 1024)
        with tempfile.TemporaryDirectory(prefix="moestro-load-") as folder:
            small = KINDS[kind](Path(folder) / "small", SMALL)
            large = KINDS[kind](Path(folder) / "large", sizes)
            n_bytes = file_bytes(large)
            loads = [watch_load(small, large, given.threads) for _ in range(given.rounds)]
        seconds = median(one.seconds for one in loads)
        peak = max(one.peak_bytes for one in loads)
        row = {"kind": kind, "file_bytes": n_bytes, "seconds": seconds, "gbps": n_bytes / seconds / 1e9}
        row |= {
            "touch_s": median(one.touch_s for one in loads),
            "packed_bytes": loads[0].packed_bytes,
            "layer_bytes": loads[0].layer_bytes,
            "peak_bytes": peak,
        }
        rows.append(row)
        print(
            f"{kind:6} {n_bytes / 1e9:.2f} GB in {seconds:.2f} s: {row['gbps']:.2f} GB/s; fresh memory alone "
            f"{row['touch_s']:.2f} s; peak {peak / loads[0].packed_bytes:.3f} x the packed experts"
        )
    print(json.dumps({"threads": given.threads, "loads": rows}))


if __name__ == "__main__":
    main()
