"""Loading a checkpoint: GB of its bytes a second in the whole of `moestro.load`, and the memory it takes.

    python -m benchmarks.load --size 2GiB --threads 2
    python -m benchmarks.load --size 2GiB --kind bf16 --bits 8

For each kind a random checkpoint is written (benchmarks/checkpoints.py) and read once, so that its pages are in memory.
A fresh process imports everything by loading a small checkpoint of the kind, then loads the large one twice, timed,
while its anonymous memory (RssAnon) is sampled every 2 ms; the first model is gone before the second load. Then,
beside the second model, it touches as much fresh memory as the packed experts take, with the same threads. In a virtual
machine a first load pays some or all of that, by what its host still holds; a second load has memory already.
Kinds that Transformers loads as they are (bf16) are loaded by it alone, too, in turns with ours and in the same way.
With `--bits`, kinds of plain weights are quantized at each load, and nothing is kept of it.
Prints a line for each kind, and a line of JSON last. Linux only.
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
from typing import Any

from moestro.bench.loading import anonymous_bytes
from moestro.planning.budget import parse_bytes

from .checkpoints import KINDS, Sizes

SAMPLE_S = 0.002
SMALL = Sizes(layers=1, experts=2, hidden=256, neurons=256)

PLAIN = ("bf16", "bf16-fused")

_ALONE = """
import gc, sys, time
import torch
from transformers import AutoModelForCausalLM
small, large, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
AutoModelForCausalLM.from_pretrained(small, dtype=torch.bfloat16)
for _ in range(2):
    model = None
    gc.collect()
    start_s, cpu_s = time.perf_counter(), time.process_time()
    model = AutoModelForCausalLM.from_pretrained(large, dtype=torch.bfloat16)
    print(time.perf_counter() - start_s, time.process_time() - cpu_s, flush=True)
"""

_CHILD = """
import gc, sys, time
import moestro
small, large, threads, bits = sys.argv[1:]
asked = {"device": "cpu", "threads": int(threads), "bits": int(bits) or None, "cache": False}
moestro.load(small, **asked)
print("ready", flush=True)
sys.stdin.readline()
seconds = []
for _ in range(2):
    model = None
    gc.collect()
    start_s, cpu_s = time.perf_counter(), time.process_time()
    model = moestro.load(large, **asked)
    seconds += [time.perf_counter() - start_s, time.process_time() - cpu_s]
layers = list(zip(model.moestro.math, model.moestro.spec.layers, strict=True))
each = [math.format.expert_bytes(math.shape) * layer.experts for math, layer in layers]
print(*seconds, sum(each), max(each), flush=True)
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

    again_s: of the second call in the process. again_cpu_s: what that took of all cores together.
    touch_s: how long the machine takes to give as much fresh memory as the packed experts.
    """

    seconds: float
    again_s: float
    again_cpu_s: float
    touch_s: float
    packed_bytes: int
    layer_bytes: int
    peak_bytes: int


def watch_load(small: Path, large: Path, threads: int, bits: int | None = None) -> Load:
    """Load a checkpoint twice in a fresh process that has loaded a small one of the kind.

    Args:
        bits: to quantize to; None for the checkpoint's own form.

    Raises:
        RuntimeError: the process failed.
    """
    line = [sys.executable, "-c", _CHILD, str(small), str(large), str(threads), str(bits or 0)]
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
    if len(found) != 6 or not touch:
        raise RuntimeError(f"could not load {large}")
    times, sizes = list(map(float, found[:4])), list(map(int, found[4:]))
    return Load(times[0], *times[2:], float(touch), *sizes, peak_bytes - before_bytes)


def load_alone(small: Path, large: Path, threads: int) -> list[float]:
    """Seconds and CPU seconds of a first and a second load by Transformers alone, in bf16, in a process as ours.

    Raises:
        RuntimeError: the process failed.
    """
    line = [sys.executable, "-c", _ALONE, str(small), str(large), str(threads)]
    found = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False).stdout.split()
    if len(found) != 4:
        raise RuntimeError(f"Transformers could not load {large}")
    return list(map(float, found))


def file_bytes(path: Path) -> int:
    """Bytes of a file or of a folder's files, each of which is read once."""
    total = 0
    for one in sorted(path.iterdir()) if path.is_dir() else [path]:
        with one.open("rb") as file:
            while chunk := len(file.read(1 << 24)):
                total += chunk
    return total


