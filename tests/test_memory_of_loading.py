"""Loading a checkpoint from its mapped files takes its packed experts and little more."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.checkpoints import KINDS, Sizes
from benchmarks.load import SMALL, watch_load

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="watches /proc")


LAYERS = {"q4_k": 8, "bf16": 3, "fp8": 5, "mxfp4": 8, "bf16-fused": 3}


@pytest.mark.parametrize(
    ("kind", "layers"),
    [pytest.param(*one, marks=[pytest.mark.long] if at > 0 else []) for at, one in enumerate(LAYERS.items())],
)
def test_peak_is_the_packed_experts_and_at_most_a_tenth_and_one_layer_more(
    kind: str, layers: int, tmp_path: Path
) -> None:
    if kind == "q4_k":
        pytest.importorskip("gguf")
    sizes = Sizes(layers, experts=16, hidden=1024, neurons=1024)
    small, large = KINDS[kind](tmp_path / "small", SMALL), KINDS[kind](tmp_path / "large", sizes)
    load = watch_load(small, large, threads=2)
    assert load.packed_bytes > 190e6
    assert load.peak_bytes >= 0.98 * load.packed_bytes, "the store is not in what was watched"
    assert load.peak_bytes <= 1.1 * load.packed_bytes + load.layer_bytes, load
