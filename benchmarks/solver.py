"""How fast weights are quantized: the hqq package, our plain-torch twin and our kernels in turns, A B C A B C.

    python -m benchmarks.solver --threads 2

A matrix [4096, 4096] of normal weights times 0.02, in bfloat16, at 4 and 3 bits in groups of 64 and at 2 bits in
groups of 16. Prints medians in millions of weights a second, how far our mean error is from the package's, and what a
register-only loop of multiply-adds reaches at the same level and threads. Then the same of all that a load does with a
matrix, up to its panels, on all cores: with 8 bits, by kernels and plain torch, and with 4, 3 and 2 bits by `--fit hqq`
and `--fit none`, all in turns. A line of JSON last.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from hqq.core.quantize import Quantizer
from torch import Tensor

from moestro.compute.cpu import best_level, fma_gflops, solve_hqq
from moestro.memory.formats import MATRIX_FORMATS
from moestro.memory.formats.hqq_solver import solve_in_torch
from moestro.memory.formats.quantize import write_int8_in_torch
from moestro.planning.formats import QUANTIZED

CASES = ((4, 64), (3, 64), (2, 16))  # bits, and columns of a group


def main() -> None:
    """Parse, quantize in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=4096, help="rows, and columns")
    parser.add_argument("--only-ours", action="store_true", help="leave the package and the twin out")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    weights = (torch.randn(given.size, given.size) * 0.02).bfloat16()
    limit = fma_gflops(given.threads)
    print(f"level {best_level()}, {given.threads} threads, {limit:.0f} GFLOP/s of multiply-adds")
    cases = []
    for bits, group in CASES:
        solvers = _solvers(weights, bits, group, given.threads)
        if given.only_ours:
            solvers = {"ours": solvers["ours"]}
        errors = {name: _error(solve(), weights) for name, solve in solvers.items()}
        speeds = _speeds(solvers, weights.numel(), given.rounds)
        found = ", ".join(f"{name} {speed:.1f} M weights/s" for name, speed in speeds.items())
        flops = limit * 1e9 / (speeds["ours"] * 1e6)
        print(f"{bits} bits, groups of {group}: {found}; ours at {flops:.0f} operations of that limit a weight")
        if not given.only_ours:
            print(f"    mean error / the package's: {errors['ours'] / errors['package']:.6f}")
        cases.append({"bits": bits, "group": group, "m_weights_s": speeds, "mean_errors": errors})
    panels = _speeds(_packers(weights, with_twin=not given.only_ours), weights.numel(), given.rounds)
    for name, speed in panels.items():
        print(f"to panels, {name}: {speed:.1f} M weights/s")
    found_all = {"level": best_level(), "threads": given.threads, "fma_gflops": limit, "cases": cases}
    print(json.dumps(found_all | {"panels_m_weights_s": panels}))


def _speeds(ways: dict[str, Callable[[], object]], weights: int, rounds: int) -> dict[str, float]:
    """Median speeds in millions of weights a second, the ways in turns, after a round that warms up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, quantize in ways.items():
            start_s = time.perf_counter()
            quantize()
            times[name].append(time.perf_counter() - start_s)
    return {name: weights / median(of_way[1:]) / 1e6 for name, of_way in times.items()}


def _packers(weights: Tensor, *, with_twin: bool) -> dict[str, Callable[[], object]]:
    """Each writes the panels of all weights into memory that is there."""
    ways: dict[str, Callable[[], object]] = {}
    for bits, name in QUANTIZED.items():
        fmt = MATRIX_FORMATS[name]
        out = torch.zeros(1, fmt.matrix_bytes(*weights.shape), dtype=torch.uint8)
        for fit in ("hqq", "none") if bits < 8 else ("8 bits",):
            called = fit if bits == 8 else f"{bits} bits, --fit {fit}"
            ways[called] = partial(fmt.pack_blocks, weights[None], out, fast=fit == "none")
        if bits == 8 and with_twin:
            ways["8 bits, plain torch"] = partial(write_int8_in_torch, weights[None], fmt, out)
    return ways


def _solvers(weights: Tensor, bits: int, group: int, threads: int) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Each gives codes [R, K], and scales and zeros [R, G]."""

    def package() -> tuple[Tensor, ...]:
        whole, meta = Quantizer.quantize(
            weights, nbits=bits, group_size=group, axis=1, round_zero=bits == 4, bitpack=False, device="cpu"
        )
        return whole, *(meta[name].view(len(weights), -1) for name in ("scale", "zero"))

    return {
        "package": package,
        "twin": lambda: solve_in_torch(weights, bits=bits, group=group, fit=True),
        "ours": lambda: solve_hqq(weights, bits=bits, group=group, fit=True, threads=threads),
    }


def _error(found: tuple[Tensor, ...], weights: Tensor) -> float:
    codes, scales, zeros = found
    whole = codes.float().view(*scales.shape, -1)
    return float(((whole - zeros[..., None]) * scales[..., None] - weights.float().view(whole.shape)).abs().mean())


if __name__ == "__main__":
    main()
