"""What is logged and where: levels by -v and MOESTRO_LOG, no prompt, and one line for an unexpected error."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moestro.cli import main as cli

SECRET = "Rumpelstilzchen dances"


def _moestro(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moestro.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


@pytest.mark.parametrize(
    ("verbose", "level"),
    [
        (["-vv"], ""),
        pytest.param([], "", marks=pytest.mark.long),
        pytest.param(["-v"], "error", marks=pytest.mark.long),
        pytest.param([], "debug", marks=pytest.mark.long),
    ],
)
def test_levels_and_no_prompt_in_the_log(verbose: list[str], level: str) -> None:
    done = _moestro(*verbose, "run", "demo", SECRET, "-n", "4", "--temperature", "0", MOESTRO_LOG=level)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(SECRET)
    answer = done.stdout[len(SECRET) :].strip()
    assert len(answer) > 4
    for text in (*SECRET.split(), answer):
        assert text not in done.stderr
    assert ("info: loading demo with MoestroConfig(" in done.stderr) == bool(verbose or level)
    for fact in (
        "model.safetensors, ",
        "planning from Facts(",
        "planned for 512 tokens",
        "packed model.layers.0.",
        "fused: {",
    ):
        assert (fact in done.stderr) == (verbose == ["-vv"] or level == "debug")


def test_a_wrong_level_is_one_line() -> None:
    done = _moestro("doctor", MOESTRO_LOG="loud")
    assert (done.returncode, done.stderr) == (
        2,
        "error: MOESTRO_LOG=loud: needs one of DEBUG, INFO, WARNING, ERROR, CRITICAL\n",
    )


@pytest.mark.parametrize("level", ["info", pytest.param("", marks=pytest.mark.long), "loud"])
def test_the_level_of_a_program_that_imports_moestro(level: str) -> None:
    code = "import moestro\nmoestro.load('demo', threads=1, device='cpu')"
    environment = {**os.environ, "MOESTRO_LOG": level}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode == 0) == (level != "loud")
    assert ("info: loading demo" in done.stderr) == (level == "info")
    assert ("MOESTRO_LOG=loud: needs one of" in done.stderr) == (level == "loud")


def test_an_unexpected_error_is_one_line_and_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from moestro.cli import doctor

    def examine() -> None:
        raise ZeroDivisionError("a bar of no beats\nand more")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(doctor, "examine", examine)
    monkeypatch.setattr(sys, "argv", ["moestro", "doctor"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    printed = capsys.readouterr().err
    found = re.fullmatch(r"error: ZeroDivisionError: a bar of no beats; this was not expected, .* in (\S+)\n", printed)
    assert found, printed
    kept = Path(found[1])
    assert kept.parent == tmp_path
    assert "in examine" in kept.read_text()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr().err
    assert end.value.code == 1
    assert "in examine" in printed
    assert printed.endswith("its traceback is in the lines above\n")
