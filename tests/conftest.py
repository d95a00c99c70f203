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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    passing = [item.nodeid for item in items if re.search(r" at 0x[0-9a-f]+", item.nodeid)]
    if passing:
        raise pytest.UsageError(f"another process would name {passing[0]} otherwise: pytest-xdist cannot share it")
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))
