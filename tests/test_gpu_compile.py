"""The GPU kernels compile for GPUs that are not here: what the interpreter accepts, the compiler need not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Layers as the script takes them: the shared memory that a block has there, and how tiles are multiplied.
LAYERS = {
    "7.5:int4:fp16:1": (64 * 1024, "fma"),
    "8.6:int4:bf16:1": (99 * 1024, "mma"),
    "8.6:int4:bf16:300": (99 * 1024, "mma"),
    "9.0:bf16:bf16:300": (227 * 1024, "wgmma"),
}


def test_kernels_compile_and_fit(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_gpu_kernels.py")), *LAYERS],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    for layer, (shared_bytes, product) in LAYERS.items():
        kernels = [line for line in compiled if line["layer"] == layer]
        assert {"order", "gate_up", "down", "combine"} <= {line["kernel"] for line in kernels}
        assert all(line["shared_bytes"] <= shared_bytes for line in kernels)
        assert {line["product"] for line in kernels if line["kernel"] in ("gate_up", "down")} == {product}
