"""`moestro bench attention` at toy size: rows that can be true, JSON, and one line for bad requests."""

from __future__ import annotations

import json
import sys

import pytest

from moestro.bench import attention
from moestro.bench.attention import Heads, heads_of, measure_attention
from moestro.cli.main import main as cli
from moestro.compute.cpu import best_level, levels
from moestro.errors import RequestError

needs_kernels = pytest.mark.skipif(not levels(), reason="built without the kernels: no compiler was there")


@needs_kernels
def test_rows_and_limits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(attention, "CALL_S", 0.01)
    report = measure_attention(
        shapes=["olmoe-1b-7b"], dtypes=["bf16"], cached=[300], queries=[1, 40], rounds=1, memory_bytes=2**26, threads=1
    )
    assert report.level == best_level()
    one, prompt = report.rows
    assert (one.queries, one.torch_gflops, prompt.queries) == (1, None, 40)
    assert prompt.torch_gflops is not None
    cache_bytes = 2 * 16 * 300 * 128 * 2
    for row, seen in ((one, 300), (prompt, 40 * 260 + 820)):
        assert row.gflops == pytest.approx(row.gbps * 4 * 16 * 128 * seen / cache_bytes, rel=1e-6)
        assert 0 < row.share < 1.2
    monkeypatch.setattr(attention, "measure_attention", lambda **_: report)
    for arguments in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["moestro", "bench", "attention", *arguments])
        with pytest.raises(SystemExit):
            cli()
        printed = capsys.readouterr().out
    assert len(json.loads(printed.splitlines()[-1])["rows"]) == 2


@needs_kernels
def test_what_cannot_be_measured_is_said() -> None:
    assert heads_of("qwen3-30b-a3b") == Heads(32, 4, 128)
    with pytest.raises(RequestError, match="--kv-dtype int8: no cache is of that; there are: "):
        measure_attention(dtypes=["int8"])
    with pytest.raises(RequestError, match="17 queries are more than the 16 cached tokens"):
        measure_attention(cached=[16], queries=[17])
