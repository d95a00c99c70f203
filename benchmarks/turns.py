"""Decode of two builds of Moestro in turns, A B A B: what a change costs or saves a token.

    python benchmarks/turns.py PYTHON_A PYTHON_B --shape olmoe-1b-7b --bits 4 --layers 8

Each argument is the Python of an environment with a build in it. Both load the same random weights and stay loaded; in
each turn one decodes some tokens from the same cache while the other waits. Prints medians and the ratio of each pair
of turns, and a line of JSON last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

WORKER = """
import sys, time, torch, transformers
from transformers import DynamicCache
import moestro
transformers.utils.logging.disable_progress_bar()
shape, (bits, layers, threads, tokens) = sys.argv[1], map(int, sys.argv[2:])
from moestro.planning.shapes import SHAPES
if layers:
    SHAPES[shape]["num_hidden_layers"] = layers
model = moestro.load(shape=shape, bits=bits, threads=threads, device="cpu", dtype="bfloat16")
print("ready", flush=True)
with torch.no_grad():
    for _ in sys.stdin:
        cache = DynamicCache(config=model.config)
        model(torch.arange(3, 19)[None], past_key_values=cache)
        one = torch.tensor([[5]])
        for _ in range(3):
            model(one, past_key_values=cache)
        start = time.perf_counter()
        for _ in range(tokens):
            model(one, past_key_values=cache)
        print((time.perf_counter() - start) / tokens, flush=True)
"""


def main() -> None:
    """Parse, start both builds, take turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python_a")
    parser.add_argument("python_b")
    parser.add_argument("--shape", default="olmoe-1b-7b")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--layers", type=int, default=0, help="cut the depth; 0 for all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=40, help="of a turn")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    sizes = [given.shape, given.bits, given.layers, given.threads, given.tokens]
    workers = []
    for python in (given.python_a, given.python_b):
        command = [python, "-c", WORKER, *map(str, sizes)]
        workers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        if workers[-1].stdout.readline() != "ready\n":  # type: ignore[union-attr]
            sys.exit(f"{python} did not load the model")
    times_s: list[list[float]] = [[], []]
    for _ in range(given.rounds + 1):  # the first one warms up
        for worker, times in zip(workers, times_s, strict=True):
            print("go", file=worker.stdin, flush=True)
            times.append(float(worker.stdout.readline()))  # type: ignore[union-attr]
    for worker in workers:
        worker.stdin.close()  # type: ignore[union-attr]
        worker.wait()
    a, b = (times[1:] for times in times_s)
    ratios = sorted(later / earlier for earlier, later in zip(a, b, strict=True))
    found = {
        "a_ms": statistics.median(a) * 1e3,
        "b_ms": statistics.median(b) * 1e3,
        "b_over_a": statistics.median(ratios),
        "b_over_a_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        **vars(given),
    }
    print(f"A {found['a_ms']:.3f} ms a token, B {found['b_ms']:.3f}; B / A {found['b_over_a']:.3f} in turns")
    print(json.dumps({name: value for name, value in found.items() if not name.startswith("python")}))


if __name__ == "__main__":
    main()
