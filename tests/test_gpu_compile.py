"""The GPU kernels compile for GPUs that are not here: what the interpreter accepts, the compiler need not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moestro.memory.formats import format_names

pytest.importorskip("triton")

SHARED_BYTES = {
    capability: kib * 1024 for capability, kib in [("7.5", 64), ("8.0", 163), ("8.6", 99), ("8.9", 99), ("9.0", 227)]
}
# Layers as the script takes them, and how tiles are multiplied. Those of 16 columns a scale take most shared memory.
# 40 tokens of an expert have all groups: tiles of 16, of 32 and of 64.
LAYERS = {
    "7.5:int4:fp16:1": {"fma"},
    "7.5:q6_k:fp16:1": {"fma"},
    "8.0:q4_k+q4_k+q6_k:bf16:1": {"mma"},
    "8.0:int4:bf16:40": {"mma"},
    "8.6:q3_k:bf16:1": {"mma"},
    "8.9:fp8:bf16:1": {"mma"},
    "9.0:bf16:bf16:300": {"wgmma"},
    "9.0:mxfp4:bf16:40": {"mma", "wgmma"},
}
# Bytes of a thread that find no register, by the rows of a tile on tensor cores.
MOST_STACK_BYTES = {16: 0, 32: 16, 64: 160, 128: 160}
NAMES = [*format_names(), "int4g16z", "int4g128", "int4g128z", "int6g32z", "int8g128z", "int8row", "int4rowfp32"]
MIXED = ["q4_k+q4_k+q6_k", "q4_k+q6_k+q8_0", "bf16+q5_1+fp16"]


def compiled(layers: list[str], cache: Path) -> list[dict[str, object]]:
    """A line for each kernel of these layers; all of them fit the shared memory that a block of threads has."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_gpu_kernels.py")), *layers],
        env=os.environ | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    too_large = [line for line in lines if line["shared_bytes"] > SHARED_BYTES[line["layer"].split(":")[0]]]
    assert not too_large
    spilled = [
        line for line in lines if line["product"] != "fma" and line["stack_bytes"] > MOST_STACK_BYTES[line["rows"]]
    ]
    assert not spilled
    for layer in layers:
        names = {line["kernel"] for line in lines if line["layer"] == layer}
        assert {"order", "gate_up", "down", "combine", "multiply", "take"} <= names
    return lines


@pytest.mark.sample(2)
@pytest.mark.parametrize("layer", list(LAYERS))
def test_kernels_compile_and_fit(layer: str, tmp_path: Path) -> None:
    kernels = compiled([layer], tmp_path)
    products = {line["product"] for line in kernels if line["kernel"] in ("gate_up", "down", "multiply")}
    assert products == LAYERS[layer]
    if layer.endswith(":40"):
        assert {line["rows"] for line in kernels if line["kernel"] in ("gate_up", "down")} == {16, 32, 64}


@pytest.mark.long
@pytest.mark.parametrize("tokens", [1, 40, 300])
@pytest.mark.parametrize("x", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("capability", list(SHARED_BYTES))
def test_every_format_compiles_for_every_gpu(capability: str, x: str, tokens: int, tmp_path: Path) -> None:
    compiled([f"{capability}:{name}:{x}:{tokens}" for name in NAMES + MIXED], tmp_path)
