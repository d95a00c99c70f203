"""Decode of two builds of Moestro in turns, A B A B, or their prompts: what a change costs or saves a token.

    python -m benchmarks.turns PYTHON_A PYTHON_B --shape olmoe-1b-7b --bits 4 --layers 8

Each argument is the Python of an environment with a build in it. Both load the same random weights in the worker of
`moestro bench decode` and stay loaded; in each turn one decodes some tokens after the same context, or with --prompt
reads a prompt, while the other waits. Prints medians and the ratio of each pair of turns, and a line of JSON last.
"""

from __future__ import annotations

import argparse
import json
from statistics import median

from moestro.bench.models import OURS, ModelWorker
from moestro.planning.shapes import depth_of_shape

CONTEXT = 16  # tokens in the cache before those that are timed


def main() -> None:
    """Parse, start both builds, take turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python_a")
    parser.add_argument("python_b")
    parser.add_argument("--shape", default="olmoe-1b-7b")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--layers", type=int, help="cut the depth; default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=40, help="of a turn")
    parser.add_argument("--prompt", type=int, metavar="N", help="read prompts of so many tokens instead of decoding")
    parser.add_argument("--rounds", type=int, default=15)
    given = vars(parser.parse_args())
    pythons = given.pop("python_a"), given.pop("python_b")
    sizes = {"bits": given["bits"], "threads": given["threads"]}
    sizes["layers"] = depth_of_shape(given["shape"], given["layers"])
    with (
        ModelWorker(OURS, given["shape"], **sizes, python=pythons[0]) as a,
        ModelWorker(OURS, given["shape"], **sizes, python=pythons[1]) as b,
    ):
        turns = [
            [_token_s(one, given["tokens"], given["prompt"]) for one in (a, b)] for _ in range(given["rounds"] + 1)
        ]
    a_s, b_s = zip(*turns[1:], strict=True)  # the first turn warms up
    ratios = sorted(later / earlier for earlier, later in turns[1:])
    found = {
        "a_ms": median(a_s) * 1e3,
        "b_ms": median(b_s) * 1e3,
        "b_over_a": median(ratios),
        "b_over_a_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
    }
    print(f"A {found['a_ms']:.3f} ms a token, B {found['b_ms']:.3f}; B / A {found['b_over_a']:.3f} in turns")
    print(json.dumps(found | given))


def _token_s(worker: ModelWorker, tokens: int, prompt: int | None) -> float:
    """Seconds of a decoded token, or of one of a prompt."""
    return worker.prefill_s(prompt) / prompt if prompt else worker.decode_s(CONTEXT, tokens)


if __name__ == "__main__":
    main()
