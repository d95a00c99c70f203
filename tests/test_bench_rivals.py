"""The workers that time llama.cpp and kt-kernel beside us: their pipe, the models they get, and they themselves.

What needs a rival is skipped where it is not installed; the pipe is tested with a rival written here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks import rivals
from benchmarks.rivals import kt_kernel, llama_cpp
from benchmarks.rivals.blocks import PACKINGS, STD, random_blocks
from benchmarks.rivals.kt_kernel import KtKernel
from benchmarks.rivals.llama_cpp import LlamaCpp, write_gguf
from moestro.bench import worker
from moestro.bench.worker import Worker
from moestro.errors import RequestError

FAKE = """
import os, sys, time
from moestro.bench.worker import serve

def start():
    os.write(1, b"a library's greeting\\n")
    if sys.argv[1] == "broken":
        raise FileNotFoundError("no such model")
    if sys.argv[1] == "silent":
        time.sleep(60)
    handlers = {"double": lambda number: 2 * number, "chatter": chatter, "die": die, "sleep": sleep, "policy": policy}
    return {"version": "1.2"}, handlers

def policy():
    return os.environ.get("OMP_WAIT_POLICY")

def chatter(lines):
    for _ in range(lines):
        print("{}" * 100)
    return lines

def sleep(seconds):
    time.sleep(seconds)

def die(number):
    print("assertion failed: 1 < 0", file=sys.stderr, flush=True)
    os.kill(os.getpid(), number)
    time.sleep(60)

