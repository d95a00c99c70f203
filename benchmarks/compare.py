"""Two checkouts of Moestro on one machine, in turns: is the newer one slower?

    python benchmarks/compare.py ../before . --figure us --figure decode_tok_s -- bench decode --shape tiny --no-alone

Both need their own .venv (`make install`). Runs `moestro ... --json` of the first and the second checkout A B A B,
takes the median of each figure and prints second / first. Rows of a list are told apart by their strings and whole
numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def figures(found: Any, wanted: set[str], path: tuple[str, ...] = ()) -> Iterator[tuple[str, float]]:
    """The wanted numbers in a JSON value, each with the names and labels on the way to it."""
    if isinstance(found, list):
        for entry in found:
            labels = entry.items() if isinstance(entry, dict) else ()
            here = [str(v) for _, v in labels if isinstance(v, str) or (isinstance(v, int) and not isinstance(v, bool))]
            yield from figures(entry, wanted, (*path, *here))
    elif isinstance(found, dict):
        for name, value in found.items():
            if isinstance(value, dict | list):
                yield from figures(value, wanted, (*path, name))
            elif isinstance(value, int | float) and wanted & {name, *path[-1:]}:
                yield " ".join((*path, name)), float(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs=2, type=Path)
    parser.add_argument(
        "--figure", action="append", required=True, help="a name in the JSON; may be given several times"
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, help="also write what was found as JSON")
    parser.add_argument("command", nargs="+", help="after --: what follows moestro, without --json")
    options = parser.parse_args()
    taken: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for turn in range(options.turns):
        for which, checkout in enumerate(options.checkouts):
            print(f"turn {turn + 1} of {options.turns}: {checkout}", file=sys.stderr)
            line = [checkout.resolve() / ".venv/bin/moestro", *options.command, "--json"]
            done = subprocess.run(line, cwd=checkout, stdout=subprocess.PIPE, text=True, check=True)
            for name, value in figures(json.loads(done.stdout.splitlines()[-1]), set(options.figure)):
                taken[name][which].append(value)
    medians = {name: [statistics.median(of) for of in both] for name, both in taken.items() if all(both)}
    for name, (first, second) in medians.items():
        print(f"{name:50} {first:12.4g} {second:12.4g}  x {second / first:.3f}")
    if options.output:
        commits = [
            subprocess.run(
                ["git", "rev-parse", "HEAD"], cwd=path, stdout=subprocess.PIPE, text=True, check=True
            ).stdout.strip()
            for path in options.checkouts
        ]
        found = {
            "command": options.command,
            "commits": commits,
            "turns": options.turns,
            "medians": medians,
            "all": taken,
        }
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
