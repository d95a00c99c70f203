"""Each command's `--json`: its own keys stay, and behind them stands by what they were made (docs/json.md)."""

from __future__ import annotations

import getpass
import json
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from commands import EVERY
from moestro.cli import main as cli
from moestro.cli.envelope import SCHEMA
from moestro.simulate.trace import Trace

KEYS = ("schema", "versions", "kernel_level", "model_revision", "options")


class Measured:
    """What a benchmark would return."""

    within_limit = True

    def to_json(self) -> dict[str, Any]:
        return {"measured": 7}


# What is typed, and the function that measures, which is not called. Options that are looked for in the line follow.
COMMANDS: dict[str, tuple[list[str], str | None, dict[str, Any]]] = {
    "run": (
        ["demo", "Once", "-n", "2", "--bits", "16", "--device", "cpu", "-t", "1", "--ram", "2GiB"],
        None,
        {
            "bits": 16,
            "threads": 1,
            "device": "cpu",
            "ram": 2 << 30,
            "policy": "moestro",
            "dtype": "bfloat16",
            "temperature": 0.7,
            "top_p": 0.95,
            "top_k": 50,
            "min_p": None,
            "num_beams": 1,
            "context": 512,
        },
    ),
    "trace": (
        ["demo", "--text", "TEXT", "--tokens", "2", "--prompt-tokens", "8", "--decode-tokens", "2"],
        None,
        {"tokens": 2, "prompt_tokens": 8, "policy": "moestro"},
    ),
    "replay": (["TRACE", "--policy", "lru"], None, {"policy": "lru", "machine": "rtx4090", "bits": None}),
    "plan": (["demo", "--gpu-memory", "1GiB", "--machine", "rtx4090"], None, {"machine": "rtx4090", "device": "cuda"}),
    "machine": (["--list"], None, {"anew": False}),
    "inspect": (["demo"], None, {"revision": None}),
    "pack": (["demo", "-o", "OUT", "--bits", "4"], None, {"bits": 4, "output": "OUT"}),
    "doctor": ([], None, {"report": True}),
    "cache": ([], None, {}),
    "bench load": (["--size", "1GiB"], "moestro.bench.loading.measure_load", {"size": "1GiB"}),
    "bench kernels": (["-t", "1"], "moestro.bench.kernels.measure_kernels", {"threads": 1, "full": False}),
    "bench plan": (["--rounds", "2"], "moestro.bench.plan.measure_plan", {"rounds": 2, "anew": False}),
    "bench serve": (["demo", "--rounds", "2"], "moestro.bench.serve.measure_serve", {"rounds": 2, "clients": "1,4,16"}),
    "bench attention": (["--rounds", "2"], "moestro.bench.attention.measure_attention", {"rounds": 2}),
    "bench decode": (["--shape", "tiny"], "moestro.bench.decode.measure_decode", {"shape": "tiny", "rounds": 5}),
    "bench policies": (["demo", "--text", "TEXT"], "moestro.bench.policies.compare_by_replay", {"tokens": 512}),
    "bench hybrid": (["--link", "12GB/s"], "moestro.bench.hybrid.measure_hybrid", {"gpu_memory": 24 << 30}),
    "bench host": (["--slots", "0.5"], "moestro.bench.host.measure_host", {"slots": 0.5}),
    "bench recall": (["demo", "--text", "TEXT"], "moestro.bench.recall.measure_recall", {"tokens": 1024}),
    "bench quantization": (["demo"], "moestro.bench.quantization.measure_quantization", {"window": 256}),
}


def test_each_command_with_json_is_here() -> None:
    with_json = {" ".join(names) for names, one in EVERY.items() if any("--json" in each.opts for each in one.params)}
    assert with_json == {*COMMANDS}


def _call(monkeypatch: pytest.MonkeyPatch, *typed: str) -> None:
    monkeypatch.setattr(sys, "argv", ["moestro", *typed])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code


