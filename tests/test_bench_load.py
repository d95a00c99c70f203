"""Loading takes little more memory than the packed experts; `moestro bench load` shows it at 2 GiB."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig

from moestro import load
from moestro.bench.loading import LoadReport, measure_load, until_ended, write_mixtral
from moestro.cli import main as cli
from moestro.errors import BudgetError, RequestError


@pytest.mark.long
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


def test_what_does_not_fit_is_refused_before_a_byte_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moestro.bench.loading.write_mixtral", lambda *_: pytest.fail("it was written"))
    with pytest.raises(BudgetError, match=r"loading that checkpoint needs .* give a smaller --size"):
        measure_load(900 * 2**40)
    monkeypatch.setattr("moestro.bench.loading.available_ram_bytes", lambda: 2**60)
    with pytest.raises(RequestError, match=r"of 900.0 TiB does not fit .*; give a smaller --size, or .* TMPDIR"):
        measure_load(900 * 2**40)


def test_a_signal_to_end_removes_what_was_written(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def write() -> None:
        with until_ended(), tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            (Path(folder) / "weights").write_bytes(b"some")
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as end:
        write()
    assert end.value.code == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


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
