"""macOS and Windows, pretended: what their Python lacks is taken away, and the light paths run all the same.

The wheels' own workflow runs the demo and these tests on real ones (.github/workflows/wheels.yml).
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moestro
from moestro.loading.packed.cache import cache_folder
from moestro.machine import probe

ROOT = Path(__file__).parents[1]
PACKAGE = Path(moestro.__file__).parent

PRETENDED = r"""
import contextlib, importlib, json, mmap, os, pathlib, pkgutil, signal, sys, types
# What others wrote is loaded for the system that is here.
import filelock, huggingface_hub.utils, psutil, prompt_toolkit, torch, torch._dynamo, transformers, triton
import torch.distributed.elastic.multiprocessing, transformers.models.mixtral.modeling_mixtral, typer.testing
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PreTrainedModel

wanted = {"win32": "AppData/Local/moestro/Cache", "darwin": "Library/Caches/moestro"}
lacking = {name: importlib.import_module(name) for name in ("fcntl", "resource", "termios", "pwd", "grp")}
sys.modules.update(dict.fromkeys(lacking))
for name in ("O_DIRECT", "posix_fadvise", "sched_getaffinity", "preadv", "killpg", "register_at_fork"):
    delattr(os, name)
for name in ("MAP_PRIVATE", "MAP_ANONYMOUS", "MADV_HUGEPAGE"):
    delattr(mmap, name)
del signal.SIGKILL
sys.modules["winreg"] = types.SimpleNamespace(
    HKEY_LOCAL_MACHINE=0, OpenKey=lambda *_: contextlib.nullcontext(), QueryValueEx=lambda *_: ("A CPU ", 1)
)
sys.platform = "win32"
import moestro

names = [one.name for one in pkgutil.walk_packages(moestro.__path__, "moestro.") if not one.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
from typer.testing import CliRunner
from moestro.cli.main import app
from moestro.compute.cpu import core_cpus
from moestro.loading.packed.atomic import new_folder
from moestro.loading.packed.cache import cache_folder
from moestro.machine import probe
from moestro.memory.store import map_memory

process = psutil.Process

class OnWindows(process):
    def memory_info(self):
        return types.SimpleNamespace(peak_wset=12345, rss=12345)

for system in wanted:
    sys.platform = system
    if system == "darwin":
        sys.modules.update(lacking)
    psutil.Process = process if system == "darwin" else OnWindows
    os.environ.pop("MOESTRO_CACHE", None)
    os.environ.pop("LOCALAPPDATA", None)
    assert cache_folder() == pathlib.Path("~").expanduser() / wanted[system], cache_folder()
    os.environ["MOESTRO_CACHE"] = sys.argv[1]
    assert probe.available_ram_bytes() > 0
    assert probe.peak_ram_bytes() > 0
    assert probe.major_faults() >= 0
    assert probe.cpu_model() == "A CPU" or system == "darwin"
    assert len(core_cpus()) == probe.physical_cores()
    assert int(map_memory(5000).sum()) == 0
    folder = pathlib.Path(sys.argv[1]) / system
    for text in ("old", "new"):
        with new_folder(folder, lambda path: None) as working:
            (working / "file").write_text(text)
    assert (folder / "file").read_text() == "new"
    assert len(list(folder.parent.glob(f"*{system}*"))) == 1
    for arguments in (["plan", "demo", "--json"], ["run", "demo", "Once", "-n", "3", "--bits", "4", "--json"]):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, (system, arguments, done.output, done.exception)
        assert json.loads(done.stdout.splitlines()[-1])
    print(system, len(names))
"""


@pytest.mark.long
def test_the_package_runs_without_what_other_systems_lack(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    if sys.platform != "linux":
        pytest.skip("pretends from Linux")
    done = subprocess.run(
        [sys.executable, "-c", PRETENDED, str(tmp_path)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    systems = dict(line.split() for line in done.stdout.splitlines())
    assert systems.keys() == {"darwin", "win32"}
    assert all(int(count) > 150 for count in systems.values())


@pytest.mark.parametrize(
    ("system", "variables", "folder"),
    [
        ("linux", {"XDG_CACHE_HOME": "/c"}, "/c/moestro"),
        ("linux", {"HOME": "/h"}, "/h/.cache/moestro"),
        ("darwin", {"HOME": "/h", "XDG_CACHE_HOME": "/c"}, "/h/Library/Caches/moestro"),
        ("win32", {"LOCALAPPDATA": "/l"}, "/l/moestro/Cache"),
        ("win32", {"HOME": "/h"}, "/h/AppData/Local/moestro/Cache"),
        ("win32", {"MOESTRO_CACHE": "/m", "LOCALAPPDATA": "/l"}, "/m"),
    ],
)
def test_the_cache_is_where_the_system_keeps_caches(
    system: str, variables: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MOESTRO_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", system)
    assert cache_folder().as_posix() == folder


def test_a_mac_says_its_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(probe, "_asked", lambda command: "Apple M2 Pro" if command[0] == "sysctl" else None)
    assert probe.cpu_model() == "Apple M2 Pro"
    monkeypatch.setattr(probe, "_asked", lambda command: None)
    assert probe.cpu_model()


def test_texts_are_read_as_utf8() -> None:
    """Windows' own encoding is another: JSON is read as bytes, and whatever else names its encoding."""
    for path in PACKAGE.rglob("*.py"):
        if ".read_text(" in (text := path.read_text("utf-8")):
            calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
            reads = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "read_text"]
            assert not [call.lineno for call in reads if not (call.args or call.keywords)], path


def test_the_workflow_runs_tests_that_are_there() -> None:
    workflow = (ROOT / ".github/workflows/wheels.yml").read_text("utf-8")
    named = re.findall(r"\btests/(test_\w+\.py)", workflow)
    assert len(named) >= 10
    assert not [name for name in named if not (ROOT / "tests" / name).exists()]
    for system in ("macos-14", "windows-latest"):
        assert workflow.count(system) >= 2  # built there, and tried there
    assert 'moestro run demo "Once upon a time"' in workflow