serve(start, ours=sys.argv[1] == "ours")
"""

Fake = Callable[..., Worker]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    (tmp_path / "fake_rival.py").write_text(FAKE)
    (tmp_path / "no_rival.py").write_text("print('I am no worker')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    return lambda mode="", module="fake_rival", **limits: Worker(module, [mode], **limits)


# ---- the pipe ----


def test_a_worker_answers_whatever_its_library_prints(fake: Fake) -> None:
    with fake() as worker:
        assert worker.card == {"version": "1.2"}
        assert worker.ask("double", number=21) == 42
        assert worker.ask("chatter", lines=5000) == 5000  # more than a pipe holds
        assert worker.ask("double", number=0.5) == 1.0


def test_a_refused_question_does_not_cost_the_worker(fake: Fake) -> None:
    with fake() as worker:
        with pytest.raises(RequestError, match=r"fake_rival worker: TypeError: .*argument"):
            worker.ask("double", tokens=1)
        with pytest.raises(RequestError, match="KeyError: 'triple'"):
            worker.ask("triple")
        assert worker.ask("double", number=1) == 2


def test_only_our_own_worker_waits_as_moestro_asks(fake: Fake) -> None:
    assert os.environ["OMP_WAIT_POLICY"]  # importing moestro sets it, here and in each worker
    with fake() as worker:
        assert worker.ask("policy") is None
    with fake("ours") as worker:
        assert worker.ask("policy") == os.environ["OMP_WAIT_POLICY"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_a_dead_worker_says_of_what_it_died(fake: Fake, number: signal.Signals) -> None:
    with fake() as worker:
        with pytest.raises(RequestError, match=rf"died of {number.name}; last: assertion failed: 1 < 0") as caught:
            worker.ask("die", number=number)
        assert "\n" not in str(caught.value)
        with pytest.raises(RequestError, match="closed; start another"):
            worker.ask("double", number=1)


def test_a_worker_killed_between_questions_is_noticed(fake: Fake) -> None:
    with fake() as worker:
        os.kill(worker._process.pid, signal.SIGKILL)
        worker._process.wait()
        with pytest.raises(RequestError, match="died of SIGKILL"):
            worker.ask("double", number=1)


def test_a_silent_worker_is_stopped_at_its_limit(fake: Fake) -> None:
    start_s = time.monotonic()
    with pytest.raises(RequestError, match=r"no answer for 0\.2 s and was stopped"):
        fake("silent", start_limit_s=0.2)
    with fake(limit_s=0.2) as worker:
        with pytest.raises(RequestError, match="no answer"):
            worker.ask("sleep", seconds=60)
        assert worker._process.poll() is not None
    assert time.monotonic() - start_s < 30


def test_a_worker_that_cannot_start_says_why(fake: Fake) -> None:
    with pytest.raises(RequestError, match="fake_rival worker: FileNotFoundError: no such model"):
        fake("broken")
    with pytest.raises(RequestError, match="no_rival worker answered what is no answer: b'I am no worker'"):
        fake(module="no_rival")
    with pytest.raises(RequestError, match=r"died with exit status 1; last: .*No module named .?nothing_here"):
        fake(module="nothing_here")


def test_a_worker_ends_when_it_is_closed(fake: Fake) -> None:
    worker = fake()
    worker.close()
    worker.close()
    assert worker._process.returncode == 0


def test_an_answer_waits_for_idle_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    slept_s = 0.0

    def sleep(seconds: float) -> None:
        nonlocal slept_s
        slept_s += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: slept_s)
    monkeypatch.setattr(time, "process_time", lambda: min(slept_s, 0.15))  # a thread spins for 0.15 s
    worker.settle()
    assert 0.15 <= slept_s <= 0.25
    monkeypatch.setattr(time, "process_time", lambda: slept_s)  # and one for ever
    with pytest.raises(RequestError, match="still spin after 1 s"):
        worker.settle(limit_s=1.0)


def test_the_rivals_are_not_imported_to_be_looked_for() -> None:
    code = (
        "import sys\nfrom benchmarks.rivals import kt_kernel, llama_cpp\n"
        "kt_kernel.available(), llama_cpp.available()\n"
        "assert not {'torch', 'gguf', 'llama_cpp', 'kt_kernel'} & set(sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


def test_a_missing_rival_is_named_with_its_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "find_spec", lambda name: None)
    assert llama_cpp.available() is None
    assert kt_kernel.available() is None
    with pytest.raises(RequestError, match="pip install llama-cpp-python"):
        LlamaCpp(tmp_path / "model.gguf", 1)
    with pytest.raises(RequestError, match="pip install --no-deps kt-kernel"):
        KtKernel(256, 256, experts=4, top_k=2, bits=4, threads=1)
    with pytest.raises(RequestError, match="pip install gguf"):
        write_gguf(tmp_path / "model.gguf", "tiny", 4)


# ---- the models ----


def _decoded(blocks: np.ndarray, bits: int) -> np.ndarray:
    """Weights of blocks as the formats' definitions say: bf16, or a float16 scale and 32 integers."""
    if bits == 16:
        return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    blocks = blocks.reshape(-1, PACKINGS[bits].block_bytes)
    scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    packed = blocks[:, 2:].copy()
    integers = packed.view(np.int8) if bits == 8 else np.hstack([packed & 15, packed >> 4]).astype(np.int8) - 8
    return (scales * integers).reshape(-1)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_random_blocks_are_plausible_weights(bits: int, request: pytest.FixtureRequest) -> None:
    blocks = random_blocks(bits, 12 * 2**20, seed=request.config.getoption("--seed"))
    assert blocks.nbytes >= 12 * 2**20
    weights = _decoded(blocks, bits)
    assert np.isfinite(weights).all()
    assert abs(weights.mean()) < STD / 100
    assert 0.9 * STD < weights.std() < 1.2 * STD
    tiny = np.finfo(np.float16 if bits < 16 else np.float32).tiny  # under it are the denormals
    scales = blocks.reshape(-1, PACKINGS[bits].block_bytes)[:, :2].copy().view(np.float16) if bits < 16 else weights
    assert (np.abs(scales[scales != 0]) >= tiny).all()
    rows = weights[: 2000 * 2048].reshape(2000, 2048)  # more than the pool holds at 4 and 16 bits
    assert len(np.unique(rows, axis=0)) == 2000


