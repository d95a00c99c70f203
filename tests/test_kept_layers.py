"""A load that has to quantize and is ended, at whatever moment, goes on from the layers that it had finished."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from families import save_model
from moestro import load
from moestro.cli.main import app
from moestro.loading import plain
from moestro.loading.packed import cache
from moestro.loading.packed.read import verify_packed
from moestro.loading.packed.run_file import RunFile

RUNNER = CliRunner()
LAYERS = 4
EMULATED: dict[str, Any] = {"device": "emulated", "gpu_memory": "32MiB", "policy": "lru", "link": None}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral") / "source"
    save_model("mixtral", folder, {"num_hidden_layers": LAYERS})
    return folder


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers that were quantized, by name."""
    seen = list[str]()
    fill = plain._fill_layer

    def noted(module: str, *rest: Any) -> None:
        fill(module, *rest)
        seen.append(module)

    monkeypatch.setattr(plain, "_fill_layer", noted)
    return seen


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 20)[None]).logits  # type: ignore[no-any-return]


def names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


def end_after(layers: int, monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> None:
    """Run something, with Ctrl-C once so many layers are quantized."""
    fill, done = plain._fill_layer, list[str]()

    def ended(module: str, *rest: Any) -> None:
        if len(done) == layers:
            raise KeyboardInterrupt
        fill(module, *rest)
        done.append(module)

    with monkeypatch.context() as patch:
        patch.setattr(plain, "_fill_layer", ended)
        with pytest.raises(KeyboardInterrupt):
            run()


@pytest.mark.sample(4)
@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 8}, {"expert_bits": 2, **EMULATED}], ids=str)
@pytest.mark.parametrize("layers", range(LAYERS))
def test_a_load_goes_on_where_it_was_ended(
    layers: int, options: dict[str, Any], source: Path, filled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = logits(load(str(source), threads=2, cache=False, **options))
    filled.clear()
    end_after(layers, monkeypatch, lambda: load(str(source), threads=2, **options))
    assert [one.is_unfinished for one in cache.entries()] == [True]
    assert len(filled) == layers
    assert torch.equal(logits(load(str(source), threads=2, **options)), wanted)
    assert len(filled) == LAYERS
    (entry,) = cache.entries()
    assert names(entry.folder.parent) == [entry.folder.name]
    verify_packed(entry.folder, 2)
    assert torch.equal(logits(load(str(source), threads=2, **options)), wanted)
    assert len(filled) == LAYERS


def test_a_packed_folder_goes_on_where_it_was_ended(
    source: Path, filled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.utils.are_progress_bars_disabled", lambda: False)

    def pack(*options: str) -> Any:
        return RUNNER.invoke(
            app, ["pack", str(source), "-o", str(tmp_path / "model"), *options], catch_exceptions=False
        )

    end_after(3, monkeypatch, lambda: plain_pack(source, tmp_path / "model", expert_bits=3))
    said = capsys.readouterr().err
    assert f"3 of {LAYERS} layers are quantized and kept in {tmp_path / '.model.layers'}; the same command goes" in said
    assert names(tmp_path) == [".model.layers"]
    assert pack("--expert-bits", "3").exit_code == 0
    assert len(filled) == LAYERS
    assert names(tmp_path) == ["model"]
    verify_packed(tmp_path / "model", 2)
    filled.clear()
    end_after(3, monkeypatch, lambda: plain_pack(source, tmp_path / "model", expert_bits=3))
    filled.clear()
    assert pack("--expert-bits", "2").exit_code == 0  # what is kept is of other bits
    assert len(filled) == LAYERS
    assert names(tmp_path) == ["model"]
    verify_packed(tmp_path / "model", 2)


def plain_pack(source: Path, target: Path, **options: Any) -> None:
    from moestro.loading.pack import pack
    from moestro.planning.options import ModelOptions, Options

    pack(str(source), target, ModelOptions(), Options(**options))


@pytest.mark.sample(2)
@pytest.mark.parametrize("damage", ["flipped", "cut short", "emptied", "removed"])
def test_what_is_not_whole_is_quantized_again(
    damage: str, source: Path, filled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any file, each at a random place."""
    wanted = logits(load(str(source), threads=2, bits=4, cache=False))
    for number in range(6):
        end_after(3, monkeypatch, lambda: load(str(source), threads=2, bits=4))
        filled.clear()
        (entry,) = cache.entries()
        path = sorted(entry.folder.iterdir())[number]
        data = bytearray(path.read_bytes())
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        if damage == "removed":
            path.unlink()
        else:
            path.write_bytes({"flipped": data, "emptied": b""}.get(damage, data[: random.randrange(len(data))]))
        assert torch.equal(logits(load(str(source), threads=2, bits=4)), wanted)
        assert len(filled) in ((1, 2) if path.suffix == ".json" else (2,))  # a space of a record may be another
        cache.remove(cache.entries()[0].folder)


def test_layers_of_another_choice_or_checkpoint_are_not_used(
    source: Path, filled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    end_after(3, monkeypatch, lambda: load(str(source), threads=2, bits=4))
    for options in ({"bits": 3}, {"bits": 4, "dtype": "bfloat16"}, {"bits": 4, "dense_bits": 16}):
        filled.clear()
        load(str(source), threads=2, **options)
        assert len(filled) == LAYERS, options
    os.utime(source / "model.safetensors")
    filled.clear()
    load(str(source), threads=2, bits=4)
    assert len(filled) == LAYERS
    assert [one.is_unfinished for one in cache.entries()].count(True) == 1
    listed = RUNNER.invoke(app, ["cache"]).stdout
    assert "unfinished" in listed
    assert "unfinished" in RUNNER.invoke(app, ["cache", "verify"]).stdout
    assert RUNNER.invoke(app, ["cache", "remove", "--all"]).exit_code == 0
    assert cache.entries() == []


@pytest.mark.parametrize("at", [0, 5])
def test_a_full_disk_is_a_line_of_the_log(
    at: int, source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = logits(load(str(source), threads=2, bits=8, cache=False))
    write, done = RunFile.write, list[int]()

    def full(self: RunFile, tensor: torch.Tensor) -> Any:
        if len(done) >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done.append(tensor.nbytes)
        return write(self, tensor)

    monkeypatch.setattr(RunFile, "write", full)
    assert torch.equal(logits(load(str(source), threads=2, bits=8)), wanted)
    assert caplog.text.count("layers are no longer kept") == 1
    assert caplog.text.count("not kept in the cache: ") == 1


def test_one_process_at_a_time_keeps_layers(source: Path, filled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one loads all the same, and neither changes what the other made."""
    wanted = logits(load(str(source), threads=2, bits=4, cache=False))
    filled.clear()
    fill = plain._fill_layer

    def other_first(*given: Any) -> None:
        monkeypatch.setattr(plain, "_fill_layer", fill)
        assert torch.equal(logits(load(str(source), threads=2, bits=4)), wanted)
        fill(*given)

    monkeypatch.setattr(plain, "_fill_layer", other_first)
    assert torch.equal(logits(load(str(source), threads=2, bits=4)), wanted)
    (entry,) = cache.entries()
    assert names(entry.folder.parent) == [entry.folder.name]
    verify_packed(entry.folder, 2)


def _killed(source: Path, target: Path, rounds: int) -> None:
    """Kill a process that packs at random moments, until one comes to its end."""
    command = [sys.executable, "-m", "moestro.cli.main", "pack", str(source), "-o", str(target), "--bits", "4"]
    began_s = time.perf_counter()
    subprocess.run([*command[:-3], str(target.with_name("wanted")), *command[-2:]], check=True, capture_output=True)
    took_s = time.perf_counter() - began_s
    for _ in range(rounds):
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as child:
            time.sleep(took_s * random.uniform(0.5, 1.1))  # the first half are imports
            child.send_signal(signal.SIGKILL)
        if target.exists():
            verify_packed(target, 1)
    subprocess.run(command, check=True, capture_output=True)
    for path in target.iterdir():
        assert path.read_bytes() == (target.with_name("wanted") / path.name).read_bytes(), path
    assert names(target.parent) == [target.name, "wanted"]


@pytest.mark.long
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill here")
def test_killed_fifty_times(source: Path, tmp_path: Path) -> None:
    _killed(source, tmp_path / "model", 50)
