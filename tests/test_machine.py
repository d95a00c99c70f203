"""`moestro machine`: what is measured of this machine, kept under what it depends on, and used by plans and loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moestro.bench import plan as bench_plan
from moestro.cli.main import app
from moestro.compute.cores import core_cpus
from moestro.compute.cpu import levels
from moestro.devices.emulated import EmulatedDevice
from moestro.devices.host import HostDevice
from moestro.errors import RequestError
from moestro.loading import measure_machine as measuring
from moestro.loading.measure_machine import machine_of_rates, this_card
from moestro.loading.outlook import place_of
from moestro.loading.step_times import StepTimes
from moestro.machine import kept, probe
from moestro.machine.disk_rate import measure_disk
from moestro.machine.folder import cache_folder
from moestro.machine.kept import identity, keep_machine, kept_machine
from moestro.machine.kernel_rates import KernelRates, measure_kernel_rates
from moestro.machine.link_rates import LinkRates, measure_link
from moestro.machine.measure import this_machine
from moestro.planning.machine_file import machine_values
from moestro.planning.machines import Machine
from moestro.planning.options import Options
from moestro.planning.rates import assumed_rates
from moestro.simulate.forecast import NARROW, WIDE

needs_kernels = pytest.mark.skipif(not levels(), reason="built without the kernels: no compiler was there")
RATES = assumed_rates(33.0, 250.0)
KERNELS = KernelRates(33.0, 250.0, RATES.experts, RATES.wide_experts, RATES.dense, 9.0, 90.0, 2.0, 20.0)
GPU = probe.Gpu("NVIDIA GeForce RTX 4090", "555.42", 24 * 2**30, 20 * 2**30)


def made(gpu: probe.Gpu | None = None) -> Machine:
    link = None if gpu is None else LinkRates(25.0, 20.0, 13.0)
    of_gpu = None if gpu is None else (900.0, 1e5)
    steps = StepTimes(500.0, 30.0, 800.0, 5.0)
    return machine_of_rates("a box", KERNELS, steps, 2.5, link, of_gpu, 0 if gpu is None else gpu.total_bytes)


@pytest.fixture
def here() -> dict[str, Any]:
    """This machine's identity, under which rates are kept."""
    of = identity(len(core_cpus()), None)
    keep_machine(made(), of)
    return of


# ---- what is kept


def test_rates_are_kept_and_found(here: dict[str, Any]) -> None:
    found = kept_machine(here)
    assert found is not None
    assert machine_values(found) == machine_values(made())
    assert [path.name for path in cache_folder().iterdir()] == [kept._file(here).name]


CHANGES = {
    "moestro": ("moestro.machine.kept.metadata.version", lambda *_: "9.9"),
    "cpu": ("moestro.machine.probe.cpu_model", lambda: "another"),
    "cpu_features": ("moestro.machine.probe.cpu_features", lambda: frozenset(("sse",))),
    "cpu_quota": ("moestro.machine.probe.cpu_quota", lambda: 1.5),
    "ram_bytes": ("moestro.machine.probe.total_ram_bytes", lambda: 2**30),
    "ram_limit_bytes": ("moestro.machine.probe.ram_limit_bytes", lambda: 2**29),
    "kernels": ("moestro.machine.kept._kernels", lambda: ["other.so", 3]),
}


