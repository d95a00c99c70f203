"""The table of docs/performance.md: decode on the CPU by shape, bits, tokens in the cache and sequences a step.

    python -m benchmarks.performance --threads 2    measures it by `moestro bench decode`, and writes the table
    python -m benchmarks.performance --table        writes the table anew from the results that are kept

Each shape is cut to a depth at which it fits, which changes the share of the head in a token and nothing else. Every
row is kept, those included where the caches do not fit. Results lie in benchmarks/results with machine and commit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moestro.bench.decode import measure_decode
from moestro.bench.machine_card import machine_card, slug

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- table: python -m benchmarks.performance --table -->", "<!-- end of table -->"
BATCHES, CACHED = (1, 2, 4, 8, 16), (64, 4096, 16384)
BITS = (4, 8, 16)


class Model(NamedTuple):
    """A shape, and to how many layers it is cut."""

    shape: str
    layers: int


MODELS = (Model("olmoe-1b-7b", 8), Model("qwen3-30b-a3b", 6), Model("mixtral-8x7b", 2))


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="turns to take medians of")
    parser.add_argument("--shape", choices=[model.shape for model in MODELS], help="only this one")
    parser.add_argument("--bits", type=int, choices=BITS, help="only these")
    parser.add_argument("--table", action="store_true", help="only write the table anew")
    given = parser.parse_args()
    for model in MODELS:
        for bits in BITS:
            if not given.table and given.shape in (None, model.shape) and given.bits in (None, bits):
                measure(model, bits, given.threads, given.rounds)
    write_table()


def measure(model: Model, bits: int, threads: int, rounds: int) -> None:
    """One run of `moestro bench decode`, kept as JSON."""
    report = measure_decode(
        *(model.shape, bits),
        layers=model.layers,
        rounds=rounds,
        threads=threads,
        alone=False,
        batches=BATCHES,
        cached=CACHED,
    )
    report.print()
    found = report.to_json() | {"bits": bits, "machine": machine_card()}
    target = RESULTS / f"performance-{model.shape}-{bits}bit-{report.level}-{slug(found['cpu'])}.json"
    target.write_text(json.dumps(found) + "\n")


def write_table() -> None:
    """Write what is kept into the page, between its two marks."""
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text("\n".join((before + BEGIN, *table(), END + after)))


def table() -> Iterator[str]:
    """The lines of the table, of each run a row a length of the caches."""
    heads = ("shape, layers", "bits", "machine, level", "read limit", "cached", *map(str, BATCHES))
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("performance-*.json"))]
    for run in sorted(runs, key=lambda run: (run["shape"], run["bits"], run["level"])):
        for cached in CACHED:
            cells = [_cell(one) for one in run["batches"] if one["cached"] == cached]
            machine = f"{run['machine']['cpu']}, {run['threads']} threads, {run['level']}"
            limit = f"{run['read_limit_gbps']:.0f} GB/s"
            first = (f"{run['shape']}, {run['layers']}", str(run["bits"]), machine, limit, f"{cached:,}")
            yield "| " + " | ".join((*first, *cells)) + " |"


def _cell(one: dict[str, Any]) -> str:
    if one["tok_s"] is None:
        return "does not fit"
    return f"{one['tok_s']:.0f} of {one['limit_tok_s']:.0f} ({one['tok_s'] / one['limit_tok_s']:.2f})"


if __name__ == "__main__":
    main()
