"""Our half-quadratic solver against the `hqq` package's, its torch twin, and weights that have no usual spread."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hqq.core.quantize import Quantizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import moestro
from moestro.compute import cpu
from moestro.compute.cpu import levels, solve_hqq, write_fitted
from moestro.errors import CheckpointError
from moestro.memory.formats import MATRIX_FORMATS
from moestro.memory.formats.hqq_solver import SOLVER_BITS, SOLVER_GROUPS, Fitted, solve_in_torch
from moestro.memory.formats.quantize import quantize_int4, write_in_torch

DEMO = Path(moestro.__file__).parent / "demo"
LEVELS = [*(name for name, usable in levels().items() if usable), "torch"]
LEAST_SCALE = 1 / 2e4  # the package takes no finer steps
EQUAL_CODES, WORSE_ERROR = 0.999, 1.001


def _student(rows: int, columns: int) -> Tensor:
    outliers = torch.where(torch.rand(rows, columns) < 1e-3, 20.0, 1.0)
    return torch.distributions.StudentT(4.0).sample((rows, columns)) * 0.02 * outliers


def _kinds() -> dict[str, Tensor]:
    """Weights [R, K] by what they are: five kinds of random ones, and the demo's."""
    torch.manual_seed(0)
    rows, columns = 192, 640
    per_row = 0.01 * 1000 ** torch.rand(rows, 1)
    kinds = {
        "normal": torch.randn(rows, columns) * 0.02,
        "laplace": torch.distributions.Laplace(0.0, 0.02).sample((rows, columns)),
        "uniform": (torch.rand(rows, columns) - 0.5) * 0.1,
        "student": _student(rows, columns),
        "rows": torch.randn(rows, columns) * per_row,
    }
    kinds = {name: weights.bfloat16() for name, weights in kinds.items()}
    for name, weights in load_file(DEMO / "model.safetensors").items():
        if (
            weights.dim() == 2
            and ("layers.0" in name or "layers" not in name)
            and not re.search(r"experts\.[2-9]", name)
        ):
            kinds[f"demo {name}"] = weights
    return kinds


KINDS = _kinds()


def _by_package(weights: Tensor, bits: int, group: int, *, fit: bool = True) -> Fitted:
    padded = torch.nn.functional.pad(weights.float(), (0, -weights.shape[1] % group))
    whole, meta = Quantizer.quantize(
        padded,
        nbits=bits,
        group_size=group,
        axis=1,
        round_zero=bits == 4,
        optimize=fit,
        bitpack=False,
        device="cpu",
    )
    sides = (meta[name].view(len(weights), -1) for name in ("scale", "zero"))
    return Fitted(whole.view(padded.shape).to(torch.uint8), *sides)


def _values(fitted: Fitted, weights: Tensor) -> Tensor:
    codes = fitted.codes.float().unflatten(1, (fitted.scales.shape[1], -1))
    return ((codes - fitted.zeros[..., None]) * fitted.scales[..., None]).flatten(1)[:, : weights.shape[1]]


def _error(fitted: Fitted, weights: Tensor) -> float:
    return float((weights.double() - _values(fitted, weights)).abs().mean())


