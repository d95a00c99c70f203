"""The Dockerfile, read as Docker reads it: where there is no Docker, it is not built."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "Dockerfile").read_text()
LINES = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", TEXT, flags=re.M)).splitlines()


def _lines(word: str) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in LINES if line.startswith(f"{word} ")]


def test_the_linter_is_content() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    if not linter.exists():
        pytest.skip("hadolint is not there; pip install -e '.[dev]'")
    done = subprocess.run([linter, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_is_copied_is_there_and_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    sources = {source for line in _lines("COPY") if "--from" not in line for source in line.split()[:-1]}
    assert {"constraints.txt", "pyproject.toml", "src", "csrc"} <= sources
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored
    assert {line[1:] for line in ignored if line.startswith("!")} == sources


def test_each_wheel_is_the_one_that_the_tests_ran_with() -> None:
    builds = [line for line in _lines("RUN") if "pip wheel" in line]
    assert len(builds) == 2
    assert all("-c constraints.txt" in line for line in builds)
    installs = [line for line in _lines("RUN") if "pip install" in line]
    assert len(installs) == 1
    assert "--no-index --find-links /wheels" in installs[0]
    assert all("--no-cache-dir" in line for line in builds + installs)


def test_what_the_project_needs_to_be_built_is_copied() -> None:
    """The readme and the licences that pyproject.toml names."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    copied = " ".join(_lines("COPY"))
    assert all(name in copied for name in (project["readme"], *project["license-files"]))
    version = project["requires-python"].removeprefix(">=")
    assert all(line.startswith(f"python:{version}-") for line in _lines("FROM"))


def test_it_serves_as_a_user_without_rights_and_is_asked_for_its_health() -> None:
    assert _lines("USER") == ["10001"]
    typed = json.loads(_lines("ENTRYPOINT")[0])
    health = json.loads(_lines("HEALTHCHECK")[0].partition("CMD ")[2])
    port = typed[typed.index("--port") + 1]
    assert f"http://127.0.0.1:{port}/health" in health[-1]
    assert _lines("EXPOSE") == [port]
    compile(health[-1], "HEALTHCHECK", "exec")


def test_its_options_are_those_of_the_command() -> None:
    from typer.testing import CliRunner

    from moestro.cli.main import app

    typed = json.loads(_lines("ENTRYPOINT")[0])
    assert typed[0] == "moestro"
    said = CliRunner().invoke(app, [*typed[1:], "--help"])
    assert said.exit_code == 0
    assert all(option in said.output for option in typed if option.startswith("--"))


def test_it_is_asked_only_by_its_own_names() -> None:
    """The health check asks by the loopback address, which the server answers wherever it listens."""
    from moestro.serve.guard import Guard

    guard = Guard(lambda *_: None, host="0.0.0.0")  # type: ignore[arg-type,return-value]
    assert guard._is_known("127.0.0.1:8080")
    assert guard._is_known("192.168.0.7:8080")
    assert not guard._is_known("evil.example")
