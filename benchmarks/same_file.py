"""Decode by llama.cpp and by Moestro of one and the same GGUF file, in turns.

    python -m benchmarks.same_file --shape qwen3-30b-a3b --kind q4_k_m --layers 3 --threads 2

Needs llama-cpp-python and gguf (see benchmarks/rivals/llama_cpp.py). A random model of a real shape, cut to few layers,
is written straight in the quantized form, with llama.cpp's own choice of a type for each tensor. Both engines load it
and stay loaded; in each turn one decodes some tokens after the same context while the other waits. Prints the medians,
and writes JSON with the machine and the commit to benchmarks/results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moestro.bench.machine_card import git_commit, machine_card, slug
from moestro.bench.models import Engine
from moestro.bench.worker import EngineWorker, Handlers, serve
from moestro.loading.random_stored import has_more_bits

from .rivals.llama_cpp import LlamaCpp, describe_model, is_float32, tensors_of

RESULTS = Path(__file__).parent / "results"
CONTEXT, WARM_TOKENS = 16, 4
POOL = 8191  # random blocks that a tensor repeats; prime, so that its rows differ
FILE_TYPES = {"q4_k_m": "Q4_K_M", "mxfp4": "MXFP4_MOE", "q8_0": "Q8_0"}


# ---- the file ----


def type_of(kind: str, name: str, layers: int) -> str:
    """The type that llama.cpp's quantizer gives a matrix in a file of that kind."""
    if kind != "q4_k_m":
        return "MXFP4" if kind == "mxfp4" and "_exps" in name else "Q8_0"
    if name == "output.weight":
        return "Q6_K"
    found = re.fullmatch(r"blk\.(\d+)\.(attn_v|ffn_down_exps)\.weight", name)
    if found is None:
        return "Q4_K"
    return "Q6_K" if has_more_bits(int(found[1]), layers) else "Q4_K"


def _scale(blocks: NDArray[np.uint8], at: int, value: float, random: np.random.Generator) -> None:
    scales = (value * random.uniform(0.7, 1.3, len(blocks))).astype("<f2")
    blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)


def _blocks(kind: str, block_bytes: int, random: np.random.Generator) -> NDArray[np.uint8]:
    """A pool of random blocks whose weights have a mean near 0 and a deviation of some hundredths."""
    blocks = random.integers(0, 256, (POOL, block_bytes), np.uint8)
    if kind == "Q4_K":
        _scale(blocks, 0, 1e-4, random)
        _scale(blocks, 2, 7.5e-4, random)
    elif kind == "Q6_K":
        _scale(blocks, 208, 1e-4, random)
        blocks[:, 192:208] = random.integers(-16, 17, (POOL, 16), np.int8).view(np.uint8)
    elif kind == "Q8_0":
        _scale(blocks, 0, 3e-4, random)
    else:  # MXFP4: a power of two
        blocks[:, 0] = 120
    return blocks


def write_file(path: Path, shape: str, kind: str, layers: int) -> None:
    """Write a random model of a shape in planning/shapes.py."""
    gguf: Any = import_module("gguf")
    random = np.random.default_rng(0)
    writer = describe_model(gguf, path, shape, FILE_TYPES[kind], layers)
    makers: list[Callable[[], NDArray[Any]]] = []
    pools: dict[str, NDArray[np.uint8]] = {}
    for name, dimensions in tensors_of(shape, layers):
        kind_of = "F32" if is_float32(name) else type_of(kind, name, layers)
        raw_type = gguf.GGMLQuantizationType[kind_of]
        values, block_bytes = gguf.GGML_QUANT_SIZES[raw_type]
        n_blocks = int(np.prod(dimensions)) // values
        writer.add_tensor_info(name, dimensions, np.dtype(np.float32), n_blocks * block_bytes, raw_dtype=raw_type)
        if kind_of == "F32":
            floats = random.standard_normal(dimensions).astype(np.float32) * np.float32(0.02)
            makers.append((lambda n=dimensions: np.ones(n, np.float32)) if "norm" in name else lambda f=floats: f)
        else:
            pool = pools.setdefault(kind_of, _blocks(kind_of, block_bytes, random))
            makers.append(lambda pool=pool, n=n_blocks: np.resize(pool, (n, pool.shape[1])))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for make in makers:
        writer.write_tensor_data(make())
    writer.close()


# ---- the engines ----


class FileEngine(Engine):
    """Moestro with a model loaded from a file, timed as `moestro bench decode` times random ones."""

    def __init__(self, path: str, threads: int) -> None:
        import torch

        from moestro import load
        from moestro.compute.cpu import runner

        self._torch = torch
        self._model = load(path, device="cpu", threads=threads)
        self._runner, self._cache, self.outside_s = runner(threads), None, 0.0
        self.decode_s(CONTEXT, WARM_TOKENS)


class OurWorker(EngineWorker):
    """Moestro with the file loaded, in its own process."""

    def __init__(self, path: Path, threads: int) -> None:
        super().__init__("benchmarks.same_file", ["--worker", str(path), str(threads)])


def _serve(path: str, threads: str) -> None:
    def start() -> tuple[dict[str, Any], Handlers]:
        engine = FileEngine(path, int(threads))
        return engine.card(), {"prefill_s": engine.prefill_s, "decode_s": engine.decode_s}

    serve(start, ours=True)


def main() -> None:
    """Parse, write the file, take turns, print and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-30b-a3b")
    parser.add_argument("--kind", choices=tuple(FILE_TYPES), default="q4_k_m")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32, help="of a turn")
    parser.add_argument("--rounds", type=int, default=9)
    given = vars(parser.parse_args())
    with tempfile.TemporaryDirectory(prefix="moestro-same-") as folder:
        path = Path(folder) / "model.gguf"
        write_file(path, given["shape"], given["kind"], given["layers"])
        n_bytes = path.stat().st_size
        with LlamaCpp(path, given["threads"]) as theirs, OurWorker(path, given["threads"]) as ours:
            turns = [
                [one.decode_s(CONTEXT, given["tokens"]) for one in (theirs, ours)] for _ in range(given["rounds"] + 1)
            ]
            card = theirs.card
    theirs_s, ours_s = zip(*turns[1:], strict=True)  # the first turn warms up
    machine = machine_card()
    found = given | {
        "file_bytes": n_bytes,
        "llama_cpp": card,
        "llama_cpp_ms": median(theirs_s) * 1e3,
        "moestro_ms": median(ours_s) * 1e3,
        "speedup": median(a / b for a, b in turns[1:]),
        "machine": machine,
        "commit": git_commit(),
    }
    print(
        f"{given['shape']} {given['kind']}, {given['layers']} layers, {n_bytes / 1e9:.2f} GB: llama.cpp "
        f"{found['llama_cpp_ms']:.2f} ms a token, Moestro {found['moestro_ms']:.2f}, x {found['speedup']:.2f} in turns"
    )
    today = datetime.date.today().isoformat()
    name = f"same-file-{given['shape']}-{given['kind']}-{slug(str(machine['cpu']))}-{today}.json"
    RESULTS.joinpath(name).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    _serve(*sys.argv[2:]) if sys.argv[1:2] == ["--worker"] else main()
