"""A forked child generates, or says in one line why it does not; threads beside one another change nothing global."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from select import select
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from families import save_model
from moestro import load
from moestro.compute.cpu import levels, run_linear
from moestro.errors import ModelError
from moestro.memory.formats import MATRIX_FORMATS
from packing import pack_matrix

needs_kernels = pytest.mark.skipif(not levels(), reason="built without the kernels: no compiler was there")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
IDS = torch.arange(3, 12)[None]
PATIENCE_S = 60


def tokens_of(model: Any) -> list[int]:
    found: list[int] = model.generate(IDS, max_new_tokens=8, do_sample=False)[0].tolist()
    return found


def error_of(model: Any) -> str:
    """The line of the error that generating raises."""
    try:
        return f"no error: {tokens_of(model)}"
    except ModelError as error:
        return str(error)


def in_child(function: Callable[[], Any]) -> Any:
    """What a function returns in a forked child, which must end in time."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write_end, pickle.dumps(function()))
        except BaseException as error:  # a child must not go on with the tests
            os.write(write_end, pickle.dumps(repr(error)))
        finally:
            os._exit(0)
    os.close(write_end)
    try:
        ready, _, _ = select([read_end], [], [], PATIENCE_S)
        assert ready, "the child hangs"
        return pickle.loads(os.read(read_end, 100_000))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read_end)


@contextmanager
def busy(model: Any) -> Iterator[None]:
    """Another thread generates meanwhile, without a pause."""
    stop, errors = threading.Event(), []

    def work() -> None:
        try:
            while not stop.is_set():
                tokens_of(model)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        native = thread.native_id
        thread.join()
        # Python says that a thread has ended while MKL still frees its memory, under a lock that a child waits for.
        while Path(f"/proc/self/task/{native}").exists():
            time.sleep(0.001)
    assert not errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("olmoe")
    save_model("olmoe", path, SMALL)
    return path


@needs_kernels
def test_a_pool_is_made_anew() -> None:
    """Also where the parent's pool is in a call at that moment, and in a child's child."""
    matrix = pack_matrix(MATRIX_FORMATS["fp32"], torch.randn(200, 70))
    x = torch.randn(300, 70)
    wanted = linear(x, matrix.unpack(torch.float32))

    def error() -> float:
        return float((run_linear(matrix, x, threads=3) - wanted).norm() / wanted.norm())

    assert error() < 1e-5
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            error()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        errors = [in_child(lambda: [error(), error(), in_child(error)]) for _ in range(3)]
    finally:
        stop.set()
        thread.join()
    assert torch.tensor(errors).max() < 1e-5, errors
    assert error() < 1e-5


@pytest.mark.parametrize("fuse", [True, False])
def test_a_child_generates(fuse: bool, folder: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # torch's pool is in use, too
    try:
        model = load(str(folder), device="cpu", threads=2, dtype="float32", fuse=fuse)
        wanted = tokens_of(model)
        assert in_child(lambda: tokens_of(model)) == wanted
        with busy(model):
            for _ in range(2):
                assert in_child(lambda: tokens_of(model)) == wanted
        loaded = in_child(lambda: tokens_of(load(str(folder), device="cpu", threads=2, dtype="float32", fuse=fuse)))
        assert loaded == wanted
        assert tokens_of(model) == wanted
    finally:
        torch.set_num_threads(before)


def test_multiprocessing_by_fork(folder: Path) -> None:
    model = load(str(folder), device="cpu", threads=2, dtype="float32")
    wanted = tokens_of(model)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    children = [context.Process(target=lambda: answers.put(tokens_of(model))) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(PATIENCE_S)
        assert child.exitcode == 0
    assert [answers.get() for _ in children] == [wanted, wanted]


@pytest.mark.parametrize("policy", ["lru", "layer-streaming"])
def test_a_device_with_threads_refuses(policy: str, folder: Path) -> None:
    """In one line, also while the parent's threads are in the middle of it; the child ends as any process does."""
    model = load(str(folder), device="emulated", policy=policy, gpu_memory="1GiB", dtype="float32")
    wanted = tokens_of(model)
    for _ in range(2):
        with busy(model):
            line = in_child(lambda: error_of(model))
        assert "spawn" in line
        assert "emulated" in line
        assert "\n" not in line
    with busy(model):
        context = multiprocessing.get_context("fork")
        child = context.Process(target=lambda: sys.exit(0 if "spawn" in error_of(model) else 3))
        child.start()
        child.join(PATIENCE_S)
        assert child.exitcode == 0
        left = os.fork()
        if left == 0:
            model.moestro.close()
            os._exit(0)
        assert os.waitpid(left, 0)[1] == 0
    assert tokens_of(model) == wanted


def flags() -> dict[str, Any]:
    """What of torch all threads share."""
    return {
        "mkldnn": torch._C._get_mkldnn_enabled(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "random": torch.get_rng_state().tolist(),
    }


SETTERS = [(torch._C, name) for name in dir(torch._C) if name.startswith("_set_")]
SETTERS += [(torch, name) for name in ("set_num_threads", "set_default_dtype", "manual_seed", "set_rng_state")]
OF_A_THREAD = {"_set_grad_enabled"}


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss", "mixtral"])  # two whose routers are not known in 16 bits
def test_threads_change_no_global_flag(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that all threads share is set for a while, since another thread would find it, or put it back."""
    save_model(family, tmp_path)
    model = load(str(tmp_path), device="cpu", threads=1, dtype="bfloat16")
    called: set[str] = set()

    def note(name: str, function: Callable[..., Any], *args: Any) -> Any:
        called.add(name)
        return function(*args)

    before = flags()
    for owner, name in SETTERS:
        monkeypatch.setattr(owner, name, partial(note, name, getattr(owner, name)))
    wanted = tokens_of(model)
    with busy(model), busy(model):
        assert tokens_of(model) == wanted
    assert called <= OF_A_THREAD
    assert flags() == before
