"""Compiles the GPU kernels, as a layer step launches them, for a GPU that need not be here; launches nothing.

    python tests/compile_gpu_kernels.py 8.6:int4:fp16:1 9.0:bf16:bf16:300

compiles for compute capability 8.6, int4 weights, float16 hidden states and 1 token of an expert, and so on; and
for down's weights ("q4_k+q4_k+q6_k": gate, up, down) a linear layer and an embedding. Prints a line of JSON a kernel:
how it multiplies ("wgmma", "mma" or, without tensor cores, "fma"), its shared memory, registers and stack.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.pop("TRITON_INTERPRET", None)
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from moestro.compute import gpu
from moestro.compute.cpu import Matrix
from moestro.compute.experts import ExpertMath
from moestro.compute.gpu import kernel_of, plan_on_device, run_grouped
from moestro.memory.formats import ExpertShape, expert_format_named

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class _Driver:
    """As much of a driver as the compiler asks for."""

    def __init__(self, capability: str) -> None:
        self._number = int(capability.replace(".", ""))

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._number, 32)

    def get_current_device(self) -> int:
        return self._number  # what was compiled is kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack, where the compiler puts what finds no register."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        told = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    registers, stack_bytes = map(int, re.search(r"REG:(\d+) STACK:(\d+)", told).groups())
    return {"registers": registers, "stack_bytes": stack_bytes}


def compile_instead(compiled: list[dict[str, object]]) -> None:
    """From now on kernels are compiled and listed, and not launched."""
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        found = run(self, *args, grid=grid, warmup=True, **kwargs)
        product = next((name for name in ("wgmma", "mma") if f"{name}." in found.asm["ptx"]), "fma")
        line = {"kernel": self.fn.__name__, "shared_bytes": found.metadata.shared, "product": product}
        compiled.append(line | {"rows": kwargs.get("M")} | resources(found.asm["cubin"]))
        return found

    JITFunction.run = compile_only


def pretend(capability: str) -> None:
    """That GPU is the device, and the tensors, which are on the host, are on it."""
    triton.runtime.driver.set_active(_Driver(capability))
    has_cores = float(capability) >= 8
    gpu.kernel.has_tensor_cores = gpu.linear.has_tensor_cores = lambda device: has_cores
    gpu.linear._spec.cache_clear()


def compile_linear(name: str, x: str, tokens: int, rows: int = 256, columns: int = 512) -> None:
    """All kernels of a linear layer and an embedding."""
    fmt = expert_format_named(name).matrices["down"]
    packed = torch.zeros(fmt.matrix_bytes(rows, columns), dtype=torch.uint8)
    matrix = Matrix(packed, fmt, rows, columns, torch.zeros(rows))
    gpu.run_linear(matrix, torch.zeros(tokens, columns, dtype=DTYPES[x]))
    gpu.look_up(matrix, torch.zeros(tokens, dtype=torch.int64), DTYPES[x])


def compile_layer(name: str, x: str, tokens: int, hidden: int = 256, neurons: int = 256) -> None:
    """All kernels of a layer of one expert."""
    math = ExpertMath(
        ExpertShape(hidden, neurons, has_bias=True), expert_format_named(name), lambda g, u: g * torch.sigmoid(g) * u
    )
    kernel = kernel_of(math, DTYPES[x], torch.device("cpu"))
    assert kernel is not None
    pool = torch.zeros(1, math.format.expert_bytes(math.shape), dtype=torch.uint8)
    states = torch.zeros(tokens, hidden, dtype=DTYPES[x])
    index, weights = torch.zeros(tokens, 1, dtype=torch.int32), torch.ones(tokens, 1)
    table, counts = torch.ones(1, 3, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    plan = plan_on_device(kernel, index, weights, table, counts=counts)
    run_grouped(kernel, pool, plan, states, states.float())


if __name__ == "__main__":
    lines: list[dict[str, object]] = []
    compile_instead(lines)
    for layer in sys.argv[1:]:
        already = len(lines)
        *names, count = layer.split(":")
        pretend(names[0])
        compile_layer(*names[1:], tokens=int(count))
        compile_linear(*names[1:], tokens=int(count))
        for line in lines[already:]:
            print(json.dumps({"layer": layer} | line))
