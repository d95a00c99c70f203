"""What people see: whole help, tables that cut no words, bars in terminals alone, ASCII where there is nothing else."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import moestro
from commands import EVERY
from moestro import progress
from moestro.cli import main as cli
from moestro.console import print_lines, print_table
from moestro.progress import BYTES, Bar, counted, quiet, without_bars_of_transformers

PACKAGE = Path(moestro.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
WORDS = ("a policy of its own", "tok/s", "mixtral-8x7b-instruct-v0.1", "1234567.8")


# ---- help


@pytest.mark.parametrize("names", EVERY, ids=" ".join)
def test_help_has_whole_sentences_at_80_columns(names: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(cli.app, [*names, "-h"], env={"COLUMNS": "80"})
    assert not shown.exit_code
    assert max(map(len, shown.output.splitlines())) <= 80
    assert CliRunner().invoke(cli.app, [*names, "--help"], env={"COLUMNS": "80"}).output == shown.output
    text = "".join(shown.output.split())  # a word may be divided at its hyphen
    assert shown.output.isascii()
    assert "..." not in re.sub(r"(ARGS\]|NAME|N,N,)\.\.\.", "", shown.output)
    command = EVERY[names]
    for one in getattr(command, "commands", {}).values():
        assert "".join((one.help or "").split("\n\n")[0].split()) in text
    for parameter in command.params:
        assert "".join((getattr(parameter, "help", "") or "").split()) in text


def test_completion_is_offered(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def completed(words: str, at: int) -> list[str]:
        given = {"_MOESTRO_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(at)}
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["moestro"])
        with pytest.raises(SystemExit):
            cli.main()
        return capsys.readouterr().out.split()

    assert completed("moestro pl", 1) == ["plan"]
    assert {"--gpu-memory"} == {*completed("moestro run demo --gpu", 3)}
    assert {"kernels"} == {*completed("moestro bench ker", 2)}
    options = {each for one in EVERY[()].params for each in one.opts}
    assert {"--install-completion", "--show-completion"} <= options


def test_the_package_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import runpy

    monkeypatch.setattr(sys, "argv", ["moestro", "--version"])
    with pytest.raises(SystemExit):
        runpy.run_module("moestro", run_name="__main__")
    assert capsys.readouterr().out.startswith("moestro ")


# ---- tables and lines


class Stream(io.TextIOWrapper):
    """A strict stream of an encoding, which may pretend to be a terminal."""

    def __init__(self, encoding: str = "utf-8", *, is_terminal: bool = False) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", newline="\n")
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined,no-any-return]


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "JUPYTER_COLUMNS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize(("is_terminal", "columns"), [(False, 20), (True, 20), (True, 60), (True, 200)])
def test_a_table_cuts_no_words(encoding: str, is_terminal: bool, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(encoding, is_terminal=is_terminal)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", str(columns))
    line = "a line of many words " * 20
    print_table(("policy", "[tok/s]", "of the limit"), [WORDS[:3], WORDS[1:]])
    print_lines(line)
    text = re.sub(r"\x1b\[\d+m", "", stream.text())  # headers are bold in a terminal
    cells = re.sub(r"[^\w/.\-\[\] ]", " ", text).split()
    assert {word for each in (*WORDS, "[tok/s]", "limit") for word in each.split()} <= {*cells}
    lines = text.splitlines()
    if not is_terminal:
        assert lines[-1].rstrip() == line.rstrip()
        assert sum("a policy of its own" in one for one in lines) == 1
    else:
        narrowest = 3 * 3 + 1 + sum(len(word) for word in ("policy", WORDS[2], WORDS[2]))
        assert max(map(len, lines)) <= max(columns, narrowest)
    assert text.isascii() == (encoding != "utf-8")


def test_only_one_file_makes_consoles_and_only_one_bars() -> None:
    made: dict[str, set[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(text)) if re.search("rich|tqdm", text := path.read_text()) else ():
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            whole = [f"{getattr(node, 'module', '')}.{name}" for name in names]
            if any(re.search(r"^\.?rich|tqdm", each) for each in whole):
                made.setdefault(path.name, set()).update(whole)
    assert made.keys() == {"console.py", "progress.py"}, made
    assert not [one for one in made["console.py"] if "progress" in one]


# ---- bars


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stream]:
    """Makes standard error a terminal, whose user wants bars; to be called in a test, since pytest has it before."""
    import transformers.utils.logging as theirs
    from huggingface_hub import utils

    monkeypatch.setattr(theirs, "_tqdm_active", True)
    monkeypatch.setattr(utils, "are_progress_bars_disabled", lambda: False)

    def put(encoding: str = "utf-8", is_terminal: bool = True) -> Stream:
        stream = Stream(encoding, is_terminal=is_terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return put


def test_a_bar_shows_and_goes(watch: Callable[..., Stream]) -> None:
    seen = watch()
    assert [*counted("abc", "packing experts", "layers")] == [*"abc"]
    text = seen.text()
    assert "packing experts" in text
    assert "of 3 layers" in text
    assert text.endswith("\x1b[2K") or "\x1b[1A\x1b[2K" in text  # its line is wiped


@pytest.mark.parametrize("unit", [BYTES, "windows", progress.SHARE])
def test_a_bar_of_each_unit_in_ascii(unit: str, watch: Callable[..., Stream]) -> None:
    stream = watch("ascii")
    with Bar("reading", 100.0, unit) as bar:
        bar.advance(50)
        bar.advance(-20)
        bar.reach(70)
    assert "reading" in stream.text()
    with Bar("of unknown length", None) as bar:
        bar.advance(1)
    assert "of unknown length" in stream.text()


def test_no_bar_where_it_is_not_wanted(watch: Callable[..., Stream]) -> None:
    seen = watch()
    with quiet(), Bar("hidden", 1.0) as bar:
        bar.advance(1)
    with without_bars_of_transformers(), Bar("hidden", 1.0) as bar:
        bar.advance(1)
    with Bar("later", 1.0, after_s=60.0) as bar:
        bar.advance(1)
    assert not seen.text()
    with quiet(False), Bar("outer", 1.0), Bar("inner", 1.0) as bar:
        bar.advance(1)
    assert "outer" in seen.text()
    assert "inner" not in seen.text()
    elsewhere = watch(is_terminal=False)
    with Bar("in a pipe", 1.0) as bar:
        bar.advance(1)
    assert not elsewhere.text()


def test_a_bar_is_gone_after_a_failure(watch: Callable[..., Stream]) -> None:
    seen = watch()
    with contextlib.suppress(KeyError), Bar("failing", 1.0):
        raise KeyError
    with Bar("next", 1.0):
        time.sleep(0)
    assert "next" in seen.text()


def test_transformers_bars_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.utils.logging as theirs
    from huggingface_hub import utils

    before = theirs.is_progress_bar_enabled(), utils.are_progress_bars_disabled()
    with without_bars_of_transformers():
        assert not theirs.is_progress_bar_enabled()
    assert (theirs.is_progress_bar_enabled(), utils.are_progress_bars_disabled()) == before


# ---- ASCII


def test_texts_of_the_package_are_ascii() -> None:
    """Docstrings may draw; what is printed must not. A family's marks of thinking are read, not written."""
    found = []
    for path in FILES:
        if (text := path.read_text()).isascii():
            continue
        tree = ast.parse(text)
        spoken = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and isinstance(node.body[0], ast.Expr)
        }
        texts = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
        found += [path.name for node in texts if id(node) not in spoken and not node.value.isascii()]
    assert {*found} == {"call_formats.py", "channels.py", "process.py"}


@pytest.mark.parametrize(
    "typed",
    [
        ["run", "demo", "Es war einmal ein K\u00f6nig \u2014", "-n", "3", "-t", "1", "--device", "cpu"],
        ["plan", "--shape", "tiny"],
        ["run", "--shape", "nowhere \u00e9", "x"],
        ["inspect", "demo"],
        ["inspect", "nowhere/\u00e9"],
        ["doctor"],
        ["doctor", "--report"],
        ["cache"],
        ["replay", "\u00e9.trace"],
    ],
    ids=lambda typed: " ".join(typed).encode("ascii", "backslashreplace").decode(),
)
def test_an_ascii_terminal_gets_no_error(typed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = Stream("ascii", is_terminal=True), Stream("ascii", is_terminal=True)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "argv", ["moestro", *typed])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code in (None, 0, 2)
    assert "Error" not in err.text()
    assert "\n" in out.text() + err.text()
