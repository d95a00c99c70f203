"""examples/: each script runs on the demo model as its docstring says, and is short. lm_eval's has tests of its own."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
# What each prints of the demo model, which is the same each time but for speeds.
PRINTS = {
    "batch.py": r"(?s)\A(- (Once upon a time|The wolf said|In the forest|There was a poor).+\n){4}\Z",
    "chat.py": r"(?s)> Once upon.*\n  48 tokens, [\d.]+ tok/s\n\n> The youngest.*\n  48 tokens, [\d.]+ tok/s",
    "streaming.py": r"(?s)Once upon a time.{40,}prefill [\d.]+ tok/s, decode [\d.]+ tok/s\nthe first token after",
    "trace_and_replay.py": r"slots hits 0\.[2-9]\d, .* guesses 0\.[4-9]\d\n(rtx\w+ +[\w-]+ .* hits\n){8}",
}


@pytest.mark.parametrize("name", PRINTS)
def test_an_example_does_what_it_says(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(FOLDER / name)])
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    assert re.search(PRINTS[name], capsys.readouterr().out)


def test_examples_are_short_and_say_how_they_are_run() -> None:
    found = {path.name: path.read_text("utf-8") for path in FOLDER.glob("*.py")}
    assert found.keys() == {*PRINTS, "lm_eval_harness.py"}
    for name, text in found.items():
        said = ast.get_docstring(ast.parse(text)) or ""
        assert f"python examples/{name}" in said
        if name in PRINTS:
            assert len(text.splitlines()) <= 40, name
            assert 'model: str = "demo"' in text
