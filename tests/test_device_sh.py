"""`benchmarks/device.sh` at toy size from end to end, and what its steps do when something goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import device
from benchmarks.rates import Rates
from moestro.bench import machine_card, process

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "device.sh"


def device_sh(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), "--python", sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)


@pytest.mark.long
def test_a_toy_report_has_card_table_and_json(tmp_path: Path) -> None:
    done = device_sh("--toy", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("CPU", "RAM", "GPU", "commit", "tests", "DRAM read", "cudaHostRegister", "run tiny"):
        assert words in done.stdout
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("device-")
    assert path.name.endswith("-toy.json")
    text = path.read_text()
    assert str(ROOT) not in text
    report = json.loads(text)
    assert report["toy"]
    assert report["machine"]["torch"]
    assert report["tests"]["ok"]
    assert report["rates"]["ok"]
    names = set(Rates.__dataclass_fields__)
    assert Rates.from_json(json.dumps({key: report["rates"][key] for key in names})).dram_read_gbps > 0
    (run,) = report["runs"]
    assert run["ok"], run
    assert run["shape"] == "tiny"
    assert run["prefill_tok_s"] > 0
    assert run["decode_tok_s"] > 0
    assert run["ttft_s"] > 0
    (hybrid,) = report["hybrid"]
    assert hybrid["ok"], hybrid
    assert {row["policy"] for row in hybrid["rows"]} >= {"layer-streaming", "lru", "fiddler", "moestro"}
    assert "moestro over" in done.stdout or "over lru" in done.stdout
    if report["machine"]["gpu"] is None:
        assert "no CUDA device" in done.stdout
        assert report["rates"]["link_h2d_gbps"] is None


def test_unknown_options_are_refused(tmp_path: Path) -> None:
    done = device_sh("--toys", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "--toys" in done.stderr
    assert device_sh("--out").returncode == 2


@pytest.mark.parametrize(
    ("ram_gib", "shape"), [(128, "mixtral-8x7b"), (96, "qwen3-30b-a3b"), (24, "olmoe-1b-7b"), (8, "tiny")]
)
def test_the_largest_shape_that_fits(ram_gib: int, shape: str) -> None:
    assert device.choose_shape(ram_gib << 30) == shape


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("Intel(R) Xeon(R) CPU @ 2.00GHz", "intel-xeon"),
        ("AMD EPYC 9654 96-Core Processor", "amd-epyc-9654-96-core-processor"),
        ("", "unknown"),
    ],
)
def test_a_device_name_becomes_a_file_name(name: str, slug: str) -> None:
    assert machine_card.slug(name) == slug


def test_a_late_step_is_ended_with_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "GRACE_S", 0.2)
    start_s = time.monotonic()
    done = process.finish(["bash", "-c", "trap '' INT; sleep 60 & echo started; wait; wait"], 0.5)
    assert time.monotonic() - start_s < 20
    assert done.out == "started\n"
    assert done.last_words() == "stopped at its limit of 0 s; last: started"


def test_a_failing_suite_is_counted_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_contract.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'arithmetic'\n"
        "@pytest.mark.skip\n"
        "def test_later(): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    tests = device.run_tests(toy=True, limit_s=60)
    assert not tests["ok"]
    assert (tests["passed"], tests["failed"], tests["skipped"]) == (1, 1, 1)
    assert "test_bad" in tests["failures"][0]
    assert "arithmetic" in tests["failures"][0]


@pytest.mark.long
def test_a_late_suite_still_has_its_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_contract.py").write_text(
        "import time\ndef test_good(): pass\ndef test_slow(): time.sleep(60)\n"
    )
    monkeypatch.chdir(tmp_path)
    tests = device.run_tests(toy=True, limit_s=8)
    assert not tests["ok"]
    assert tests["error"].startswith("stopped at its limit of 8 s")
    assert tests["passed"] == 1


def test_mixtral_is_cut_where_ram_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "finish", lambda argv, limit_s: finished(1, "", " ".join(argv)))
    short, enough = (device.run_hybrid(["--shape", "mixtral-8x7b"], gib << 30, 100.0, 60.0) for gib in (90, 128))
    assert short["command"].endswith("--limit-s 33 --layers 24")
    assert enough["command"].endswith("--limit-s 33")
    assert not short["ok"]


def finished(code: int, out: str, err: str = "") -> process.Finished:
    return process.Finished(code=code, out=out, err=err, wall_s=1.0)


@pytest.mark.parametrize(
    ("done", "error"),
    [
        (
            finished(1, "", f"Traceback\n│ {sys.executable}: no such shape │\n╰────╯\n"),
            "python: no such shape",
        ),
        (finished(1, ""), "exit status 1 without a word"),
        (finished(0, "Once upon a time\n"), "its last line of output is no JSON"),
        (finished(0, '{"text": "a", "ttft_s": 1}'), "its JSON lacks prefill_tok_s, decode_tok_s, peak_bytes"),
    ],
)
def test_a_failed_run_says_why(done: Any, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "finish", lambda argv, limit_s: done)
    row = device.run_shape("tiny", 1.0)
    assert not row["ok"]
    assert row["error"] == error