@pytest.mark.parametrize("fit", [True, False], ids=["fit", "nearest"])
@pytest.mark.parametrize("group", [16, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_as_the_package(kind: str, bits: int, group: int, fit: bool) -> None:
    weights = KINDS[kind]
    ours, theirs = solve_hqq(weights, bits=bits, group=group, fit=fit), _by_package(weights, bits, group, fit=fit)
    can_step = (ours.scales > LEAST_SCALE).repeat_interleave(group, 1)
    assert can_step.float().mean() > 0.9
    assert (ours.codes == theirs.codes)[can_step].float().mean() >= EQUAL_CODES
    assert _error(ours, weights) <= WORSE_ERROR * _error(theirs, weights)
    assert int(ours.codes.max()) < 2**bits


@pytest.mark.parametrize("bits", SOLVER_BITS)
def test_levels_agree_with_the_twin(bits: int) -> None:
    for group in SOLVER_GROUPS:
        # The last: where many errors are shrunk to more than 0.
        for dtype, spread in ((torch.float32, 0.02), (torch.float16, 0.02), (torch.bfloat16, 2.0)):
            weights = (torch.randn(37, 330) * spread).to(dtype)
            twin = solve_in_torch(weights, bits=bits, group=group, fit=True)
            for level in LEVELS[:-1]:
                ours = solve_hqq(weights, bits=bits, group=group, fit=True, threads=1, level=level)
                assert torch.equal(ours.scales, twin.scales)
                assert (ours.codes == twin.codes).float().mean() >= EQUAL_CODES
                assert _error(ours, weights) <= WORSE_ERROR * _error(twin, weights)


@pytest.mark.skipif(len(LEVELS) < 3, reason="one level alone")
def test_levels_are_equal_where_nothing_is_shrunk() -> None:
    weights = torch.randn(67, 330) * 0.02
    first, *others = (solve_hqq(weights, bits=3, group=32, fit=True, level=level) for level in LEVELS[:-1])
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.skipif(not levels(), reason="built without the kernels")
def test_threads_change_nothing() -> None:
    weights = (torch.randn(400, 1000) * 0.3).bfloat16()  # seven items
    first, *others = (solve_hqq(weights, bits=2, group=16, fit=True, threads=threads) for threads in (1, 2, 3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from(SOLVER_BITS),
    exponent=st.integers(-45, 38),
    middle=st.sampled_from([0.0, 1.0, -1.0, 3.0]),
    narrow=st.sampled_from([0.0, 1e-7, 1e-4, 1.0]),
    fit=st.booleans(),
)
def test_any_finite_weights_keep_their_size(
    level: str, bits: int, exponent: int, middle: float, narrow: float, fit: bool
) -> None:
    """Zeros, equal weights, tiny and huge ones: each comes back within a step of its group, or float32's own error."""
    most = torch.finfo(torch.float32).max
    spread = (torch.rand(20, 70, dtype=torch.float64) - 0.5) * narrow
    weights = ((middle + spread) * 10.0**exponent).clamp(-most, most).float()
    weights[3], weights[5, :64] = 0, weights[5, 0]
    found = solve_hqq(weights, bits=bits, group=64, fit=fit, level=level)
    assert all(bool(part.isfinite().all()) for part in found)
    codes = found.codes.double().unflatten(1, (2, 64))
    values = ((codes - found.zeros.double()[..., None]) * found.scales.double()[..., None]).flatten(1)[:, :70]
    groups = torch.nn.functional.pad(weights.double(), (0, 58)).unflatten(1, (2, 64))
    step = (groups.amax(2) - groups.amin(2)) / (2**bits - 1)
    allowed = step * (4 if fit else 1.01) + groups.abs().amax(2) * 2**-20 + 4e-30
    error = (values - weights).abs()
    assert (error <= allowed.repeat_interleave(64, 1)[:, :70]).all()
    assert (values[3] == 0).all()


@pytest.mark.parametrize("fit", [True, False])
def test_int4_holds_what_float16_can_scale(fit: bool) -> None:
    weights = torch.zeros(8, 128)
    weights[0] = 1.0 + torch.rand(128) * 1e-4  # far from zero
    weights[1], weights[2], weights[3] = 1e6, -3e-6, torch.rand(128) * 2e-6
    weights[4], weights[5] = torch.rand(128) * 9e5, -100 + torch.rand(128) * 1e-2
    coded = quantize_int4(weights, 64, fit=fit)
    assert coded.zeros is not None
    fitted = Fitted(coded.codes, coded.scales.float(), coded.zeros.float())
    values = _values(fitted, weights)
    span = weights.amax(1, keepdim=True) - weights.amin(1, keepdim=True)
    allowed = span / 15 * (4 if fit else 0.55) + weights.abs().amax(1, keepdim=True) * 2**-10 + 2**-24
    assert ((values - weights).abs() <= allowed).all()
    with pytest.raises(CheckpointError, match=r"lie between -6e\+05 and 6e\+05, but 16 numbers with a float16"):
        quantize_int4(torch.tensor([[-6e5, 6e5] * 32]), 64)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("fit", [True, False])
def test_weights_that_are_not_finite_are_named(level: str, bad: float, fit: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for row, column in [(0, 0), (40, 63), (69, 199)]:
            weights = torch.randn(70, 200).to(dtype)
            weights[row, column] = bad
            with pytest.raises(CheckpointError, match=f"a weight is {bad}, in row {row} and column {column} of"):
                solve_hqq(weights, bits=4, group=64, fit=fit, level=level)


def test_bits_and_groups_that_there_are_not() -> None:
    from moestro.memory.formats.hqq_solver import solve_hqq as any_solver

    for bits, group in [(1, 64), (7, 64), (9, 64), (4, 8), (4, 48), (4, 256), (4, 0)]:
        with pytest.raises(ValueError, match="nothing here quantizes to"):
            any_solver(torch.randn(4, 64), bits=bits, group=group)


def test_formats_take_the_kernels_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the twin without kernels, with the same panels but for the few codes in which the two differ."""
    if levels():
        monkeypatch.setattr("moestro.memory.formats.hqq_solver.solve_in_torch", None)
        monkeypatch.setattr(cpu.hqq_solver, "solve_in_torch", None)
    weights, fmt = torch.randn(64, 256) * 0.02, MATRIX_FORMATS["int4"]
    by_kernels = fmt.unpack(fmt.pack(weights), 256, torch.float32)
    monkeypatch.undo()
    monkeypatch.setattr(cpu, "_kernels", None)
    by_twin = fmt.unpack(fmt.pack(weights), 256, torch.float32)
    assert torch.allclose(by_kernels, by_twin, atol=1e-4)


@pytest.mark.parametrize("first", [pytest.param("", marks=pytest.mark.long), "import moestro.memory.formats;"])
def test_loading_a_model_takes_the_kernels_solver(first: str) -> None:
    code = (
        "import sys, moestro.loading.model, moestro.memory.formats.hqq_solver as solver;"
        "print(solver._solver is sys.modules['moestro.compute.cpu'].solve_hqq)"
    )
    done = subprocess.run([sys.executable, "-c", first + code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize("fit", [True, False])
def test_strides_and_gradients_and_no_rows(fit: bool) -> None:
    weights = torch.nn.Parameter(torch.randn(96, 70).T.mul(0.02))
    a, b = (solve_hqq(each, bits=4, group=32, fit=fit) for each in (weights, weights.detach().contiguous()))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not any(part.requires_grad for part in a)
    assert solve_hqq(torch.randn(0, 70), bits=4, group=64, fit=fit).codes.shape == (0, 128)


@pytest.mark.skipif(not levels(), reason="built without the kernels: no compiler was there")
@pytest.mark.parametrize("name", ["hqq4", "hqq3", "hqq2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_panels_with_bytes_are_what_the_twin_writes(name: str, dtype: torch.dtype, kind: str) -> None:
    """Odd sizes too, and rows of zeros, of equal weights and of one sign."""
    fmt, rows, columns = MATRIX_FORMATS[name], int(torch.randint(4, 40, ())), int(torch.randint(1, 600, ()))
    matrix = KINDS[kind][:rows, :columns].to(dtype).clone()
    matrix[0], matrix[1], matrix[2] = 0, -0.5, matrix[2].abs() + 1
    fitted = solve_hqq(matrix, bits=fmt.code_bits, group=fmt.group, fit=True)
    ours, twins = torch.zeros(2, 1, fmt.matrix_bytes(*matrix.shape), dtype=torch.uint8)
    write_fitted(matrix, fmt, fitted, ours, threads=2)
    write_in_torch(matrix, fmt, fitted, twins)
    assert torch.equal(ours, twins)
