"""Loading takes little more memory than the packed experts; `moestro bench load` shows it at 2 GiB."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig

from moestro import load
from moestro.bench.loading import LoadReport, measure_load, write_mixtral
from moestro.cli import main as cli


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="watches /proc")
def test_peak_memory_of_loading() -> None:
    report = measure_load(600 * 2**20)
    assert report.packed_bytes >= 600 * 2**20
    assert report.peak_bytes >= 0.98 * report.packed_bytes, "the store is not in what was watched"
    assert report.within_limit, report
    assert report.samples > 20
    assert set(report.load) == {"imports_s", "reading_s", "packing_s", "warm_up_s"}
    assert all(value > 0 for value in report.load.values())
    assert report.load["packing_s"] < sum(report.load.values()) - report.load["imports_s"] <= report.seconds


def test_the_report_tells_when_the_limit_is_exceeded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fat = LoadReport(packed_bytes=1000, layer_bytes=100, peak_bytes=1500, samples=3, seconds=0.1)
    assert fat.limit_bytes == 1200
    assert not fat.within_limit
    fat.print()
    assert "EXCEEDED" in capsys.readouterr().out
    monkeypatch.setattr("moestro.bench.loading.measure_load", lambda size: fat)
    monkeypatch.setattr(sys, "argv", ["moestro", "bench", "load", "--json"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    assert json.loads(capsys.readouterr().out)["within_limit"] is False


def test_a_checkpoint_as_its_authors_write_it_loads(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, dtype="float32"
    )
    config.num_key_value_heads = 2
    write_mixtral(tmp_path, config)
    model = load(str(tmp_path), threads=1)
    with torch.no_grad():
        assert model(torch.arange(5)[None]).logits.isfinite().all()
