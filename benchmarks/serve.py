"""Many requests at a time by llama.cpp and by Moestro's engine of a server, of one and the same GGUF file, in turns.

    python -m benchmarks.serve --rival FOLDER --shape olmoe-1b-7b --kind q4_k_m --layers 4

FOLDER has llama-cpp-python and gguf, by `pip install --target FOLDER` with the flags in benchmarks/rivals/llama_cpp.py.
Both engines load a random model of a real shape, cut to few layers, and stay loaded; in each turn one answers so many
clients while the other waits. Clients of Moestro's engine ask in a closed loop, and it samples and writes text. For
llama.cpp all prompts come at once: `llama_decode` reads them in batches of 512 tokens of several sequences, then steps
of one token of each, without sampling. Prints the medians, and writes JSON with the machine and the commit to
benchmarks/results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from moestro.bench.machine_card import git_commit, machine_card, slug
from moestro.bench.serve_load import ask_engine, figures_of, random_prompts
from moestro.bench.worker import Handlers, Worker, serve

from .rivals.llama_cpp import LlamaCpp
from .same_file import FILE_TYPES, RESULTS, write_file

Speeds = tuple[float, float | None]  # tokens a second: of prompts and answers in all, and of answers while all decode


class OurWorker(Worker):
    """Moestro's engine of a server with the file loaded, in its own process."""

    def __init__(self, path: Path, shape: str, threads: int, most: int, context: int) -> None:
        super().__init__("benchmarks.serve", ["--worker", str(path), shape, *map(str, (threads, most, context))])


def _serve(path: str, shape: str, threads: str, most: str, context: str) -> None:
    def start() -> tuple[dict[str, Any], Handlers]:
        from moestro import load
        from moestro.bench.serve import request_of, vocabulary_of
        from moestro.loading.random_model import shape_tokenizer
        from moestro.serve.engine import Engine

        model = load(path, device="cpu", threads=int(threads))
        engine = Engine(model, shape_tokenizer(shape), max_requests=int(most), context=int(context), queue=int(most))

        def answer(clients: int, requests: int, prompt: int, answer: int, seed: int) -> dict[str, Any]:
            sizes = {"clients": clients, "requests": requests, "tokens": prompt}
            prompts = random_prompts(vocabulary=vocabulary_of(model), seed=seed, **sizes)
            found = ask_engine(engine, prompts, lambda one: request_of(model, one, answer))
            return asdict(figures_of(found, clients, engine.max_requests))

        return {"batching": engine.batching}, {"answer": answer}

    serve(start, ours=True)


def theirs_of(rival: LlamaCpp, clients: int, requests: int, prompt: int, answer: int) -> Speeds:
    """llama.cpp's speeds of so many sequences, again and again."""
    waves = [rival.together(clients, prompt, answer) for _ in range(requests)]
    decode_s = sum(seconds for _, seconds in waves)
    total_s = sum(seconds for seconds, _ in waves) + decode_s
    return clients * requests * (prompt + answer) / total_s, clients * requests * (answer - 1) / decode_s


def main() -> None:
    """Parse, write the file, take turns, print and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rival", required=True, help="the folder with llama-cpp-python and gguf")
    parser.add_argument("--shape", default="olmoe-1b-7b")
    parser.add_argument("--kind", choices=tuple(FILE_TYPES), default="q4_k_m")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=2, help="of each client in a turn")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    given = vars(parser.parse_args())
    folder = str(Path(given.pop("rival")).resolve())
    sys.path.append(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), folder)))
    sizes = given["prompt_tokens"], given["answer_tokens"]
    most, threads = max(given["clients"]), given["threads"]
    turns: dict[int, list[tuple[Speeds, dict[str, Any]]]] = {clients: [] for clients in given["clients"]}
    with tempfile.TemporaryDirectory(prefix="moestro-serve-") as place:
        path = Path(place) / "model.gguf"
        write_file(path, given["shape"], given["kind"], given["layers"])
        context = -(-sum(sizes) // 256) * 256 * most
        with (
            LlamaCpp(path, threads, context=context, sequences=most) as rival,
            OurWorker(path, given["shape"], threads, most, sum(sizes)) as ours,
        ):
            for seed in range(given["rounds"] + 1):
                for clients, found in turns.items():
                    each = given["requests"] if seed else 1  # the first turn warms up
                    of_rival = theirs_of(rival, clients, each, *sizes)
                    asked = {"prompt": sizes[0], "answer": sizes[1], "seed": seed * 100 + clients}
                    of_ours = ours.ask("answer", clients=clients, requests=each, **asked)
                    found += [(of_rival, of_ours)] if seed else []
            card = rival.card
    rows = {str(clients): _row(found) for clients, found in turns.items()}
    machine = machine_card()
    for clients, row in rows.items():
        print(f"{clients} clients: " + ", ".join(f"{name} {value:.2f}" for name, value in row.items()))
    kept = given | {"llama_cpp": card, "clients": rows, "machine": machine, "commit": git_commit()}
    today = datetime.date.today().isoformat()
    sizes_of = f"{given['shape']}-{given['kind']}-{given['layers']}layers"
    name = f"serve-{sizes_of}-llama.cpp-{slug(str(machine['cpu']))}-{today}.json"
    RESULTS.joinpath(name).write_text(json.dumps(kept, indent=1) + "\n")


def _row(found: list[tuple[Speeds, dict[str, Any]]]) -> dict[str, float]:
    both = [(theirs[1], ours["decoding_tok_s"]) for theirs, ours in found]
    decoding = [(theirs, ours) for theirs, ours in both if theirs is not None and ours is not None]
    row = {
        "llama_cpp_tok_s": median(theirs[0] for theirs, _ in found),
        "moestro_tok_s": median(ours["total_tok_s"] for _, ours in found),
        "ratio": median(ours["total_tok_s"] / theirs[0] for theirs, ours in found),
    }
    if len(decoding) == len(found):
        row["llama_cpp_decoding_tok_s"] = median(theirs for theirs, _ in decoding)
        row["moestro_decoding_tok_s"] = median(ours for _, ours in decoding)
        row["decoding_ratio"] = median(ours / theirs for theirs, ours in decoding)
    return row


if __name__ == "__main__":
    _serve(*sys.argv[2:]) if sys.argv[1:2] == ["--worker"] else main()
