"""What all tests share: options, quiet libraries, and random numbers that can be had again.

Each test and each shared fixture draws from a seed of its own, made of its name and of --seed. So a run of the same
tests always sees the same numbers, however pytest-xdist shares them out, and another --seed makes fresh ones.
"""

from __future__ import annotations

import random
import re
import secrets
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import hypothesis
import numpy
import pytest
import torch

from interpreter import ask_for_interpreter, mend_interpreter

ask_for_interpreter()
if find_spec("triton") and not torch.cuda.is_available():
    mend_interpreter()
import transformers  # noqa: E402

pytest_plugins = ["served"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-docs", action="store_true", help="write the documents that tests generate")
    parser.addoption("--kernels", help="another build of the kernels to test: with sanitizers, by make sanitize-python")
    parser.addoption("--seed", type=int, default=0, help="of all random numbers; make test-long takes a fresh one")


def pytest_configure(config: pytest.Config) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if config.getoption("--kernels") is not None:
        _use_kernels(Path(config.getoption("--kernels")).resolve())
    if config.getoption("--seed") == 0:
        hypothesis.settings.register_profile("same examples", derandomize=True)
        hypothesis.settings.load_profile("same examples")


def _use_kernels(path: Path) -> None:
    """Import this build of the kernels in place of the installed one."""
    name = "moestro.compute._kernels"
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    from moestro.compute import cpu

    assert cpu._kernels.__file__ == str(path)


def pytest_report_header(config: pytest.Config) -> str:
    return f"random numbers: --seed {config.getoption('--seed')}"


def _seed(config: pytest.Config, name: str) -> None:
    seed = zlib.crc32(f"{config.getoption('--seed')} {name}".encode())
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest) -> Iterator[None]:
    if fixturedef.scope != "function":  # which test comes first to it is chance
        _seed(request.config, f"{fixturedef.baseid} {fixturedef.argname} {getattr(request, 'param', '')!r}")
    return (yield)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has an empty cache of its own, so that what it loads was made by it."""
    monkeypatch.setenv("MOESTRO_CACHE", str(tmp_path_factory.getbasetemp() / f"cache-{secrets.token_hex(8)}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    yield
    _seed(item.config, item.nodeid)


def _leave_to_the_long_run(items: list[pytest.Item], seed: int) -> None:
    """Mark as long what is not in the sample of a test that is marked so, which has many cells of one kind."""
    tests: dict[tuple[Path, str], list[pytest.Function]] = defaultdict(list)
    for item in items:
        if (
            isinstance(item, pytest.Function)
            and item.get_closest_marker("sample")
            and not item.get_closest_marker("long")
        ):
            tests[item.path, item.originalname].append(item)
    for cells in tests.values():
        mark = cells[0].get_closest_marker("sample")
        assert mark is not None
        for cell in _rest(cells, *mark.args, seed):
            cell.add_marker(pytest.mark.long)


def _rest(cells: list[pytest.Function], count: int, seed: int) -> list[pytest.Function]:
    """All but `count` cells; what each parameter can be is among those first."""
    drawn = sorted(cells, key=lambda cell: zlib.crc32(f"{seed} {cell.nodeid}".encode()))
    seen: set[tuple[str, int]] = set()
    covering, others = [], []
    for cell in drawn:
        values = set(cell.callspec.indices.items())
        (others if values <= seen else covering).append(cell)
        seen |= values
    return (covering + others)[count:]


@pytest.hookimpl(tryfirst=True)  # before those marked long are left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _leave_to_the_long_run(items, config.getoption("--seed"))
    passing = [item.nodeid for item in items if re.search(r" at 0x[0-9a-f]+", item.nodeid)]
    if passing:
        raise pytest.UsageError(f"another process would name {passing[0]} otherwise: pytest-xdist cannot share it")
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))