@pytest.mark.parametrize(
    ("shape", "parameters"), [("mixtral-8x7b", 46.70e9), ("olmoe-1b-7b", 6.92e9), ("qwen3-30b-a3b", 30.53e9)]
)
def test_a_model_has_as_many_parameters_as_its_card_says(shape: str, parameters: float) -> None:
    count = sum(int(np.prod(dimensions, dtype=np.int64)) for _, dimensions in llama_cpp.tensors_of(shape, None))
    assert count == pytest.approx(parameters, rel=0.001)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_written_gguf_reads_back(tmp_path: Path, bits: int) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "tiny", bits, layers=2)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.gguf"]
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "llama"
    assert reader.get_field("llama.block_count").contents() == 2
    assert reader.get_field("llama.expert_used_count").contents() == 2
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 * 10 + 3
    assert list(tensors["blk.1.ffn_down_exps.weight"].shape) == [160, 64, 8]  # the fastest first
    for name, tensor in tensors.items():
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(values).all()
        if "norm" in name:
            assert (values == 1).all()
            continue
        router = "gate_inp" in name
        assert tensor.tensor_type.name == ("F32" if router else PACKINGS[bits].name)
        expected = llama_cpp.EMBEDDING_STD if name == "token_embd.weight" else STD
        assert 0.8 * expected < values.std() < 1.2 * expected, name


def test_a_gguf_that_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    for shape, bits, layers in (("mixtral", 4, 1), ("tiny", 5, 1), ("tiny", 4, 0)):
        with pytest.raises(RequestError, match="shapes: mixtral-8x7b"):
            write_gguf(tmp_path / "model.gguf", shape, bits, layers)
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(OSError, match=r"folder\.gguf"):
        write_gguf(tmp_path / "folder.gguf", "tiny", 4)
    assert [file.name for file in tmp_path.iterdir()] == ["folder.gguf"]


# ---- the rivals, where they are installed ----

needs_llama = pytest.mark.skipif(llama_cpp.available() is None, reason="llama-cpp-python is not installed")
needs_kt = pytest.mark.skipif(kt_kernel.available() is None, reason="kt-kernel is not installed")


@needs_llama
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_llama_cpp_runs_what_we_write(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "tiny.gguf", "tiny", bits)
    with LlamaCpp(tmp_path / "tiny.gguf", threads=2, context=600) as worker:
        assert worker.card["version"] == llama_cpp.available()
        assert 0 < worker.prefill_s(600) < 60  # in two batches
        assert 0 < worker.decode_s(500, 8) < 60
        assert 0 < worker.decode_s(20, 3) < 60
        with pytest.raises(RequestError, match=r"590 \+ 11 tokens; the context was made for 1 to 600"):
            worker.decode_s(590, 11)
        assert 0 < worker.decode_s(590, 10) < 60


@needs_llama
def test_llama_cpp_says_what_it_cannot_load(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(RequestError, match=r"llama_cpp worker: could not load no\.gguf: \w+"):
        LlamaCpp(tmp_path / "no.gguf", threads=1)


@needs_kt
@pytest.mark.parametrize(("bits", "backend"), [(16, "bf16"), (4, "llamafile Q4_0")])
def test_kt_kernel_runs_a_layer(bits: int, backend: str) -> None:
    with KtKernel(256, 512, experts=8, top_k=2, bits=bits, threads=2, tokens=64) as worker:
        assert backend in worker.card["backend"]
        assert all(0 < worker.layer_s(tokens) < 60 for tokens in (1, 5, 64))
        with pytest.raises(RequestError, match="65 tokens: the layer was made for 1 to 64"):
            worker.layer_s(65)


@needs_kt
def test_kt_kernel_refuses_sizes_that_its_backend_cannot_cut() -> None:
    with pytest.raises(RequestError, match="multiples of 256"):
        KtKernel(256, 160, experts=8, top_k=2, bits=4, threads=1)
    with pytest.raises(RequestError, match="16 or 4 bits"):
        KtKernel(256, 256, experts=8, top_k=2, bits=8, threads=1)


@needs_llama
def test_llama_cpp_decodes_several_sequences(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "tiny.gguf", "tiny", 4, layers=1)
    with LlamaCpp(tmp_path / "tiny.gguf", threads=1, context=4 * 256, sequences=4) as worker:
        prompt_s, decode_s = worker.together(4, 200, 4)
        assert prompt_s > 0
        assert decode_s > 0
        with pytest.raises(RequestError, match="returned"):
            worker.together(4, 300, 4)
