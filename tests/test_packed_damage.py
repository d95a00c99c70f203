"""What is wrong with a packed folder is found before an answer: one line, and status 2 on the command line."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from families import FAMILIES, build_model
from moestro import MoestroError, load, load_tokenizer
from moestro.cli.main import app
from moestro.compute.checksum import crc32c
from moestro.errors import RequestError
from moestro.loading.pack import pack
from moestro.loading.packed import atomic
from moestro.loading.packed.manifest import MANIFEST, VERSION
from moestro.loading.packed.read import verify_packed
from moestro.planning.options import ModelOptions, Options
from toy_tokenizers import llama

RUNNER = CliRunner()
FLIPS = 8  # of each file, by loading; and ten times as many by reading all of it


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed folder of a tiny model with a tokenizer, quantized experts and dense layers, and floats beside."""
    source = tmp_path_factory.mktemp("damage") / "source"
    build_model(next(family for family in FAMILIES if family.name == "mixtral")).save_pretrained(source)
    llama().save_pretrained(source)
    pack(str(source), source.parent / "packed", ModelOptions(), Options(threads=2, bits=8))
    return source.parent / "packed"


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def refused(folder: Path) -> str:
    """The line with which the model or its tokenizer is refused, as by `moestro run`."""

    def load_both() -> None:
        load_tokenizer(str(folder))
        load(str(folder), threads=2)

    with pytest.raises(MoestroError) as caught:
        load_both()
    line = str(caught.value)
    assert "\n" not in line
    return line


def names_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_any_bit_of_any_file(folder: Path) -> None:
    assert {MANIFEST, "config.json", "dense.bin", "experts-00001.bin", "rest.safetensors", "tokenizer.json"} <= set(
        names_of(folder)
    )
    for name in names_of(folder):
        path = folder / name
        good = path.read_bytes()
        for number in range(11 * FLIPS):
            bad = bytearray(good)
            bad[random.randrange(len(bad))] ^= 1 << random.randrange(8)
            path.write_bytes(bad)
            if number < FLIPS:
                assert name in refused(folder)
            else:
                with pytest.raises(MoestroError):
                    verify_packed(folder, 2)
        path.write_bytes(good)
    verify_packed(folder, 2)
    load(str(folder), threads=2)


