"""The compiled CPU kernels against float64 and against their plain-torch twin, at every ISA level of this CPU.

`make sanitize` runs the same mathematics from plain C++ under the sanitizers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moestro.compute import cpu
from moestro.compute.activations import recognize
from moestro.compute.cpu import CpuExperts, Matrix, levels, look_up, run_linear
from moestro.compute.experts import ExpertMath, ExpertWork, run_experts
from moestro.memory.formats import FORMATS, MATRIX_FORMATS, ExpertShape, MatrixFormat
from packing import pack_matrix
from test_formats import CODED, random_coded

pytestmark = pytest.mark.skipif(not levels(), reason="built without the kernels: no compiler was there")

LEVELS = [name for name, usable in levels().items() if usable]
TOLERANCE = 2e-6  # float32 arithmetic, against weights as the format rounded them


def _tolerance(name: str, level: str, tokens: int) -> float:
    """Tokens meet quantized weights as 16-bit integers; in matrix tiles they meet bf16 as two planes."""
    if MATRIX_FORMATS[name].is_quantized:
        return 5e-4
    return 2e-5 if name == "bf16" and level == "amx" and tokens > 8 else TOLERANCE


def _swiglu(alpha: float, limit: float, offset: float) -> Callable[[Tensor, Tensor], Tensor]:
    def gate(g: Tensor, u: Tensor) -> Tensor:
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
        return g * torch.sigmoid(alpha * g) * (u + offset)

    return gate


def _plain(name: str) -> Callable[[Tensor | None, Tensor], Tensor]:
    function = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "relu2": lambda x: torch.relu(x).square(),
    }[name]
    return lambda g, u: function(u) if g is None else function(g) * u


GATES = {name: _plain(name) for name in ("silu", "gelu", "gelu_tanh", "relu2")} | {
    "gpt_oss": _swiglu(1.702, 0.8, 1.0),
    "deepseek_v4": _swiglu(1.0, 0.6, 0.0),
}


GATES_AND_TOKENS = [
    *(("silu", tokens) for tokens in (1, 2, 3, 7, 8, 17, 128)),
    *((gate, tokens) for gate in sorted(GATES) if gate != "silu" for tokens in (1, 8)),
]


def _random_step(math: ExpertMath, tokens: int) -> tuple[Tensor, list[ExpertWork], Tensor]:
    """Hidden states, the work of three experts (one of them in two shares), and the float64 result."""
    shape, d = math.shape, math.shape.hidden
    x = torch.randn(tokens + 3, d)
    expected = torch.zeros(tokens + 3, d, dtype=torch.float64)
    work: list[ExpertWork] = []
    for i in range(3):
        parts = {name: torch.randn(size) / d**0.5 for name, size in shape.parts.items()}
        packed = torch.full((math.format.expert_bytes(shape),), 0xFF, dtype=torch.uint8)
        math.format.pack(packed, shape, parts)
        rows, weights = torch.randperm(tokens + 3)[:tokens], torch.rand(tokens)
        edge = math.format.block if i == 0 and shape.neurons > math.format.block else 0
        shares = [range(edge), range(edge, shape.neurons)] if edge else [range(shape.neurons)]
        work += [ExpertWork(packed, share, rows, weights) for share in shares]
        p = math.format.unpack(packed, shape, range(shape.neurons), torch.float64)
        h = x[rows].double()
        up = torch.nn.functional.linear(h, p.up, p.up_bias)
        gate = None if p.gate is None else torch.nn.functional.linear(h, p.gate, p.gate_bias)
        y = torch.nn.functional.linear(math.activation(gate, up), p.down, p.down_bias)
        expected.index_add_(0, rows, y * weights[:, None].double())
    return x, work, expected


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize(("gate", "tokens"), GATES_AND_TOKENS)
def test_kernels_against_float64(level: str, name: str, gate: str, tokens: int) -> None:
    swiglu = gate in ("gpt_oss", "deepseek_v4")
    shape = ExpertShape(
        hidden=int(torch.randint(1, 90, ())),
        neurons=int(torch.randint(1, 200, ())),
        has_gate=swiglu or bool(torch.rand(()) < 0.7),
        has_bias=bool(torch.rand(()) < 0.5),
    )
    math = ExpertMath(shape, FORMATS[name], GATES[gate])
    experts = CpuExperts(threads=2, level=level)
    assert experts.kernel(math) is not None
    x, work, expected = _random_step(math, tokens)
    start = torch.randn_like(x)
    out = start.clone()
    experts.run(math, x, work, out)
    error = (out - start - expected).norm() / (expected.norm() + start.norm())
    assert error <= _tolerance(name, level, tokens), f"{shape}: relative error {error:.2e}"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 17, 128])
def test_linear_against_float64(level: str, name: str, tokens: int) -> None:
    rows, columns = (int(torch.randint(1, 300, ())) for _ in range(2))
    fmt, bias = MATRIX_FORMATS[name], torch.randn(rows) if tokens % 2 else None
    matrix = pack_matrix(fmt, torch.randn(rows, columns), bias)
    x = torch.randn(tokens, columns)
    expected = torch.nn.functional.linear(
        x.double(), matrix.unpack(torch.float64), None if bias is None else bias.double()
    )
    results = [run_linear(matrix, x, threads=threads, level=level) for threads in (2, 1, 3)]
    error = (results[0] - expected).norm() / expected.norm()
    assert error <= _tolerance(name, level, tokens), f"[{rows}, {columns}]: relative error {error:.2e}"
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("fmt", CODED, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_every_quantized_format_against_float64(level: str, fmt: MatrixFormat, tokens: int) -> None:
    rows, columns = int(torch.randint(1, 200, ())), int(torch.randint(1, 800, ()))
    matrix = Matrix(fmt.write(random_coded(fmt, rows, columns, finite=True)).flatten(), fmt, rows, columns)
    x = torch.randn(tokens, columns)
    expected = torch.nn.functional.linear(x.double(), matrix.unpack(torch.float64))
    error = (run_linear(matrix, x, threads=2, level=level) - expected).norm() / expected.norm()
    assert error <= 5e-4, f"[{rows}, {columns}]: relative error {error:.2e}"
    ids = torch.randint(rows, (tokens,))
    assert torch.equal(look_up(matrix, ids, torch.float32, threads=2, level=level), matrix.unpack(torch.float32)[ids])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("fmt", [*MATRIX_FORMATS.values(), *CODED], ids=lambda fmt: fmt.name)
def test_a_row_is_the_same_alone_and_beside_others(level: str, fmt: MatrixFormat) -> None:
    rows, columns = int(torch.randint(1, 150, ())), int(torch.randint(1, 600, ()))
    if fmt.is_quantized:
        matrix = Matrix(fmt.write(random_coded(fmt, rows, columns, finite=True)).flatten(), fmt, rows, columns)
    else:
        matrix = pack_matrix(fmt, torch.randn(rows, columns))
    x = torch.randn(64, columns)
    alone, of_nine = (run_linear(matrix, x[:tokens], threads=2, level=level)[:1] for tokens in (1, 9))
    if level != "amx" or fmt.name != "bf16":  # whose tiles, from 9 tokens on, meet two planes of bf16
        assert torch.equal(of_nine, alone)
    for tokens in (2, 3, 4, 5, 8, 10, 16, 17, int(torch.randint(18, 64, ())), 64):
        expected = alone if tokens < 9 else of_nine
        assert torch.equal(run_linear(matrix, x[:tokens], threads=2, level=level)[:1], expected), tokens


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("level", [*LEVELS, "torch"])
def test_linear_reads_and_writes_the_dtype_of_its_input(dtype: torch.dtype, level: str) -> None:
    matrix = pack_matrix(MATRIX_FORMATS["bf16"], torch.randn(70, 50))
    x = torch.randn(2, 3, 50).to(dtype)
    out = run_linear(matrix, x, threads=2, level=level)
    exact = run_linear(matrix, x.float(), threads=2, level=level)
    assert out.shape == (2, 3, 70)
    assert out.dtype == dtype
    assert (out.float() - exact.to(dtype).float()).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("level", [*LEVELS, "torch"])
@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_a_table_are_those_of_its_matrix(level: str, name: str, dtype: torch.dtype) -> None:
    for rows, columns, count in [(50, 130, 9), (7, 1, 0), (33, 1200, 300)]:  # the last is worth several threads
        table = pack_matrix(MATRIX_FORMATS[name], torch.randn(rows, columns))
        ids = torch.randint(rows, (1, count))
        got = look_up(table, ids, dtype, threads=2, level=level)
        assert torch.equal(got, table.unpack(torch.float32).to(dtype)[ids])
    for wrong in (-1, 33, 40):
        with pytest.raises(IndexError, match=f"no row .*{wrong}.* in a table of 33"):
            look_up(table, torch.tensor([0, wrong]), dtype, threads=2, level=level)


@pytest.mark.parametrize("level", LEVELS)
def test_activations_of_very_unlike_sizes_keep_their_bits(level: str) -> None:
    """A group has a scale of its own, so a group a million times larger takes no bits from the others."""
    weight = torch.randn(32, 256)
    weight[:, 64:128] = 0  # the large group meets no weights
    matrix = pack_matrix(MATRIX_FORMATS["int4"], weight)
    x = torch.randn(1, 256)
    x[:, 64:128] *= 1e6
    expected = x.double() @ matrix.unpack(torch.float64).T
    out = run_linear(matrix, x, threads=1, level=level)
    assert (out - expected).norm() / expected.norm() <= 1e-4


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("tokens", [1, 16, 40])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_an_activation_that_is_no_number_shows_in_every_result_of_its_token(
    level: str, name: str, tokens: int, bad: float
) -> None:
    x = torch.randn(tokens, 150)
    x[0, int(torch.randint(150, ()))] = bad
    out = run_linear(pack_matrix(MATRIX_FORMATS[name], torch.randn(70, 150)), x, threads=2, level=level)
    assert not out[0].isfinite().any()
    assert out[1:].isfinite().all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("gate", sorted(GATES))
@pytest.mark.parametrize("tokens", [1, 40])
def test_no_activation_function_hides_nan(level: str, gate: str, tokens: int) -> None:
    """As maxima and clamps do that return their other operand."""
    for name in ("bf16", "int8"):
        math = ExpertMath(ExpertShape(hidden=70, neurons=130), FORMATS[name], GATES[gate])
        x, work, _ = _random_step(math, tokens)
        token = int(work[0].rows[0])
        x[token, 5] = float("nan")
        out = torch.zeros_like(x)
        CpuExperts(2, level).run(math, x, work, out)
        assert out[token].isnan().all()
        assert out[[row for row in range(len(x)) if row != token]].isfinite().all()


@pytest.mark.sample(12)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["bf16", "int4"])
@pytest.mark.parametrize("tokens", [1, 5, 40, 300])  # with many, the tiles depend on the threads
def test_results_do_not_depend_on_the_number_of_threads(level: str, name: str, tokens: int) -> None:
    math = ExpertMath(ExpertShape(hidden=300, neurons=1300), FORMATS[name], GATES["silu"])
    x, work, _ = _random_step(math, tokens)
    results = []
    for threads in (1, 2, 3, 7):
        out = torch.zeros_like(x)
        CpuExperts(threads, level).run(math, x, work, out)
        results.append(out)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_twin_agrees_for_every_dtype_of_hidden_states(dtype: torch.dtype) -> None:
    math = ExpertMath(ExpertShape(hidden=70, neurons=130, has_bias=True), FORMATS["bf16"], GATES["gpt_oss"])
    x, work, _ = _random_step(math, 9)
    x = x.to(dtype).T.contiguous().T  # also strided
    ours, twin = torch.zeros(x.shape), torch.zeros(x.shape)
    CpuExperts(2).run(math, x, work, ours)
    run_experts(math, x, work, twin)
    assert (ours - twin).norm() / twin.norm() <= _tolerance("bf16", LEVELS[0], 9)


def test_more_tokens_than_a_tile_and_more_neurons_than_a_chunk() -> None:
    math = ExpertMath(ExpertShape(hidden=1200, neurons=2200), FORMATS["bf16"], GATES["silu"])
    x, work, expected = _random_step(math, 210)
    out = torch.zeros_like(x)
    CpuExperts(2).run(math, x, work, out)
    assert (out - expected).norm() / expected.norm() <= _tolerance("bf16", LEVELS[0], 210)


def test_no_work_and_no_tokens() -> None:
    math = ExpertMath(ExpertShape(hidden=8, neurons=64), FORMATS["fp32"], GATES["silu"])
    out = torch.ones(3, 8)
    CpuExperts(2).run(math, torch.randn(3, 8), [], out)
    packed = torch.zeros(math.format.expert_bytes(math.shape), dtype=torch.uint8)
    nobody = ExpertWork(packed, range(64), torch.empty(0, dtype=torch.int64), torch.empty(0))
    CpuExperts(2).run(math, torch.randn(3, 8), [nobody], out)
    assert torch.equal(out, torch.ones(3, 8))


@pytest.mark.parametrize("gate", sorted(GATES))
def test_a_gate_is_known_by_what_it_computes(gate: str) -> None:
    found = recognize(GATES[gate], True)
    assert found is not None
    if gate in ("gpt_oss", "deepseek_v4"):
        assert found == ("clamped_swiglu", *((1.702, 0.8, 1.0) if gate == "gpt_oss" else (1.0, 0.6, 0.0)))
    else:
        assert found[0] == gate
        assert recognize(GATES[gate], False) == found


@pytest.mark.parametrize(
    "gate",
    [
        lambda g, u: torch.tanh(g) * u,
        lambda g, u: torch.nn.functional.silu(g.clamp(max=5)) * u,  # clamps one side only
        lambda g, u: torch.nn.functional.silu(u) * g,  # the other way round
        lambda g, u: torch.nn.functional.silu(g) * u.tanh(),
        lambda g, u: torch.nn.functional.silu(g) * u + 0.001,
        lambda g, u: (torch.nn.functional.silu(g) * u).sum(-1, keepdim=True).expand_as(g),
    ],
)
def test_another_gate_goes_to_the_twin(gate: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert recognize(gate, True) is None


def test_a_gate_that_cannot_be_tried_goes_to_the_twin_and_says_so() -> None:
    def refuse(gate: Tensor | None, up: Tensor) -> Tensor:
        raise ValueError("only 3-D")

    with pytest.warns(UserWarning, match="could not be tried"):
        assert recognize(refuse, True) is None


def test_a_level_that_is_not_here_is_refused() -> None:
    math = ExpertMath(ExpertShape(hidden=8, neurons=64), FORMATS["fp32"], GATES["silu"])
    x, work, _ = _random_step(math, 1)
    with pytest.raises(ValueError, match="this CPU does not run the kernels for sparc"):
        CpuExperts(1, "sparc").run(math, x, work, torch.zeros_like(x))


def test_without_the_extension_the_twin_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    math = ExpertMath(ExpertShape(hidden=24, neurons=100), FORMATS["bf16"], GATES["silu"])
    x, work, expected = _random_step(math, 4)
    monkeypatch.setattr(cpu, "_kernels", None)
    assert levels() == {}
    experts = CpuExperts(2)
    assert experts.kernel(math) is None
    out = torch.zeros_like(x)
    experts.run(math, x, work, out)
    assert (out - expected).norm() / expected.norm() <= TOLERANCE


def test_a_level_may_be_named_for_the_whole_process() -> None:
    """As by a user who wants to know what another CPU would get; in its own process, since it holds for good."""
    code = (
        "import torch; from moestro.compute.cpu import *; from moestro.memory.formats import MATRIX_FORMATS as F;"
        "torch.manual_seed(0); w, x = torch.randn(33, 70), torch.randn(1, 70);"
        "m = Matrix(F['int4'].pack(w).flatten(), F['int4'], 33, 70);"
        "print(best_level(), torch.equal(run_linear(m, x, threads=1), run_linear(m, x, threads=1, level='scalar')))"
    )
    for level, printed in [("scalar", "scalar True"), ("sparc", "MOESTRO_LEVEL=sparc: this CPU runs")]:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"MOESTRO_LEVEL": level},
            capture_output=True,
            text=True,
            check=False,
        )
        assert printed in done.stdout + done.stderr
        assert (done.returncode == 0) == (level == "scalar")