def measure(kind: str, size_bytes: int, threads: int, rounds: int, bits: int | None = None) -> dict[str, Any]:
    """The figures of a kind: medians of all rounds, and the largest peak."""
    per_weight = {"fp8": 1.0} | dict.fromkeys(PLAIN, 2.0)
    layer_bytes = int(32 * 3 * 1024 * 1024 * per_weight.get(kind, 0.55))
    sizes = Sizes(max(4, size_bytes // layer_bytes), 32, 1024, 1024)
    loads, alone = list[Load](), list[list[float]]()
    with tempfile.TemporaryDirectory(prefix="moestro-load-") as folder:
        small = KINDS[kind](Path(folder) / "small", SMALL)
        large = KINDS[kind](Path(folder) / "large", sizes)
        n_bytes = file_bytes(large)
        for _ in range(rounds):
            loads.append(watch_load(small, large, threads, bits))
            if kind in PLAIN and bits is None:
                alone.append(load_alone(small, large, threads))
    row = {"kind": kind, "file_bytes": n_bytes, "seconds": median(one.seconds for one in loads)}
    row |= {"again_cpu_s": median(one.again_cpu_s for one in loads)}
    row |= {"again_s": median(one.again_s for one in loads), "gbps": n_bytes / row["seconds"] / 1e9}
    row |= {"again_gbps": n_bytes / row["again_s"] / 1e9, "touch_s": median(one.touch_s for one in loads)}
    row |= {"packed_bytes": loads[0].packed_bytes, "layer_bytes": loads[0].layer_bytes}
    row |= {"peak_bytes": max(one.peak_bytes for one in loads)}
    if alone:
        names = ("alone_s", "alone_cpu_s", "alone_again_s", "alone_again_cpu_s")
        row |= {name: median(each) for name, each in zip(names, zip(*alone, strict=True), strict=True)}
        row |= {"times_alone": median(other[2] / one.again_s for one, other in zip(loads, alone, strict=True))}
    return row


def main() -> None:
    """Parse, write, load and print each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1GiB", help="of the packed experts, about")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kind", choices=tuple(KINDS), action="append", help="default: all")
    parser.add_argument("--bits", type=int, choices=(8, 4, 3, 2), help="of kinds of plain weights; default: their own")
    given = parser.parse_args()
    kinds = given.kind or (KINDS if given.bits is None else PLAIN)
    if given.bits is not None and (others := sorted({*kinds} - {*PLAIN})):
        parser.error(f"--bits quantizes {' and '.join(PLAIN)}, and {others[0]} is quantized already")
    rows = []
    for kind in kinds:
        row = measure(kind, parse_bytes(given.size, "size"), given.threads, given.rounds, given.bits)
        rows.append(row)
        print(
            f"{kind:10} {row['file_bytes'] / 1e9:.2f} GB in {row['seconds']:.2f} s: {row['gbps']:.2f} GB/s; again in "
            f"{row['again_s']:.2f} s ({row['again_cpu_s']:.2f} s of CPU): {row['again_gbps']:.2f} GB/s; "
            f"fresh memory alone {row['touch_s']:.2f} s; "
            f"peak {row['peak_bytes'] / row['packed_bytes']:.3f} x the packed experts"
        )
        if "alone_s" in row:
            print(
                f"{'':10} Transformers alone {row['alone_s']:.2f} s, again {row['alone_again_s']:.2f} s "
                f"({row['alone_again_cpu_s']:.2f} s of CPU): {row['times_alone']:.2f} x as long as ours again"
            )
    print(json.dumps({"threads": given.threads, "bits": given.bits, "loads": rows}))


if __name__ == "__main__":
    main()