@pytest.mark.parametrize("change", ["removed", "emptied", "cut short", "longer"])
def test_files_that_are_not_whole(change: str, folder: Path) -> None:
    for name in names_of(folder):
        path = folder / name
        good = path.read_bytes()
        path.unlink()
        if change != "removed":
            changed = {"emptied": b"", "cut short": good[: random.randrange(len(good))], "longer": good + b"\0"}
            path.write_bytes(changed[change])
        assert name in refused(folder)
        found = RUNNER.invoke(app, ["run", str(folder), "Once", "--threads", "2"])
        assert isinstance(found.exception, MoestroError)
        path.write_bytes(good)
    verify_packed(folder, 2)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what a moestro.json says, with the checksum that it then must have."""
    values = json.loads((folder / MANIFEST).read_bytes())["packed"]
    change(values)
    text = json.dumps(values, separators=(",", ":")).encode()
    (folder / MANIFEST).write_bytes(b'{"crc32c":"%08x","packed":%b}\n' % (crc32c(text), text))


def _without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda values: values.pop(key)


def _set(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda values: values.update(changes)


def _update_files(changes: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda values: values["files"].update(changes)


def _layer(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda values: values["layers"][0].update(changes)


def _matrix(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda values: values["dense"][0].update(changes)


def _run(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda values: values["layers"][1]["experts"][2].update(changes)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (_set(version=VERSION + 1), rf"is a packed folder of format version {VERSION + 1}, .* reads version {VERSION}"),
        (_set(version=VERSION - 1), rf"is a packed folder of format version {VERSION - 1}, .* reads version {VERSION}"),
        (_set(version=str(VERSION)), rf"of format version {VERSION}, and this"),
        (_set(later=1), "is not what moestro pack writes"),
        *(
            (_without(key), "is not what moestro pack writes")
            for key in ("version", "layers", "dense", "files", "asked")
        ),
        (_set(layers=None), "is not what moestro pack writes"),
        (_set(layers=[]), "does not say what all bytes"),
        (_set(dense=[]), "does not say what all bytes"),
        (_set(files={}), "is not what moestro pack writes"),
        (_set(dtype="float16"), "."),
        (_layer(module="elsewhere"), "experts of elsewhere, model.layers.1.mlp.experts"),
        (_layer(format="int9"), "a format 'int9'"),
        (_layer(format="int4"), "experts of .* in other shapes or sizes"),
        (_layer(block=128), "in other shapes or sizes"),
        (_layer(neurons=10**12), "in other shapes or sizes"),
        (_layer(hidden=-1), "in other shapes or sizes"),
        (_layer(experts=[]), "does not say what all bytes"),
        (_matrix(format="bf16"), "in another shape or size"),
        (_matrix(rows=3), "in another shape or size"),
        (_matrix(name="nothing.weight"), "has no place for"),
        (_matrix(name="model.norm.weight"), "in another shape or size"),
        (_matrix(dtype="nothing"), "in another shape or size"),
        (_matrix(order=True), "without its order of columns"),
        (_run(file="../source/model.safetensors"), "is not what moestro pack writes"),
        (_run(offset=-4096), "is not what moestro pack writes"),
        (_run(offset=2**62), "is not what moestro pack writes"),
        (_run(offset=1), "is not what moestro pack writes"),
        (_run(n_bytes=2**62), "is not what moestro pack writes"),
        (_run(offset=0), "expert 2 of .* is not what was written there"),
        (_run(crc=0), "expert 2 of .* is not what was written there"),
    ],
    ids=range(34),
)
def test_a_manifest_that_says_something_else(change: Callable[[Any], Any], line: str, folder: Path) -> None:
    rewrite(folder, change)
    if line == ".":  # such a model may load, and has the dtype that was said for what is computed
        return
    assert re.search(line, refused(folder))


def test_another_models_config(folder: Path) -> None:
    """With the checksum that it must have, which a person may well put there."""
    config = json.loads((folder / "config.json").read_text())
    for change, line in (
        ({"num_hidden_layers": 1}, "experts of model.layers.0.mlp.experts"),
        ({"intermediate_size": 48}, "in other shapes or sizes"),
        ({"vocab_size": 64}, "in another shape or size"),
        ({"num_key_value_heads": 4}, "in another shape or size"),
    ):
        text = json.dumps(config | change).encode()
        (folder / "config.json").write_bytes(text)
        rewrite(folder, _update_files({"config.json": {"n_bytes": len(text), "crc": crc32c(text)}}))
        assert re.search(line, refused(folder))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"bits": 4}, "is packed with 8, not with expert_bits=4 .which bits sets, too.; leave"),
        ({"expert_bits": 16}, "not with expert_bits=16"),
        ({"dense_bits": 4}, "not with dense_bits=4"),
        ({"head_bits": 16}, "not with head_bits=16"),
        ({"transcode": 8}, "as its checkpoint had them, not with transcode=8; leave"),
        ({"dtype": "float16"}, "is packed in float32, not float16"),
        ({"config": "demo"}, "which has a config of its own"),
    ],
)
def test_options_that_contradict(options: dict[str, Any], line: str, folder: Path) -> None:
    with pytest.raises(MoestroError, match=line):
        load(str(folder), threads=2, **options)
    load(str(folder), threads=2, bits=8, dtype="float32")


def test_a_line_and_status_2(folder: Path) -> None:
    data = bytearray((folder / "experts-00001.bin").read_bytes())
    data[5000] ^= 1
    (folder / "experts-00001.bin").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-m", "moestro.cli.main", "run", str(folder), "Once"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    lines = [line for line in re.split(r"[\r\n]", done.stderr) if "error" in line]
    assert len(lines) == 1
    assert "experts-00001.bin is damaged: expert 0 of model.layers" in lines[0]
    assert "Traceback" not in done.stderr


def save(source: Path, target: Path) -> None:
    pack(str(source), target, ModelOptions(), Options(threads=2))


def test_what_is_there_is_not_overwritten(whole: Path, tmp_path: Path) -> None:
    """A packed folder and an empty one are replaced; nothing else is."""
    target = tmp_path / "model"
    target.mkdir()
    save(whole, target)
    save(whole, target)
    verify_packed(target, 2)
    assert names_of(tmp_path) == ["model"]
    (target / "notes.txt").write_text("mine")
    with pytest.raises(MoestroError, match=r"will not be replaced \(it has notes.txt besides\); name another folder"):
        save(whole, target)
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").touch()
    for path in (other, other / "file"):
        with pytest.raises(MoestroError, match=r"will not be replaced \(it is no packed folder\)"):
            save(whole, path)
    with pytest.raises(MoestroError, match="cannot be written"):
        save(whole, other / "file" / "below")
    found = RUNNER.invoke(app, ["pack", "demo"])
    assert isinstance(found.exception, RequestError)
    assert str(found.exception).startswith("Missing option '--output'")


def test_a_packed_folder_is_packed_onto_itself(folder: Path) -> None:
    before = {name: (folder / name).read_bytes() for name in names_of(folder) if name != MANIFEST}
    save(folder, folder)
    assert {name: (folder / name).read_bytes() for name in before} == before
    verify_packed(folder, 2)


def test_a_full_disk_is_one_line_and_leaves_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moestro.loading.packed import run_file, write

    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(write.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(MoestroError, match=r"needs .* KiB, and its disk has 1000 B free; free .* more"):
            save(whole, tmp_path / "model")
    plain = write.write_all
    for failing, line in (
        (errno.ENOSPC, "is full; nothing is kept of model"),
        (errno.EIO, "cannot be written: .*Input"),
    ):
        left = [random.randrange(60)]

        def writing(file: Any, view: memoryview, left: list[int] = left, failing: int = failing) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(failing, os.strerror(failing))
            plain(file, view)

        monkeypatch.setattr(write, "write_all", writing)
        monkeypatch.setattr(run_file, "write_all", writing)
        with pytest.raises(MoestroError, match=line):
            save(whole, tmp_path / "model")
        assert names_of(tmp_path) == []


def test_a_write_that_the_system_refuses(whole: Path, tmp_path: Path) -> None:
    """By a limit on the sizes of files, in a process of its own."""
    code = (
        "import resource, signal, sys\n"
        "from moestro.cli.main import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        f"sys.argv = ['moestro', 'pack', {str(whole)!r}, '-o', {str(tmp_path / 'model')!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "cannot be written: [Errno 27] File too large" in done.stderr
    assert names_of(tmp_path) == []


def test_without_a_call_that_exchanges_names(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    for _ in range(2):
        save(whole, tmp_path / "model")
        verify_packed(tmp_path / "model", 2)
        assert names_of(tmp_path) == ["model"]


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from moestro import load
from moestro.loading.packed.write import write_packed
from moestro.loading.packed.manifest import Asked
from moestro.loading.packed.read import verify_packed

target, models = Path({target!r}), [load({model!r}, threads=1, fuse=False)] * 2

def write(kind, folder=target):
    def beside(folder):
        (folder / "config.json").write_text("{{}}")
        (folder / f"kind-{{kind}}.json").write_text("x" * 100 * kind)
    write_packed(models[kind], folder, source={{"kind": kind}}, asked=Asked(), beside=beside)

write(0)
took_s = time.perf_counter()
write(1)
took_s = time.perf_counter() - took_s
random.seed({seed})
for number in range({rounds}):
    fresh = number % 5 == 4  # then there is nothing under the name before
    if fresh:
        import shutil
        shutil.rmtree(target)
    children = []
    for _ in range(1 + number % 2):  # two at once, too
        if not (child := os.fork()):
            kind = 0
            while True:
                write(kind := 1 - kind)
        children.append(child)
    time.sleep(random.random() * (1 if fresh else 4) * took_s)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if fresh and not target.exists():
        write(0)
    kind = verify_packed(target, 1).source["kind"]
    assert sorted(path.name for path in target.glob("kind-*")) == [f"kind-{{kind}}.json"]
write(0)
left = sorted(path.name for path in target.parent.iterdir())
assert left == [target.name], left
print("all whole")
"""


def _kill(whole: Path, target: Path, rounds: int, seed: int) -> None:
    code = KILLED.format(
        tests=str(Path(__file__).parent), target=str(target), model=str(whole), rounds=rounds, seed=seed
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "all whole\n", done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_killed_at_random_moments(whole: Path, tmp_path: Path) -> None:
    """The folder is the old or the new one, whole; what is left of the others goes with the next write."""
    _kill(whole, tmp_path / "at" / "model", 8, random.randrange(2**31))


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_killed_fifty_times_and_more(whole: Path, tmp_path: Path) -> None:
    _kill(whole, tmp_path / "at" / "model", 60, random.randrange(2**31))


@pytest.mark.long
def test_two_at_once(whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moestro.cli.main", "pack", str(whole), "-o", str(tmp_path / "model")]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for one in both:
        assert one.wait() == 0, one.stderr and one.stderr.read()
    verify_packed(tmp_path / "model", 2)
    assert names_of(tmp_path) == ["model"]
