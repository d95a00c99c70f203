"""Packed linear layers and embeddings in Triton, in every format; interpreted where there is no GPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.compute import cpu, gpu
from moestro.compute.cpu import Matrix
from moestro.compute.gpu import launch, linear_workspace_bytes, look_up, run_linear
from moestro.errors import RequestError
from moestro.memory.formats import MatrixFormat, format_named
from test_formats import random_coded
from test_gpu_formats import FORMATS
from test_gpu_kernels import DEVICE

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflow, in the interpreter

ROUNDED = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # by the result's dtype, of the largest


def random_matrix(fmt: MatrixFormat, rows: int, columns: int, *, bias: bool = True) -> Matrix:
    if fmt.is_quantized:
        packed = fmt.write(random_coded(fmt, rows, columns, finite=True))
    else:
        packed = fmt.pack(torch.randn(rows, columns))
    return Matrix(packed.flatten().to(DEVICE), fmt, rows, columns, torch.randn(rows).to(DEVICE) if bias else None)


def states(matrix: Matrix, tokens: int, dtype: torch.dtype) -> Tensor:
    """Activations that make results of usual size."""
    size = matrix.unpack(torch.float32).square().mean().sqrt().cpu() * matrix.columns**0.5
    return (torch.randn(tokens, matrix.columns) / size).to(dtype).to(DEVICE)


def exact(matrix: Matrix, x: Tensor) -> Tensor:
    """float64 [T, R]."""
    bias = None if matrix.bias is None else matrix.bias.cpu().double()
    return torch.nn.functional.linear(x.cpu().double(), matrix.unpack(torch.float64).cpu(), bias)


def check(matrix: Matrix, x: Tensor) -> None:
    expected, out = exact(matrix, x), run_linear(matrix, x)
    assert out.dtype == x.dtype
    error = float((out.cpu() - expected).abs().max() / expected.abs().max())
    assert error <= ROUNDED[x.dtype], f"{matrix.fmt.name}: {error:.1e}"


@pytest.fixture
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs of many rows each: the interpreter takes as long for a row as for hundreds."""
    wide = launch.TILINGS[16]._replace(down=128)
    monkeypatch.setattr(gpu.linear, "TILINGS", dict.fromkeys(launch.TILINGS, wide))


