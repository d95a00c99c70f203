"""A worker that times one MoE layer of random weights in kt-kernel, the CPU kernels of KTransformers.

It calls the package's extension as the package's own wrappers do, but without their pinned buffers, which need a GPU.
bf16 runs in the class that the package prefers (AMX tiles or AVX512-BF16 where the CPU has them, else AVX2), 4 bits in
its llamafile backend on Q4_0. The router is left out: each token draws its experts evenly at random in each step.

    pip install gguf==0.19.0 && pip install --no-deps kt-kernel==0.7.2

Install it without its dependencies, because it pins torch 2.9.1, which it does not need for this. It was tried with
0.7.2 and on one NUMA node only.

    with KtKernel(2048, 1024, experts=64, top_k=8, bits=4, threads=2) as rival:
        print(rival.card["backend"], rival.layer_s(1))
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moestro.bench.worker import Handlers, Worker, serve
from moestro.errors import RequestError

from . import installed
from .blocks import PACKINGS, random_blocks
from .steps import Draw, draw_steps, median_s

MAX_TOKENS = 512  # of one call: its buffers are made for so many
LLAMAFILE_BLOCK = 256  # its matrices are cut at such columns
MATRICES = ("gate", "up", "down")


def available() -> str | None:
    """The version of kt-kernel, if it is installed."""
    return installed("kt_kernel", "kt-kernel")


class KtKernel(Worker):
    """One MoE layer in kt-kernel, in its own process. `card["backend"]` names the kernels it chose."""

    def __init__(
        self, hidden: int, neurons: int, *, experts: int, top_k: int, bits: int, threads: int, tokens: int = MAX_TOKENS
    ) -> None:
        if available() is None:
            raise RequestError("kt-kernel is not installed; pip install gguf && pip install --no-deps kt-kernel")
        if bits not in (16, 4):
            raise RequestError(f"kt-kernel is measured with 16 or 4 bits, not {bits}")
        if bits == 4 and (hidden % LLAMAFILE_BLOCK or neurons % LLAMAFILE_BLOCK):
            raise RequestError(f"kt-kernel's llamafile backend needs sizes that are multiples of {LLAMAFILE_BLOCK}")
        numbers = (hidden, neurons, experts, top_k, bits, threads, tokens)
        super().__init__("benchmarks.rivals.kt_kernel", [str(number) for number in numbers])

    def layer_s(self, tokens: int, seed: int = 0) -> float:
        """Seconds of a forward of `tokens` tokens: the median of a few, after one to warm up."""
        return float(self.ask("layer_s", tokens=tokens, seed=seed))


class Layer:
    """The layer that the worker times, made of the extension's own objects."""

    def __init__(
        self, hidden: int, neurons: int, experts: int, top_k: int, bits: int, threads: int, max_tokens: int
    ) -> None:
        package: Any = import_module("kt_kernel")
        import_module("torch").set_num_threads(1)  # the package imports it; its threads are not used here
        self._extension: Any = package.kt_kernel_ext
        self._hidden, self._experts, self._top_k, self._max_tokens = hidden, experts, top_k, max_tokens
        self._pool = self._extension.CPUInfer(self._pool_config(threads))
        self._no_gpu_experts = np.zeros(experts, np.uint8)
        config = self._extension.moe.MOEConfig(experts, top_k, hidden, neurons, self._no_gpu_experts.ctypes.data)
        config.layer_idx, config.pool, config.max_len = 0, self._pool.backend_, max_tokens
        matrix_bytes = hidden * neurons // PACKINGS[bits].values * PACKINGS[bits].block_bytes
        make, weights = (self._bf16 if bits == 16 else self._llamafile)(config, matrix_bytes)
        self.backend = (
            f"{make.__name__} ({'bf16' if bits == 16 else 'llamafile Q4_0'}), {package.__cpu_variant__} build"
        )
        self._moe = make(config)
        logical = np.arange(experts, dtype=np.int64)
        self._run(self._moe.load_weights_task(logical.ctypes.data))
        self._weights = weights if bits == 4 else None  # bf16 is copied when it is loaded, Q4_0 is read in place
        forward, stored = self._forward(draw_steps(1, hidden, experts, top_k, seed=0)[0])
        forward()
        out = (stored.astype(np.uint32) << 16).view(np.float32)
        if not np.isfinite(out).all() or not out.any():
            raise RequestError(f"{self.backend} computed no finite numbers here")

    def layer_s(self, tokens: int, seed: int) -> float:
        if not 1 <= tokens <= self._max_tokens:
            raise RequestError(f"{tokens} tokens: the layer was made for 1 to {self._max_tokens}")
        draws = draw_steps(tokens, self._hidden, self._experts, self._top_k, seed)
        return median_s([self._forward(draw)[0] for draw in draws])

    def _pool_config(self, threads: int) -> Any:
        """One pool of threads a NUMA node, as the package advises."""
        nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1
        pools = min(nodes, threads)
        config = self._extension.WorkerPoolConfig()
        config.subpool_count = pools
        config.subpool_numa_map = list(range(pools))
        config.subpool_thread_count = [threads // pools + (i < threads % pools) for i in range(pools)]
        return config

    def _bf16(self, config: Any, matrix_bytes: int) -> tuple[Any, Any]:
        # The experts are copied from windows of one buffer, so that the layer is in RAM only once.
        step = 2 * self._hidden
        source = random_blocks(16, matrix_bytes + step * self._experts, 0)
        generator = np.random.default_rng(0)
        for index, name in enumerate(MATRICES):
            offsets = generator.permutation(self._experts) if index else np.arange(self._experts)
            setattr(config, f"{name}_projs", [[source.ctypes.data + step * int(offset) for offset in offsets]])
            setattr(config, f"{name}_scales", [[0] * self._experts])
        kernels = self._extension.moe
        return getattr(kernels, "AMXBF16_MOE", None) or kernels.AVX2BF16_MOE, source

    def _llamafile(self, config: Any, matrix_bytes: int) -> tuple[Any, Any]:
        types = self._extension.kvcache.ggml_type
        sources = [random_blocks(4, matrix_bytes * self._experts, seed) for seed in range(len(MATRICES))]
        for name, source in zip(MATRICES, sources, strict=True):
            setattr(config, f"{name}_proj", source.ctypes.data)
            setattr(config, f"{name}_type", types.Q4_0)
        config.hidden_type = types.BF16
        config.m_block, config.group_min_len, config.group_max_len = 32, 10, config.max_len  # as its wrapper has them
        return self._extension.moe.MOE, sources

    def _forward(self, draw: Draw) -> tuple[Callable[[], None], NDArray[np.uint16]]:
        """A function that computes one step, and the array that it writes: bfloat16 as uint16 [tokens, hidden]."""
        count = np.array([len(draw.routes)], np.int32)
        scores = np.full(draw.routes.shape, 1 / self._top_k, np.float32)
        out = np.zeros_like(draw.hidden)
        arrays = (draw.routes, scores, draw.hidden, out)

        def forward() -> None:
            pointers = [array.ctypes.data for array in arrays]
            self._run(self._moe.forward_task(count.ctypes.data, self._top_k, *pointers, False))

        return forward, out

    def _run(self, task: Any) -> None:
        self._pool.submit(task)
        self._pool.sync()


def main() -> None:
    """`python -m benchmarks.rivals.kt_kernel HIDDEN NEURONS EXPERTS TOP_K BITS THREADS TOKENS`: the worker."""

    def start() -> tuple[dict[str, Any], Handlers]:
        layer = Layer(*(int(number) for number in sys.argv[1:]))
        return {"version": available(), "backend": layer.backend}, {"layer_s": layer.layer_s}

    serve(start)


if __name__ == "__main__":
    main()