@pytest.mark.parametrize("command", COMMANDS)
def test_the_last_line_says_by_what_it_was_made(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], traced: Path
) -> None:
    typed, measures, options = COMMANDS[command]
    if measures is not None:
        monkeypatch.setattr(measures, lambda *_, **__: Measured())
        monkeypatch.setattr("moestro.bench.policies.Reading.record", lambda *_: None)
    places = {"TEXT": __file__, "TRACE": str(traced), "OUT": str(tmp_path / "out")}
    more = ["--report"] if command == "doctor" else []
    _call(monkeypatch, *command.split(), *(places.get(one, one) for one in typed), *more, "--json")
    printed = capsys.readouterr()
    line = json.loads(printed.out.splitlines()[-1])
    assert [*line][-len(KEYS) :] == [*KEYS]
    assert printed.out.count("\n") == 1
    assert line["schema"] == SCHEMA
    assert line["versions"] == {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("moestro", "torch", "transformers")},
    }
    assert line["kernel_level"] in ("torch", "scalar", "avx2", "avx512", "avx512_vnni", "amx", "neon")
    assert line["model_revision"] is None
    expected = {name: places.get(value, value) if isinstance(value, str) else value for name, value in options.items()}
    assert {name: line["options"].get(name) for name in expected} == expected
    assert not {"json", "as_json", "model"} & line["options"].keys()
    if measures is not None:
        assert line["measured"] == 7
    assert "%" not in printed.err
    assert "it/s" not in printed.err


@pytest.mark.parametrize("command", [name for name, (_, measures, _) in COMMANDS.items() if measures])
def test_help_shows_the_defaults_that_are_measured(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed, measures, _ = COMMANDS[command]
    received: dict[str, Any] = {}
    monkeypatch.setattr(measures, lambda *_, **given: received.update(given) or Measured())
    monkeypatch.setattr("moestro.bench.policies.Reading.record", lambda *_: None)
    _call(monkeypatch, *command.split(), *({"TEXT": __file__}.get(one, one) for one in typed), "--json")
    compared = set()
    for one in EVERY[*command.split()].params:
        given, says = received.get(one.name), re.search(r"\[default: ([\w., -]+)\]", one.help or "")
        if given in (None, (), []) or {*one.opts} & {*typed} or not (says or one.show_default):
            continue
        values = given if isinstance(given, list | tuple) else [given]
        shown = says[1].split(", ") if says else one.default if isinstance(one.default, list | tuple) else [one.default]
        if one.name not in ("layers", "threads", "gpu_memory"):  # counted or looked up, and one that has a unit
            words = (",".join(map(str, of)).replace("inf", "none") for of in (values, shown))
            assert len({*words}) == 1, one.name
            compared.add(one.name)
    assert bool(compared) == (command not in ("bench load", "bench policies", "bench recall")), compared
    assert "shapes" in compared or "shapes" not in received


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of the demo."""
    from moestro import load
    from moestro.text.tracing import listening

    model, path = load("demo", device="cpu", threads=1), tmp_path_factory.mktemp("trace") / "demo.trace"
    import torch

    with torch.no_grad(), listening(model) as listener:
        model(torch.arange(3, 20)[None])
    listener.trace(model, "demo", "text").save(path)
    model.moestro.close()
    assert Trace.load(path).passes
    return path


def test_options_are_those_of_the_call_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _call(monkeypatch, "plan", "--shape", "tiny", "--bits", "4", "--json")
    _call(monkeypatch, "inspect", "demo", "--json")
    first, second = (json.loads(line)["options"] for line in capsys.readouterr().out.splitlines())
    assert (first["shape"], first["bits"]) == ("tiny", 4)
    assert second == {"revision": None}


@pytest.mark.parametrize("as_json", [False, True])
def test_a_report_says_nothing_of_its_user(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOESTRO_CACHE", "secret place")
    monkeypatch.setenv("MOESTRO_LOG", "error")
    monkeypatch.setenv("MOESTRO_OTHER", "word")
    monkeypatch.setattr(platform, "node", lambda: "hostname1234")
    _call(monkeypatch, "doctor", "--report", *(["--json"] if as_json else []))
    out = capsys.readouterr().out
    names = ("moestro", "torch", "transformers", "python", "system", "cpu features", "expert kernels", "ram", "gpu")
    found = json.loads(out) if as_json else dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines())
    assert {*names, "cores", "huggingface_hub"} <= found.keys()
    assert found["settings"] == "MOESTRO_CACHE is set, MOESTRO_LOG=error, MOESTRO_OTHER is set"
    hidden = [
        str(Path.home()),
        os.getcwd(),
        os.uname().nodename,
        getpass.getuser(),
        sys.prefix,
        "hostname1234",
        "secret",
    ]
    assert not [one for one in hidden if re.search(rf"(?<!\w){re.escape(one)}(?!\w)", out)]
    assert "/" not in out.replace("+cpu", "")


def test_a_report_where_a_level_does_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOESTRO_LEVEL", "/srv/level")
    _call(monkeypatch, "doctor", "--report")
    out = capsys.readouterr().out
    assert "MOESTRO_LEVEL is set" in out
    assert "/srv" not in out
