"""Run the test suite on the oldest and the newest versions that pyproject.toml allows: `make test-versions`.

    python scripts/test_versions.py                                                    # oldest, then newest
    python scripts/test_versions.py oldest -- -k fuse                                  # what follows -- goes to pytest
    python scripts/test_versions.py --python python3.12 --pin torch==2.11.0            # one combination of your own

oldest: the oldest Python and the oldest version of each dependency that pyproject.toml names.
newest: the newest Python that wheels are built for and that is found here, with the versions that pip chooses.

Each combination gets a clone of the committed tree and a virtual environment under build/versions, some GB with
torch's CUDA packages, which are removed unless --keep is given. Prints one line for each; the full output is in
build/versions/NAME.log. An interpreter that is not found is skipped, and that line says so.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "versions"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SHOWN = ("torch", "transformers", "triton")


@dataclass(frozen=True)
class Combination:
    """One set of versions: interpreters to look for, best first, and requirements that pip must keep to."""

    name: str
    pythons: tuple[str, ...]
    pins: tuple[str, ...]


def oldest() -> Combination:
    """The oldest versions that pyproject.toml names."""
    least_python = PROJECT["project"]["requires-python"].removeprefix(">=")
    floors = [re.match(r"([\w-]+)>=([\w.]+)", need) for need in PROJECT["project"]["dependencies"]]
    return Combination("oldest", (f"python{least_python}",), tuple(f"{f[1]}=={f[2]}" for f in floors if f))


def newest() -> Combination:
    """The newest Python that wheels are built for, without pins."""
    builds = PROJECT["tool"]["cibuildwheel"]["build"]  # like "cp313-*"
    minors = sorted((int(build.removeprefix("cp3").removesuffix("-*")) for build in builds), reverse=True)
    return Combination("newest", tuple(f"python3.{minor}" for minor in minors), ())


def find_python(names: tuple[str, ...]) -> str | None:
    """The path of the first of these interpreters that starts, which a version manager's shim may not; else None."""
    for name in names:
        path = shutil.which(name)
        if path and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0:
            return path
    return None


def run_tests(combination: Combination, pytest_arguments: list[str], keep: bool) -> bool:
    """Test one combination and print its line; return False if it failed."""
    python = find_python(combination.pythons)
    if python is None:
        print(f"{combination.name}: skipped, no {' or '.join(combination.pythons)} here", flush=True)
        return True
    folder, log = BUILD / combination.name, BUILD / f"{combination.name}.log"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pins = folder / "pins.txt"
    pins.write_text("\n".join(combination.pins) + "\n")
    of_venv = str(folder / "venv" / "bin" / "python")
    steps = (
        ["git", "clone", "--quiet", str(ROOT), str(folder / "tree")],
        [python, "-m", "venv", str(folder / "venv")],
        [of_venv, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-e", ".[dev]"],
        [of_venv, "-m", "pytest", *pytest_arguments],
    )
    # A constraint in the environment takes the place of any in pip's configuration files.
    environment = os.environ | {"PIP_CONSTRAINT": str(pins)}
    start_s = time.monotonic()
    with log.open("w") as output:
        for step in steps:
            print("+", *step, file=output, flush=True)
            where = folder / "tree" if (folder / "tree").exists() else ROOT
            done = subprocess.run(
                step, cwd=where, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False
            )
            if done.returncode:
                break
    minutes = (time.monotonic() - start_s) / 60
    passed = done.returncode == 0 and step is steps[-1]
    print(f"{combination.name}: {describe(of_venv)}: {closing_line(log)} [{minutes:.0f} min, {log}]", flush=True)
    if not keep:
        shutil.rmtree(folder)
    return passed


def describe(python: str) -> str:
    """The versions that the interpreter of an environment finds, in one line."""
    if not Path(python).exists():
        return "no environment"
    code = (
        "import platform; from importlib.metadata import version, packages_distributions as p;"
        f"print('Python', platform.python_version(), *[f'{{n}} {{version(n)}}' for n in {SHOWN} if n in p()], sep=', ')"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip().replace("Python, ", "Python ")


def closing_line(log: Path) -> str:
    """The last line of a log, which says how the run ended."""
    lines = [line.strip("= \n") for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1]


def main() -> int:
    """Test the combinations that the command line names; return 1 if one failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", metavar="oldest|newest", help="which to test [default: both]")
    parser.add_argument("--python", help="an interpreter: tests one combination of your own instead")
    parser.add_argument("--pin", nargs="+", default=[], metavar="NAME==VERSION", help="its versions")
    parser.add_argument("--keep", action="store_true", help="leave the environment for a look into it")
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    options, pytest_arguments = parser.parse_args(given[:end]), given[end + 1 :]
    known = {"oldest": oldest(), "newest": newest()}
    if unknown := set(options.which) - known.keys():
        parser.error(f"no combination {', '.join(unknown)}; there are oldest and newest")
    chosen = [known[name] for name in options.which or known]
    if options.python:
        chosen = [Combination("own", (options.python,), tuple(options.pin))]
    arguments = pytest_arguments or ["-n", "2", "--dist", "worksteal"]
    passed = [run_tests(combination, arguments, options.keep) for combination in chosen]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
