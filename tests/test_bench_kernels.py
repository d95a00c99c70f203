"""`moestro bench kernels` at toy size: limits and rows that can be true, and JSON on the last line."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch

from moestro.bench import kernels
from moestro.bench import report as reports
from moestro.bench.kernels import measure_kernels
from moestro.cli.main import main as cli
from moestro.compute.cpu import CpuExperts, best_level, levels
from moestro.errors import BudgetError, RequestError
from moestro.machine.kernel_rates import plausible_weights
from moestro.machine.probe import last_level_cache_bytes
from moestro.planning.shapes import REAL_SHAPES

TOY_BYTES = 256 * 2**20
AMX_FLOPS = 16  # of a core's bf16 tiles, for each that its two AVX-512 units do: 1,024 and 64 a cycle
BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8.25, "int4": 4.5}  # of a weight
needs_kernels = pytest.mark.skipif(not levels(), reason="built without the kernels: no compiler was there")


def measured_below(share: float, **options: Any) -> Any:
    """A report whose rows stay below a share of their limit, which is low where another process takes the core."""
    for _ in range(3):
        report = measure_kernels(shapes=["qwen3-30b-a3b"], read_bytes=TOY_BYTES, **options)
        if all(0 < row.compute_share < share for row in report.rows):
            return report
    pytest.fail(str(report.rows))


@needs_kernels
def test_rows_and_limits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    report = measured_below(AMX_FLOPS if best_level() == "amx" else 1.2, tokens=[1, 20], rounds=1, threads=2)
    assert report.level == best_level()
    assert report.read_limit_gbps > 0.5
    assert report.fma_limit_gflops > 1
    assert report.integer_limit_gflops > 1
    assert [(row.format, row.tokens) for row in report.rows] == [(f, n) for f in BITS for n in (1, 20)]
    for row in report.rows:
        assert row.gbps > 0
        assert row.gflops == pytest.approx(row.gbps * row.tokens * 16 / BITS[row.format], rel=0.01)
    monkeypatch.setattr(kernels, "measure_kernels", lambda **_: report)
    monkeypatch.setattr(sys, "argv", ["moestro", "bench", "kernels", "--json"])
    with pytest.raises(SystemExit):
        cli()
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"read_limit_gbps", "fma_limit_gflops", "integer_limit_gflops", "rows"} <= printed.keys()
    assert {"shape", "format", "tokens", "gbps", "gflops", "share", "compute_share"} <= printed["rows"][0].keys()
    monkeypatch.setattr(sys, "argv", ["moestro", "bench", "kernels"])
    with pytest.raises(SystemExit):
        cli()
    printed_lines = capsys.readouterr().out
    assert "read limit" in printed_lines
    assert "left out: 4, 16, 256 tokens; --full has them" in printed_lines


@pytest.mark.parametrize(
    ("arguments", "tokens", "rounds"),
    [((), (1, 64), 3), (("--full",), (1, 4, 16, 64, 256), 5), (("--full", "--tokens", "8", "--rounds", "1"), [8], 1)],
)
def test_full_measures_all(
    arguments: tuple[str, ...], tokens: object, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, object]] = []
    report = kernels.KernelReport(1.0, 1.0, 1.0, (), "scalar", 1)
    monkeypatch.setattr(kernels, "measure_kernels", lambda **options: asked.append(options) or report)
    monkeypatch.setattr(sys, "argv", ["moestro", "bench", "kernels", *arguments])
    with pytest.raises(SystemExit):
        cli()
    asked_for = {
        "shapes": REAL_SHAPES,
        "formats": kernels.MEASURED,
        "tokens": tokens,
        "rounds": rounds,
        "threads": None,
    }
    assert asked == [asked_for]


@needs_kernels
def test_only_the_named_formats_are_measured() -> None:
    report = measure_kernels(
        shapes=["olmoe-1b-7b"], formats=["int4"], tokens=[1], rounds=1, read_bytes=TOY_BYTES, threads=1
    )
    assert [row.format for row in report.rows] == ["int4"]
    with pytest.raises(RequestError, match=r"no format 'q9_z'; there are: .*int4.*q4_k"):
        measure_kernels(formats=["q9_z"])


@pytest.mark.sample(1)
@pytest.mark.parametrize("level", [name for name, usable in levels().items() if usable and name != "amx"])
def test_no_level_without_amx_passes_its_limit(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CpuExperts", lambda threads: CpuExperts(threads, level))
    measured_below(1.2, tokens=[64], rounds=3, threads=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_plausible_in_every_format(dtype: torch.dtype) -> None:
    weights = plausible_weights(2**20).view(dtype).float()
    assert weights.isfinite().all()
    assert (weights.abs() > 1e-3).all()
    assert (weights.abs() < 2).all()
    assert 0.3 < (weights > 0).float().mean() < 0.7


def test_too_little_memory_and_no_kernels_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert last_level_cache_bytes() > 2**20
    monkeypatch.setattr(reports, "levels", dict)
    with pytest.raises(RequestError, match="built without its kernels"):
        measure_kernels()
    monkeypatch.setattr(reports, "levels", lambda: {"scalar": True})
    monkeypatch.setattr(kernels, "available_ram_bytes", lambda: 2**30)
    with pytest.raises(BudgetError, match=r"weights that no cache holds needs .* but 819\.2 MiB are free; free some"):
        measure_kernels()
