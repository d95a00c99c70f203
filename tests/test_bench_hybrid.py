"""`moestro bench hybrid` at toy size, and the arithmetic that its ratios are held against."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from moestro.bench.host import measure_host
from moestro.bench.hybrid import POLICIES, HybridRow, _ratios, measure_hybrid
from moestro.errors import RequestError
from moestro.planning.policies import POLICIES as PLANNED

COMPARED = ["layer-streaming", "lru", "fiddler", "moestro"]
ROW = HybridRow("", 10.0, "skewed", {32: 1.0}, 1.0, 63, 0.0, 0, 0.9, 1.0, 0.0, None, 8, 0)


@pytest.mark.long
def test_policies_run_on_one_load() -> None:
    options = ["--shape", "tiny", "--device", "emulated", "--gpu-memory", "3MiB", "--prompt", "8", "--seconds", "60"]
    options += [option for name in COMPARED for option in ("--policy", name)]
    command = [sys.executable, "-m", "moestro.cli.main", "bench", "hybrid", *options, "--decode-tokens", "6"]
    done = subprocess.run([*command, "--link", "5GB/s", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["shape"], report["layers"], report["bits"]) == ("tiny", 4, 16)
    rows = report["rows"]
    assert [row["policy"] for row in rows] == COMPARED * 3
    assert [(row["link_gbps"], row["routing"]) for row in rows[:: len(COMPARED)]] == [
        (None, "skewed"),
        (5.0, "skewed"),
        (None, "uniform"),
    ]
    assert all(row["decode_tok_s"] > 0 and row["decoded"] == 5 and row["host_us"] > 0 for row in rows)
    assert all(list(row["prefill_tok_s"]) == ["8"] for row in rows if row["routing"] == "skewed")
    by_name = {row["policy"]: row for row in rows[: len(COMPARED)]}
    assert by_name["layer-streaming"]["bytes_moved"] > by_name["lru"]["bytes_moved"] > 0
    assert [len(rate) for rate in report["rates"]] == [3, 3]
    assert {ratio["over"] for ratio in report["ratios"]} == {"layer-streaming", "lru", "fiddler"}


def test_ratios_against_arithmetic_by_hand() -> None:
    """Mixtral's 8 experts and top-2; a CPU of 40 GB/s beside a link of 10, so r = 4; 60 % hits."""
    speeds = {"layer-streaming": 0.5, "lru": 2.0, "fiddler": 8.0, "moestro": 10.0}
    rows = [replace(ROW, policy=name, decode_tok_s=speed, hit_rate=0.6) for name, speed in speeds.items()]
    found = {ratio.over: ratio for ratio in _ratios(rows, {10.0: (40.0, 10.0)}, 4.0)}
    assert {ratio.best for ratio in found.values()} == {"moestro"}
    assert found["layer-streaming"].ratio == pytest.approx(20)
    assert found["layer-streaming"].allowed == pytest.approx(4 * 5 / 0.4)
    assert (found["lru"].ratio, found["lru"].allowed) == (pytest.approx(5), pytest.approx(5))
    assert (found["fiddler"].ratio, found["fiddler"].allowed) == (pytest.approx(1.25), pytest.approx(1.25))


def test_what_there_was_no_time_for_is_said() -> None:
    report = measure_hybrid("tiny", device="emulated", gpu_memory="3MiB", prompts=(4,), limit_s=0.0)
    assert not report.rows
    assert report.skipped[0] == "moestro, full link, skewed routing"
    assert len(report.skipped) == 2 * len(POLICIES)


def test_it_needs_a_device_with_a_link() -> None:
    with pytest.raises(RequestError, match="there is no GPU here; leave it out or use device='emulated'"):
        measure_hybrid("tiny", device="cpu", gpu_memory="3MiB", prompts=(8,))


def test_the_hosts_time_is_counted_for_each_policy() -> None:
    """Every policy gets through; hits and copies are what the policy's kind makes of them."""
    report = measure_host("tiny", tokens=3, rounds=2)
    rows = {row.policy: row for row in report.rows}
    assert list(rows) == list(PLANNED)
    assert all(row.us > 0 for row in report.rows)
    assert rows["cpu-only"].hits == rows["cpu-only"].copies == rows["fiddler"].copies == 0
    assert rows["layer-streaming"].copies == pytest.approx(8, abs=1)  # all of a layer, but for those it starts with
    assert rows["lru"].hits + rows["lru"].copies == pytest.approx(2)
    with pytest.raises(RequestError, match="a share of the experts is wanted"):
        measure_host("tiny", slots=1.0)
