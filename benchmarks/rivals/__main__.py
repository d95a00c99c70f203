"""The command line of the comparisons; the package's docstring shows how to call it."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from moestro.bench.decode import measure_decode
from moestro.errors import MoestroError
from moestro.planning.shapes import REAL_SHAPES

from . import installed, llama_cpp
from .layers import measure_rivals, print_rivals


def main() -> None:
    """Measure what the arguments name and print it as a table, or as a line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rivals", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    kernels = commands.add_parser("kernels", help="layers beside kt-kernel (if installed) and torch's linears")
    kernels.add_argument("--shape", action="append", help=f"default: {', '.join(REAL_SHAPES)}")
    kernels.add_argument("--tokens", action="append", type=int, help="default: 1, 4, 128; torch's 16, 64, 256")
    decode = commands.add_parser("decode", help="a whole model beside llama.cpp (if installed) and Transformers")
    decode.add_argument("--shape", default="olmoe-1b-7b", help="default: olmoe-1b-7b")
    decode.add_argument("--bits", type=int, default=4, help="16, 8 or 4; default: 4")
    decode.add_argument("--layers", type=int, help="cut the depth, to fit in RAM; default: all")
    decode.add_argument("--no-alone", dest="alone", action="store_false", help="without Transformers alone")
    for command in (kernels, decode):
        command.add_argument("--rounds", type=int, default=5, help="turns to take medians of; default: 5")
        command.add_argument("--threads", type=int, help="default: one on each physical core")
        command.add_argument("--json", action="store_true")
    given = vars(parser.parse_args())
    command, as_json = given.pop("command"), given.pop("json")
    try:
        if command == "kernels":
            rows = measure_rivals(shapes=given.pop("shape") or REAL_SHAPES, **given)
            print(json.dumps([asdict(row) for row in rows])) if as_json else print_rivals(rows)
            return
        is_there = llama_cpp.available() is not None and installed("gguf", "gguf") is not None
        others = {"llama.cpp": llama_cpp.random_model} if is_there else {}
        report = measure_decode(given.pop("shape"), given.pop("bits"), others=others, **given)
        print(json.dumps(report.to_json())) if as_json else report.print()
    except MoestroError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
