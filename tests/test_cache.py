"""The cache of quantized models: it gives what was quantized, and what is stale or damaged is made anew."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from families import FAMILIES, build_model
from moestro import MoestroError, load
from moestro.cli.main import app
from moestro.loading import cached
from moestro.loading.packed import cache
from moestro.loading.packed.manifest import MANIFEST, VERSION

RUNNER = CliRunner()
EMULATED: dict[str, Any] = {"device": "emulated", "gpu_memory": "32MiB", "policy": "lru", "link": None}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    build_model(next(family for family in FAMILIES if family.name == "mixtral")).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The entries that were loaded."""
    seen = list[Path]()

    def noted(folder: Any, *rest: Any) -> Any:
        made = load_packed(folder, *rest)
        seen.append(folder.folder)
        return made

    load_packed = cached.load_packed
    monkeypatch.setattr(cached, "load_packed", noted)
    return seen


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 20)[None]).logits  # type: ignore[no-any-return]


def test_a_second_load_reads_what_the_first_made(
    source: Path, read: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "is_quiet", lambda: False)
    first = logits(load(str(source), bits=4, threads=2))
    said = capsys.readouterr().err
    (entry,) = cache.entries()
    assert f"in {entry.folder} (cache=False: not)" in said
    assert entry.folder.parent == Path(os.environ["MOESTRO_CACHE"])
    assert not read
    assert torch.equal(logits(load(str(source), bits=4, threads=2)), first)
    assert read == [entry.folder]
    assert "keeping" not in capsys.readouterr().err
    read.clear()
    assert torch.equal(logits(load(str(source), bits=4, threads=2, cache=False)), first)
    assert not read


def test_what_need_not_be_quantized_is_not_kept(source: Path) -> None:
    for options in ({}, {"bits": 16}, {"bits": 8, "cache": False}):
        load(str(source), threads=2, **options)  # type: ignore[arg-type]
    load(shape="tiny", bits=8, threads=2)
    assert cache.entries() == []


def test_each_choice_has_an_entry_of_its_own(source: Path, read: list[Path]) -> None:
    choices: list[dict[str, Any]] = [
        {"bits": 8},
        {"expert_bits": 8},
        {"bits": 4},
        {"bits": 8, "head_bits": 16},
        {"bits": 8, "dtype": "bfloat16"},
        {"bits": 8, **EMULATED},  # there the dense layers are not rounded: as with expert_bits alone
        {"bits": 8, "pack_dense": False},
    ]
    found = [logits(load(str(source), threads=2, **options)) for options in choices]
    assert len(cache.entries()) == 5
    for options, expected in zip(choices, found, strict=True):
        assert torch.equal(logits(load(str(source), threads=2, **options)), expected), options
        assert torch.equal(logits(load(str(source), threads=2, cache=False, **options)), expected), options


