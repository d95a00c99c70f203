"""2 to 64 tokens of an expert in the Triton kernels: weights are read once for all, and a row is as it is alone.

As `test_gpu_kernels.py`: on the GPU where there is one, else by Triton's interpreter on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from moestro.compute.experts import ExpertWork
from moestro.compute.gpu import kernel, launch, linear, plan_of, plan_on_device, run_linear
from moestro.compute.gpu.plan import PlanPart
from moestro.memory.formats import format_named
from test_gpu_kernels import DEVICE, Layer, _layer, choice, tiles_of, tolerance
from test_gpu_linear import random_matrix, states

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflow, in the interpreter


def random_work(layer: Layer, counts: list[int], tokens: int) -> list[ExpertWork]:
    """For each expert so many of the tokens, by random weights."""
    found = []
    for slot, count in zip(layer.slots, counts, strict=True):
        rows = torch.randperm(tokens)[:count].sort().values
        found.append(ExpertWork(layer.pool[slot], range(layer.math.shape.neurons), rows, torch.rand(count) + 0.1))
    return found


def pairs_of_tiles(part: PlanPart) -> dict[int, list[int]]:
    """Of each slot, the pairs of its tiles."""
    found: dict[int, list[int]] = {}
    for tiles in tiles_of(part).values():
        for slot, _, _, first, stop in tiles:
            found.setdefault(slot, []).append(stop - first)
    return found


@pytest.mark.parametrize("has_tensor_cores", [True, False])
def test_up_to_64_pairs_of_an_expert_are_one_tile(has_tensor_cores: bool) -> None:
    """Of either builder, at any number of tokens; a tile reads an expert's weights once."""
    layer = _layer("bf16", "bf16", hidden=8, neurons=8)
    layer.kernel, most = replace(layer.kernel, has_tensor_cores=has_tensor_cores), 64 if has_tensor_cores else 32
    for tokens in (2, *torch.randint(3, 17, (3,)).tolist(), *torch.randint(17, 65, (4,)).tolist(), 64, 100):
        index = torch.full((tokens, 2), 3)
        for token in range(tokens):  # the third expert is chosen seldom, and some choices are nobody's
            index[token] = torch.tensor([0.9, 0.8, 0.1, 0.3]).multinomial(2)
        weights = torch.rand(tokens, 2) + 0.1
        counts = torch.bincount(index.flatten(), minlength=4)[:3].tolist()
        wanted = {slot: [count] for slot, count in zip(layer.slots.tolist(), counts, strict=True) if 0 < count <= most}
        work = [item for item in layer.work(index, weights) if len(item.rows)]
        (by_host,) = plan_of(layer.kernel, layer.pool, work, tokens).parts
        (by_device,) = plan_on_device(layer.kernel, index.to(DEVICE), weights.to(DEVICE), layer.table).parts
        for part in (by_host, by_device):
            found = pairs_of_tiles(part)
            assert {slot: sizes for slot, sizes in found.items() if slot in wanted} == wanted
            assert sorted(map(sum, found.values())) == sorted(count for count in counts if count)
        if tokens <= 16 and has_tensor_cores:
            assert [rows for rows, _ in by_device.groups] == [16]  # nothing but what one token needs


@pytest.mark.parametrize("name", ["bf16", "int4"])
def test_experts_of_few_and_many_pairs_in_one_step(name: str) -> None:
    """Each in a tile of its own size, into poisoned memory."""
    layer, tokens = _layer(name, "bf16", hidden=70, neurons=70, has_bias=True), 60
    counts = [int(torch.randint(low, high, ())) for low, high in ((2, 17), (17, 33), (33, 61))]
    x, work = layer.x(tokens), random_work(layer, counts, tokens)
    plan = plan_of(layer.kernel, layer.pool, work, tokens)
    assert [len(tiles) for _, tiles in plan.parts[0].groups] == [1, 1, 1]
    out = layer.run(plan, x)
    assert (error := layer.error(out, layer.expected(x, work))) <= tolerance(layer.kernel), f"{counts} {error:.1e}"


@contextmanager
def ordered_products() -> Iterator[None]:
    """In the interpreter, sums of products in the order of columns: BLAS has another one for each number of rows."""
    if DEVICE.type == "cuda":
        yield
        return
    from triton import language
    from triton.runtime import interpreter

    def numbers(handle: Any) -> Any:
        if handle.dtype.scalar == language.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data.astype(np.float32)

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        left, right, total = numbers(a), numbers(b), d.data
        for k in range(left.shape[1]):
            total = total + left[:, [k]] * right[[k]]
        return interpreter.TensorHandle(total, d.dtype.scalar)

    with mock.patch.object(interpreter.InterpreterBuilder, "create_dot", dot):
        yield


# A GPU of the Hopper kind multiplies tiles of 64 rows by other instructions, whose sums may have other bits.
MOST_ALIKE = 64 if DEVICE.type == "cpu" or torch.cuda.get_device_capability() < (9, 0) else 32


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["bf16", "int4"])
def test_a_row_is_the_same_alone_and_beside(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is in the step: the number of tokens, who else chose its experts, and how many programs there are."""
    monkeypatch.setattr(kernel, "_LEAST_BLOCKS", 1)
    layer = _layer(name, "bf16", hidden=24, neurons=133, has_bias=True)
    assert layer.kernel.segments == 3
    x, (index, weights) = layer.x(MOST_ALIKE), choice(MOST_ALIKE, k=2)
    splits = set()

    def run(rows: Tensor) -> Tensor:
        plan = plan_of(layer.kernel, layer.pool, layer.work(index[rows], weights[rows]), len(rows))
        splits.add(launch._workspace(layer.kernel, plan.parts[0], plan.limit_bytes).splits)
        return layer.run(plan, x[rows.to(DEVICE)])

    with ordered_products():
        alone = run(torch.tensor([5]))[0]
        for tokens in (26, MOST_ALIKE):
            rows = torch.randperm(MOST_ALIKE)[:tokens]
            rows = torch.cat([rows[rows != 5], torch.tensor([5])])
            with mock.patch.object(launch, "ENOUGH_PROGRAMS", 3):
                assert torch.equal(run(rows)[-1], alone)
    assert splits == {1, 3}


@pytest.mark.parametrize("name", ["bf16", "int4"])
def test_a_row_of_a_linear_layer_is_the_same_alone_and_beside(name: str) -> None:
    matrix = random_matrix(format_named(name), 20, 530)
    x = states(matrix, MOST_ALIKE, torch.bfloat16)
    tiles = linear._tiles
    with ordered_products():
        alone = run_linear(matrix, x[3:4])[0]
        for tokens in (20, MOST_ALIKE):
            assert torch.equal(run_linear(matrix, x[:tokens])[3], alone)
        with mock.patch.object(linear, "_tiles", lambda *given: (*tiles(*given)[:2], 1)):  # as with many programs
            assert torch.equal(run_linear(matrix, x[:4])[3], alone)
            assert tiles(linear._spec_of(matrix, x), 4)[2] == 2