@pytest.fixture(autouse=True)
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the layers allocate, full of NaN at first."""
    made: list[Tensor] = []

    def empty(*size: Any, **options: Any) -> Tensor:
        made.append(torch.full(size[0] if isinstance(size[0], tuple) else size, float("nan"), **options))
        return made[-1]

    monkeypatch.setattr(gpu.linear, "torch", SimpleNamespace(**vars(torch) | {"empty": empty}))
    return made


@pytest.mark.sample(12)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.usefixtures("wide_tiles")
def test_every_format_against_float64(fmt: MatrixFormat) -> None:
    rows, columns = (int(n) for n in torch.randint(1, 150, (2,)))
    matrix = random_matrix(fmt, rows, (fmt.unit or 0) + columns)
    check(matrix, states(matrix, 3, torch.float32))
    check(matrix, states(matrix, 1, torch.float16))
    ids = torch.randint(0, rows, (2, 5)).to(DEVICE)
    exactly = matrix.unpack(torch.float64)[ids].cpu()
    found = look_up(matrix, ids, torch.float32)
    assert ((found.cpu() - exactly).abs() <= 2e-7 * exactly.abs().max() + 2**-20 * exactly.abs()).all()
    twin = cpu.look_up(_on_host(matrix), ids.cpu(), torch.float32, threads=1, level="torch")
    assert torch.equal(twin, matrix.unpack(torch.float32)[ids].cpu())


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", ["bf16", "int4", "q6_k", "mxfp4"])
@pytest.mark.parametrize("tokens", [1, 17, 70])
def test_numbers_of_tokens(name: str, tokens: int) -> None:
    matrix = random_matrix(format_named(name), 80, 700, bias=tokens != 17)  # one token: two splits of 11 chunks
    check(matrix, states(matrix, tokens, torch.bfloat16))


@pytest.mark.long
def test_many_tokens_and_the_same_bits_in_every_run() -> None:
    matrix = random_matrix(format_named("mxfp4"), 40, 96)
    x = states(matrix, 300, torch.float16)
    check(matrix, x)
    assert torch.equal(run_linear(matrix, x), run_linear(matrix, x))


def test_leading_dimensions_stay_and_nothing_gives_nothing() -> None:
    matrix = random_matrix(format_named("q4_k"), 40, 256)
    x = states(matrix, 6, torch.float32).view(2, 3, 256)
    assert torch.equal(run_linear(matrix, x).flatten(0, 1), run_linear(matrix, x.flatten(0, 1)))
    assert run_linear(matrix, x[:0]).shape == (0, 3, 40)
    assert look_up(matrix, torch.empty(0, 2, dtype=torch.int64, device=DEVICE), torch.float16).shape == (0, 2, 256)
    assert torch.equal(run_linear(matrix, x.mT.contiguous().mT), run_linear(matrix, x))


def test_scales_that_no_float16_has() -> None:
    """Products stay finite: scales are applied to float32 sums."""
    for name in ("mxfp4", "mxfp8"):
        fmt = format_named(name)
        coded = random_coded(fmt, 32, 64, finite=True)
        for exponent in (0, 1, 60, 200):
            scales = torch.full_like(coded.scales, exponent)
            matrix = Matrix(fmt.write(replace(coded, scales=scales)).flatten().to(DEVICE), fmt, 32, 64)
            x = torch.randn(2, 64).to(torch.bfloat16)
            wide = (x.float() * 2.0**10).to(DEVICE)  # so that results under the least scales are usual float32 numbers
            for states, bound in ((x.half().to(DEVICE), None), (wide, 2e-6)):
                out, expected = run_linear(matrix, states).cpu(), exact(matrix, states)
                if bound is None:  # float16 results of large scales are infinite, as torch rounds them; never NaN
                    assert not out.isnan().any()
                else:
                    assert (out - expected).abs().max() <= bound * expected.abs().max()


def _on_host(matrix: Matrix) -> Matrix:
    return replace(matrix, packed=matrix.packed.cpu(), bias=None if matrix.bias is None else matrix.bias.cpu())


def test_the_twin_agrees() -> None:
    matrix = random_matrix(format_named("q5_k"), 5000, 70)
    x = states(matrix, 2, torch.float32)
    expected = exact(matrix, x)
    twin = cpu.run_linear(_on_host(matrix), x.cpu(), threads=1, level="torch")
    assert (twin - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("tokens", [1, 40])
def test_what_is_allocated_is_counted(tokens: int, allocated: list[Tensor]) -> None:
    matrix = random_matrix(format_named("q8_0"), 33, 600)
    x = states(matrix, tokens, torch.bfloat16)
    out = run_linear(matrix, x)
    total = sum(tensor.nbytes for tensor in allocated if tensor.data_ptr() != out.data_ptr())
    assert total == linear_workspace_bytes(matrix, tokens, x.dtype, DEVICE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.zeros(64, dtype=torch.uint8)}, "is 576 bytes, not 64 of torch.uint8"),
        ({"packed": torch.zeros(72)}, "not 72 of torch.float32"),
        ({"bias": torch.zeros(3)}, "a bias of 16 float32, not 3 of torch.float32"),
        ({"bias": torch.zeros(16).half()}, "not 16 of torch.float16"),
    ],
)
def test_tensors_that_are_not_what_the_matrix_says_are_refused(change: dict[str, Tensor], message: str) -> None:
    matrix = random_matrix(format_named("mxfp4"), 16, 32)
    changed = replace(matrix, **{name: value.to(DEVICE) for name, value in change.items()})
    with pytest.raises(ValueError, match=message):
        run_linear(changed, torch.zeros(1, 32, device=DEVICE))


def test_activations_that_do_not_fit_are_refused() -> None:
    matrix = random_matrix(format_named("mxfp4"), 16, 32)
    for x in (torch.zeros(1, 31), torch.zeros(1, 32, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"x \[..., 32\] in float16, bfloat16 or float32"):
            run_linear(matrix, x.to(DEVICE))
    with pytest.raises(ValueError, match="on meta"):
        run_linear(replace(matrix, packed=matrix.packed.to("meta")), torch.zeros(1, 32, device=DEVICE))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="an assertion that fails on a GPU ends the process's use of it")
@pytest.mark.parametrize("bad", [-1, 20])
def test_ids_that_are_no_row_are_refused(bad: int) -> None:
    table = random_matrix(format_named("q8_0"), 20, 64)
    ids = torch.tensor([3, bad])
    with pytest.raises(IndexError):
        look_up(table, ids, torch.float32)
    with pytest.raises(IndexError):
        cpu.look_up(table, ids, torch.float32, threads=1, level="torch")


def test_without_triton_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = random_matrix(format_named("int8"), 16, 64)
    x = states(matrix, 1, torch.float32)
    monkeypatch.setattr(gpu.linear, "triton_kernels", lambda: None)
    with pytest.raises(RequestError, match="Triton is not installed"):
        run_linear(matrix, x)
    with pytest.raises(RequestError, match="Triton is not installed"):
        look_up(matrix, torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.float32)