def test_a_changed_checkpoint_is_not_answered_from_the_cache(source: Path, read: list[Path]) -> None:
    first = logits(load(str(source), bits=8, threads=2))
    path = source / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, path)
    second = logits(load(str(source), bits=8, threads=2))
    assert not torch.equal(first, second)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert not torch.equal(logits(load(str(source), bits=8, threads=2)), second)
    assert not read
    assert len(cache.entries()) == 3


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "damage", ["flipped", "cut short", "removed", "no manifest", "another version", "half-written"]
)
def test_a_damaged_entry_is_made_again(
    damage: str, source: Path, read: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    first = logits(load(str(source), bits=8, threads=2))
    (entry,) = cache.entries()
    for path in sorted(entry.folder.iterdir()):
        good = path.read_bytes()
        bad = bytearray(good)
        bad[random.randrange(len(bad))] ^= 1 << random.randrange(8)
        caplog.clear()
        if damage == "no manifest":
            (entry.folder / MANIFEST).unlink()
        elif damage == "another version":
            text = (entry.folder / MANIFEST).read_text()
            other = text.replace(f'"version":{VERSION}', f'"version":{VERSION - 1}')
            assert other != text
            (entry.folder / MANIFEST).write_text(other)
        elif damage == "half-written":
            shutil.copytree(entry.folder, entry.folder.with_name(f".{entry.folder.name}.0123abcd.partial"))
            shutil.rmtree(entry.folder)
        elif damage == "removed":
            path.unlink()
        else:
            path.write_bytes(bad if damage == "flipped" else good[: random.randrange(len(good))])
        assert torch.equal(logits(load(str(source), bits=8, threads=2)), first)
        assert not read
        is_told = damage not in ("no manifest", "half-written") and not (damage == "removed" and path.name == MANIFEST)
        assert ("the cache is made again" in caplog.text) == is_told
        assert sorted(one.name for one in entry.folder.parent.iterdir()) == [entry.folder.name]
        assert path.read_bytes()[-1000:] == good[-1000:] or path.name == MANIFEST
        assert torch.equal(logits(load(str(source), bits=8, threads=2)), first)
        assert read == [entry.folder]
        read.clear()


def test_the_least_recently_used_goes_first(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {}
    for bits in (8, 4):
        load(str(source), expert_bits=bits, threads=2)
        folders[bits] = next(one.folder for one in cache.entries() if one.folder not in folders.values())
    os.utime(folders[8] / MANIFEST, (1e9, 1e9))
    os.utime(folders[4] / MANIFEST, (1.5e9, 1.5e9))
    taken = sum(one.n_bytes for one in cache.entries())
    usage = shutil.disk_usage(source)

    def free(n_bytes: int) -> None:
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage._replace(free=n_bytes))

    free(taken + 100_000)  # half of it all: what is there, and 50 kB
    load(str(source), bits=8, threads=2)
    assert [one.folder for one in cache.entries()][:1] == [folders[4]]
    assert len(cache.entries()) == 2
    cache.remove(folders[4])
    free(0)
    before = [one.folder for one in cache.entries()]
    load(str(source), bits=8, head_bits=16, threads=2)  # larger than half of what is there
    assert [one.folder for one in cache.entries()] == before


def test_a_cache_that_cannot_be_written_is_a_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOESTRO_CACHE", str(tmp_path / "file"))
    load(str(source), bits=8, threads=2)
    assert "not kept in the cache: " in caplog.text


def test_the_command(source: Path) -> None:
    load(str(source), bits=8, threads=2)
    load(str(source), bits=4, threads=2)
    names = {one.folder.name for one in cache.entries()}
    found = json.loads(RUNNER.invoke(app, ["cache", "--json"]).stdout)
    assert {one["name"] for one in found["packed"]} == names
    assert {one["formats"] for one in found["packed"]} == {"int8", "hqq4"}
    assert {one["model"] for one in found["packed"]} == {"source"}
    listed = RUNNER.invoke(app, ["cache"]).stdout
    assert all(name in listed for name in names)
    checked = RUNNER.invoke(app, ["cache", "verify"])
    assert checked.stdout.count("whole") == 2
    assert checked.exit_code == 0
    entry = cache.entries()[0].folder
    path = entry / "experts-00001.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    checked = RUNNER.invoke(app, ["cache", "verify"])
    assert checked.stdout.count("whole") == 1
    assert "experts-00001.bin is damaged" in checked.stdout
    assert isinstance(checked.exception, MoestroError)
    for wrong, line in (([], "name what to remove"), (["../source"], "no ../source in")):
        refused = RUNNER.invoke(app, ["cache", "remove", *wrong])
        assert isinstance(refused.exception, MoestroError)
        assert line in str(refused.exception)
    assert "removed" in RUNNER.invoke(app, ["cache", "remove", entry.name]).stdout
    assert {one.folder.name for one in cache.entries()} == names - {entry.name}
    RUNNER.invoke(app, ["cache", "remove", "--all"])
    assert cache.entries() == []


def test_two_processes_at_once(source: Path) -> None:
    code = f"from moestro import load; load({str(source)!r}, bits=8, threads=1)"
    both = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for one in both:
        said = one.communicate()[1]
        assert one.returncode == 0, said
        assert "not kept" not in said
    (entry,) = cache.entries()
    assert RUNNER.invoke(app, ["cache", "verify"]).exit_code == 0
    assert [path.name for path in entry.folder.parent.iterdir()] == [entry.folder.name]
