"""Docstrings and comments: examples run, and words are those of the field."""

from __future__ import annotations

import ast
import doctest
import importlib
import io
import re
import shlex
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import moestro
from moestro.cli.main import app
from moestro.text.tracing import trace_ids

PACKAGE = Path(moestro.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# Callers, threads and hooks are named as such.
VAGUE = re.compile(r"\b(who|whom|whoever|somebody|someone|nobody|anybody|anyone)\b", re.IGNORECASE)
RIDDLES = re.compile(r"^(the same|as it was|as (above|before))\b", re.IGNORECASE)


def _name(path: Path) -> str:
    return ".".join(["moestro", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """The name and the docstring of a module and of all that is in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield getattr(node, "name", "the module"), ast.get_docstring(node) or ""


def _blocks(docstring: str) -> Iterator[str]:
    """Indented paragraphs that follow an empty line."""
    for paragraph in docstring.split("\n\n")[1:]:
        lines = paragraph.splitlines()
        if lines and all(line.startswith("    ") for line in lines):
            yield "\n".join(line[4:] for line in lines)


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    """What examples may use without making it: the demo model, its tokenizer, and a trace of it."""
    model = moestro.load("demo")
    trace = trace_ids(model, "demo", torch.arange(3, 13), tokens=3, prompt_tokens=4, decode_tokens=3)
    return {"model": model, "tokenizer": moestro.load_tokenizer("demo"), "trace": trace, "torch": torch}


@pytest.mark.parametrize("path", [p for p in FILES if ">>>" in p.read_text()], ids=_name)
def test_examples_give_what_they_say(path: Path, known: dict[str, Any]) -> None:
    module = importlib.import_module(_name(path))
    found = doctest.testmod(module, extraglobs=known, optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_an_example_is_one_that_runs(path: Path) -> None:
    """Python without `>>>` is an example that no test runs; a command line has options that there are."""
    for name, docstring in _docstrings(path):
        for block in _blocks(docstring):
            for line in block.splitlines():
                if line.startswith("moestro "):
                    shown = CliRunner().invoke(app, [*shlex.split(line)[1:], "--help"])
                    assert shown.exit_code == 0, f"{name}: {line}: {shown.output}"
            try:
                ast.parse(block)
            except SyntaxError:
                continue
            pytest.fail(f"{name}: no test runs this example:\n{block}")


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_callers_and_threads_are_named(path: Path) -> None:
    text = path.read_text()
    comments = [
        (token.start[0], token.string.lstrip("# "))
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    ]
    found = [f"line {line}: {said}" for line, said in comments if VAGUE.search(said) or RIDDLES.search(said)]
    found += [f"{name}: {said}" for name, said in _docstrings(path) if VAGUE.search(said) or RIDDLES.search(said)]
    assert not found


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_what_is_public_says_what_it_is(path: Path) -> None:
    """Modules, their functions and classes, and what a protocol asks for: a method does what its protocol says."""
    tree = ast.parse(path.read_text())
    protocols = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any("Protocol" in ast.unparse(base) for base in node.bases)
    ]
    named = [
        node for scope in (tree, *protocols) for node in scope.body if isinstance(node, ast.ClassDef | ast.FunctionDef)
    ]
    silent = [node.name for node in named if not node.name.startswith("_") and not ast.get_docstring(node)]
    assert not silent
    assert ast.get_docstring(tree)