@pytest.mark.parametrize("changed", [*CHANGES, "level", "threads", "gpu", "driver"])
def test_what_rates_depend_on_is_looked_at(changed: str, here: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if changed in CHANGES:
        monkeypatch.setattr(*CHANGES[changed])
    if changed == "level":
        monkeypatch.setenv("MOESTRO_LEVEL", "scalar")
    threads = here["threads"] + (changed == "threads")
    of = identity(threads, GPU if changed in ("gpu", "driver") else None)
    if changed == "driver":
        keep_machine(made(GPU), of)
        of = identity(threads, GPU._replace(driver="560.1"))
    assert of[changed] != here[changed]
    assert kept_machine(of) is None
    assert kept_machine(here) is not None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: text.replace('"cpu_gbps": 33.0', '"cpu_gbps": 34.0'),
        lambda text: "[]",
        lambda text: json.dumps({**json.loads(text), "of": {}}),
        lambda text: json.dumps({**json.loads(text), "machine": 3}),
    ],
)
def test_a_damaged_file_is_measured_anew(damage: Any, here: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    path = kept._file(here)
    path.write_text(damage(path.read_text()))
    assert kept_machine(here) is None
    seen = []
    monkeypatch.setattr(measuring, "nvidia_gpu", lambda: None)
    monkeypatch.setattr(measuring, "measure_machine", lambda *given: seen.append(given) or made())
    assert this_card(here["threads"]).text == "a box"
    assert kept_machine(here) is not None
    this_card(here["threads"])
    assert len(seen) == 1
    this_card(here["threads"], anew=True)
    assert len(seen) == 2


def test_a_folder_that_cannot_be_written_is_one_line(
    here: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOESTRO_CACHE", str(tmp_path / "file"))
    with pytest.raises(RequestError, match=r"cannot be kept in .*MOESTRO_CACHE names another folder") as error:
        keep_machine(made(), here)
    assert "\n" not in str(error.value)


# ---- plans and loads use them


def test_a_plan_says_whether_rates_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(*more: str) -> dict[str, Any]:
        done = CliRunner().invoke(app, ["plan", "--shape", "olmoe-1b-7b", "--bits", "4", "--json", *more])
        assert done.exit_code == 0, done.output
        said: dict[str, Any] = json.loads(done.output.splitlines()[-1])
        return said

    def spread(said: dict[str, Any]) -> float:
        low, high = said["decode_tok_s"]
        return (high - low) / (high + low)  # type: ignore[no-any-return]

    monkeypatch.setattr(probe, "nvidia_gpu", lambda: None)
    before = plan()
    assert "`moestro machine` measures them" in before["machine"]["text"]
    assert spread(before) == pytest.approx(WIDE, abs=0.01)
    path = keep_machine(made(), identity(len(core_cpus()), None))
    after = plan()
    assert "RAM 33 GB/s, measured" in after["machine"]["text"]
    assert spread(after) == pytest.approx(NARROW, abs=0.01)
    assert "not measured" in plan("--threads", "1")["machine"]["text"] or len(core_cpus()) == 1
    file = path.with_name("box.json")
    file.write_text(json.dumps(machine_values(made())))
    assert plan("--machine", str(file))["decode_tok_s"] == after["decode_tok_s"]


def test_a_plan_takes_the_card_that_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_machine(made(GPU), identity(len(core_cpus()), GPU))
    monkeypatch.setattr(probe, "nvidia_gpu", lambda: GPU)
    place = place_of(Options())
    assert (place.is_measured, place.free_gpu_bytes) == (True, GPU.free_bytes)
    assert (place.machine.costs.link_gbps, place.machine.costs.cpu_beside_link_gbps) == (25.0, 13.0)
    alone = place_of(Options(device="cpu"))
    assert (alone.is_measured, alone.free_gpu_bytes, alone.machine.costs.gpu_gbps) == (True, None, None)


LINES = [
    "0, GPU-aaa, NVIDIA A, 555.1, 1000, 900",
    "1, GPU-bbb, NVIDIA B, 555.1, 2000, 1900",
]


@pytest.mark.parametrize(
    ("visible", "name"),
    [(None, "NVIDIA A"), ("0", "NVIDIA A"), ("1", "NVIDIA B"), ("1,0", "NVIDIA B"), ("GPU-b", "NVIDIA B"), ("7", None)],
)
def test_the_first_visible_card(visible: str | None, name: str | None) -> None:
    found = probe._chosen_gpu(LINES, visible)
    assert (found and found.name) == name


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_cards_are_not_asked_for(hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe.shutil, "which", lambda name: "/nothing/nvidia-smi")
    monkeypatch.setattr(probe.subprocess, "run", lambda *_, **__: pytest.fail("it was asked"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert probe.nvidia_gpu() is None


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_limits_of_a_control_group(files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert probe._cgroup_quota(tmp_path) == quota


def test_loads_take_what_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = len(core_cpus())
    monkeypatch.setattr("moestro.machine.measure._cpu_rates", lambda *_: pytest.fail("it was measured again"))
    monkeypatch.setattr("moestro.machine.measure.nvidia_gpu", lambda: None)
    keep_machine(made(), identity(threads, None))
    assert this_machine(HostDevice(), threads).costs.cpu_gbps == 33.0
    assert this_machine(EmulatedDevice(link_gbps=7.0), threads).costs.link_gbps == 7.0


# ---- measuring


@needs_kernels
def test_kernels_are_measured_by_format_and_tokens() -> None:
    shares: list[float] = []
    before = torch.get_num_threads()
    counts = (1, 64)
    found = measure_kernel_rates(
        1, formats=("bf16", "q4_k"), counts=counts, turns=1, case_s=0.0, size_bytes=2**26, on_progress=shares.append
    )
    assert torch.get_num_threads() == before
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    for curves, measured in ((found.experts, [1, 64]), (found.wide_experts, [1, 64]), (found.dense, [1])):
        assert [(curve.format, [tokens for tokens, _ in curve.points]) for curve in curves] == [
            ("bf16", measured),
            ("q4_k", measured),
        ]
        assert all(0.01 < gbps < 1000 for curve in curves for _, gbps in curve.points)
    for narrow, wide in zip(found.experts, found.wide_experts, strict=True):
        assert wide.points[0] == narrow.points[0]
        assert wide.points[1] != narrow.points[1]
    rest = (found.cpu_gbps, found.cpu_gflops, found.attention_gbps, found.attention_gflops)
    assert all(1e-3 < rate < 1e5 for rate in (*rest, found.plain_attention_gbps, found.plain_attention_gflops))


def test_without_kernels_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moestro.machine.kernel_rates.levels", dict)
    with pytest.raises(RequestError, match="without its kernels"):
        measure_kernel_rates(1)


@needs_kernels
def test_a_link_is_measured_alone_and_beside_the_cpu() -> None:
    device = EmulatedDevice(link_gbps=2.0)
    found = measure_link(device, 1, n_bytes=2**24)
    device.close()
    assert found is not None
    assert 0.8 < found.link_gbps <= 2.1
    assert 0.5 < found.link_beside_cpu_gbps <= 2.1
    assert found.cpu_beside_link_gbps > 0.1
    assert measure_link(HostDevice(), 1) is None


def test_the_disk_is_read_past_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure_disk(tmp_path / "new", n_bytes=2**25)
    assert found is None or 0.001 < found < 1000
    assert not list((tmp_path / "new").iterdir())
    assert measure_disk(tmp_path, n_bytes=2**60) is None  # no room
    monkeypatch.delattr("os.O_DIRECT", raising=False)
    assert measure_disk(tmp_path, n_bytes=2**25) is None
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


@needs_kernels
@pytest.mark.long
def test_this_machine_is_measured_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    found = measuring.measure_machine(1, lambda what, share: seen.append(what))
    assert {"kernels", "steps", "disk", "link"} == {*seen}
    rates = found.rates
    assert rates is not None
    assert 0 <= rates.step_us < 1e5
    assert 0 < rates.layer_us < rates.plain_layer_us < 1e5
    for curve in rates.experts:
        assert curve.points[0][1] > 1.2 * curve.points[-1][1]


# ---- the commands


def test_the_command_prints_and_writes_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "nvidia_gpu", lambda: None)
    monkeypatch.setattr(measuring, "measure_machine", lambda *_: made())
    done = CliRunner().invoke(app, ["machine"])
    assert done.exit_code == 0, done.output
    for words in (
        "read at 33.0 GB/s",
        "2.50 GB/s",
        "experts of 4096 neurons",
        "hqq4",
        "500 us a step",
    ):
        assert words in done.output
    monkeypatch.setattr(measuring, "measure_machine", lambda *_: pytest.fail("it was measured again"))
    target = tmp_path / "this.json"
    assert CliRunner().invoke(app, ["machine", "-o", str(target)]).exit_code == 0
    said = json.loads(CliRunner().invoke(app, ["machine", "--json"]).output.splitlines()[-1])
    written = json.loads(target.read_text())
    assert written == machine_values(replace(made(), name="this"))
    assert written.items() <= said.items()
    listed = CliRunner().invoke(app, ["machine", "--list"]).output
    assert "rtx4090" in listed
    assert "this machine" in listed


def test_a_report_of_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each cell's figures beside what was predicted from the card; a run that is as predicted is within."""
    wrong = {"mixtral-8x7b": 1.3}

    class Worker:
        """Runs three turns; in the second it is ten times as slow."""

        def __init__(self, engine: str, shape: str, *, bits: int, layers: int, threads: int) -> None:
            said = bench_plan.predict(shape, bits, layers, made())
            self._tok_s = {what: tok_s / wrong.get(shape, 1.1) for what, tok_s in said.items()}
            self._turns = 0

        def __enter__(self) -> Worker:
            return self

        def __exit__(self, *_: object) -> None:
            assert self._turns == 3

        def prefill_s(self, tokens: int) -> float:
            self._turns += tokens == bench_plan.PROMPTS[0]  # with which a turn begins
            return tokens / self._now(f"prefill {tokens}")

        def decode_s(self, context: int, tokens: int) -> float:
            return 1 / self._now("decode")

        def _now(self, what: str) -> float:
            return self._tok_s[what] / (10 if self._turns == 2 else 1)

    monkeypatch.setattr(bench_plan, "ModelWorker", Worker)
    monkeypatch.setattr(bench_plan, "check_kernels", lambda: None)
    monkeypatch.setattr(bench_plan, "this_card", lambda *_, **__: made())
    report = bench_plan.measure_plan(bits=(8, 4), threads=1)
    assert len(report.rows) == 4 * 2 * 3
    assert len(report.read_gbps) == len(report.machines) == 1
    assert report.within == {"decode": [6, 8], "prefill": [12, 16], "cells": [6, 8]}
    assert report.worst == pytest.approx(0.3)
    assert all(row.error == pytest.approx(0.1) for row in report.rows if row.shape == "olmoe-1b-7b")
    assert all(row.errors[1] == pytest.approx(10 * (1 + row.errors[0]) - 1) for row in report.rows)
    assert all(row.predicted_tok_s / row.measured_tok_s - 1 == row.error for row in report.rows)
    report.print()
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(bench_plan, "measure_cpu", lambda threads, formats: asked.append(formats) or made())
    monkeypatch.setattr(bench_plan, "this_card", lambda *_, **__: pytest.fail("rates were kept"))
    again = bench_plan.measure_plan(shapes=("olmoe-1b-7b",), bits=(8, 4), threads=1, anew=True)
    assert asked == [("bf16", "int8")] * 3 + [("bf16", "hqq4")] * 3
    assert len(again.machines) == 2
    assert len(again.read_gbps) == 6
    with pytest.raises(RequestError, match="--bits 5: there are"):
        CliRunner().invoke(app, ["bench", "plan", "--bits", "5"], catch_exceptions=False)
