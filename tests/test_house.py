"""The walls of the house: what a folder may import, how long a file may grow, what the package exports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moestro

PACKAGE = Path(moestro.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


# From the ground up: a wing imports only itself and what stands before it here. The package's own `__init__` is the
# front door, which loads what it shows only when that is asked for.
WINGS = (
    *("errors", "logs", "console", "progress", "planning", "memory", "compute", "devices", "machine", "simulate"),
    *("engine", "decode", "loading", "text", "serve", "bench", "cli", "__init__", "__main__"),
)
NEVER = {  # though it stands below: a wing, and what it must not import besides
    "planning": ("torch", "transformers", "numpy", "rich", "typer"),
    "memory": ("transformers",),
    "engine": ("moestro.simulate",),  # a clock answers what the conductor asks of it
    "simulate": ("torch", "transformers", "moestro.memory", "moestro.compute", "moestro.devices", "moestro.machine"),
}


def _module(path: Path) -> str:
    return ".".join(["moestro", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {_module(path) for path in FILES}


def _imports(path: Path) -> set[str]:
    """Absolute names of all modules, and of all names in them, that a file imports, wherever in the file."""
    package = ["moestro", *path.relative_to(PACKAGE).parent.parts]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            inside = {f"{stem}.{alias.name}" for alias in node.names}
            names |= inside if inside <= MODULES else inside | {stem}
    return names


def _wing_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _wing_imported(name: str) -> str | None:
    """The wing that a name of ours is in; None of others, and of the bare `moestro`, whose names are looked at too."""
    parts = name.split(".")
    if parts[0] != "moestro" or len(parts) == 1:
        return None
    return parts[1] if parts[1] in WINGS else "__init__"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downward(path: Path) -> None:
    wing, names = _wing_of(path), _imports(path)
    assert wing in WINGS, "a wing without a place in the order"
    above = WINGS[WINGS.index(wing) + 1 :]
    assert not [name for name in names if _wing_imported(name) in above]
    assert not [name for name in names if name.startswith(NEVER.get(wing, ()))]


def test_no_file_imports_itself_in_a_circle() -> None:
    """Within a wing as well, wherever in the file the import is."""
    modules = {
        ".".join(["moestro", *p.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): p for p in FILES
    }
    imported = {
        name: {one for one in _imports(path) if one in modules and one != name} for name, path in modules.items()
    }
    circles = []
    for start in modules:
        seen, left = set(), [start]
        while left:
            for name in imported[left.pop()] - seen:
                seen.add(name)
                left.append(name)
        if start in seen:
            circles.append(start)
    assert not circles


@pytest.mark.parametrize(
    "path", [p for p in FILES if _wing_of(p) in ("compute", "devices")], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_formats_are_known_by_their_front_door(path: Path) -> None:
    names = [name for name in _imports(path) if name.startswith("moestro.memory.formats.")]
    assert not [name for name in names if name.split(".")[3:4] in (["base"], ["floats"], ["experts"], ["quantized"])]


def test_files_and_functions_stay_short() -> None:
    """A test that tells, not a fetish: raise the bound in the same commit that explains why."""
    long_files = {str(p.relative_to(PACKAGE)): n for p in FILES if (n := len(p.read_text().splitlines())) > 400}
    long_functions, long_classes = {}, {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                statements = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0 :]
                length = (node.end_lineno or 0) - statements[0].lineno + 1  # a command lists its options before
                if length > 60:
                    long_functions[f"{path.name}:{node.name}"] = length
            elif isinstance(node, ast.ClassDef) and (length := (node.end_lineno or 0) - node.lineno + 1) > 250:
                long_classes[f"{path.name}:{node.name}"] = length
    assert not long_files
    assert not long_functions
    assert not long_classes


def test_exported_members() -> None:
    assert moestro.__all__ == ["MoestroConfig", "MoestroError", "__version__", "load", "load_tokenizer"]
    assert len(moestro.__all__) <= 8
    assert all(getattr(moestro, name) is not None for name in moestro.__all__)
    assert sorted(moestro.__all__) == dir(moestro)
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = moestro.nothing_here


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["run", "--help"]])
def test_help_imports_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom moestro.cli.main import main\n"
        f"sys.argv = ['moestro', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'slow imports'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_files_that_texts_name_are_there() -> None:
    """Documents, docstrings and comments; the log and the changelog tell of what was."""
    root = PACKAGE.parents[1]
    if not (root / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout.split()
    texts = [p for p in FILES if not p.is_relative_to(PACKAGE / "demo")]
    texts += [root / name for name in listed if name.endswith(".md") and not name.endswith(("log.md", "CHANGELOG.md"))]
    there = {f"/{name}" for name in listed} | {f"/{p.relative_to(root)}" for p in FILES}
    gone = []
    for path in texts:
        for name in re.findall(r"(?<![\w/.*{}])[\w/]+\.(?:py|cpp|inl|sh)\b", path.read_text()):
            if name != "llama.cpp" and not any(one.endswith(f"/{name}") for one in there):
                gone.append(f"{path.relative_to(root)}: {name}")
    assert not gone


def test_no_path_of_one_machine_is_in_the_tree() -> None:
    root = PACKAGE.parents[1]
    if not (root / ".git").exists():
        pytest.skip("not a checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        path = root / name
        if path.suffix in {".py", ".md", ".toml", ".sh", ".json", ".txt", ""} and path.stat().st_size < 1_000_000:
            text = path.read_text(errors="ignore")
            assert "/home/" not in text or name == Path(__file__).relative_to(root).as_posix(), name


def test_a_device_is_asked_what_it_has_not_what_it_is() -> None:
    """Outside devices/ no line compares a device's name or asks for its type: there is a property for each question."""
    texts = [path.read_text() for path in (PACKAGE / "devices").glob("*.py")]
    kinds = {name for text in texts for name in re.findall(r"class (\w+)", text)}
    asked = []
    for path in (one for one in FILES if _wing_of(one) != "devices"):
        for node in ast.walk(ast.parse(path.read_text())):
            said = ast.unparse(node) if isinstance(node, ast.Compare | ast.Call | ast.MatchClass) else ""
            if isinstance(node, ast.Compare):
                is_asked = re.search(r"device\.(name|torch_device\.type)\b", said)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                is_asked = kinds & set(re.findall(r"\w+", said))
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("type", "hasattr", "getattr"):
                is_asked = re.search(r"\((\w+\.)*_?device\b", said)
            else:
                is_asked = isinstance(node, ast.MatchClass) and ast.unparse(node.cls) in kinds
            asked += [f"{path.name}:{node.lineno}: {said}"] if is_asked else []
    assert not asked
