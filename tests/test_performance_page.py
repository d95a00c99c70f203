"""The table that benchmarks/performance.py writes into its page, from results as `moestro bench decode` makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import performance
from moestro.bench.batches import BatchFigures
from moestro.bench.decode import DecodeReport


def test_a_run_is_kept_and_each_length_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that do not fit stay, and what stands around the table does too."""
    page = tmp_path / "page.md"
    page.write_text(f"Before\n{performance.BEGIN}\nold\n{performance.END}\nafter\n")
    asked: dict[str, Any] = {}

    def measured(shape: str, bits: int, **given: Any) -> DecodeReport:
        asked.update(given)
        batches = [BatchFigures(b, c, 10.0 * b, 20.0 * b) for c in performance.CACHED for b in performance.BATCHES]
        batches[-1] = BatchFigures(16, performance.CACHED[-1], None, None)
        return DecodeReport(shape, given["layers"], given["threads"], "avx2", 33.3, 1.0, (), {}, tuple(batches))

    monkeypatch.setattr(performance, "RESULTS", tmp_path)
    monkeypatch.setattr(performance, "PAGE", page)
    monkeypatch.setattr(performance, "measure_decode", measured)
    performance.measure(performance.Model("tiny", 2), 4, threads=1, rounds=1)
    performance.write_table()
    assert (asked["batches"], asked["cached"], asked["layers"]) == (performance.BATCHES, performance.CACHED, 2)
    lines = page.read_text().splitlines()
    rows = [line for line in lines if line.startswith("| tiny, 2 | 4 |")]
    assert [row.count("of") for row in rows] == [5, 5, 4]
    assert "| 40 of 80 (0.50) |" in rows[0]
    assert rows[-1].endswith("| does not fit |")
    assert (lines[0], lines[-1]) == ("Before", "after")
    assert "old" not in lines
