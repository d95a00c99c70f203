"""Every stored format in the Triton kernels, against float64 of the exact weights.

As `test_gpu_kernels.py`: on the GPU where there is one, else by Triton's interpreter on CPU tensors.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moestro.compute.experts import ExpertMath, ExpertWork, run_experts
from moestro.compute.gpu import launch, plan_of, plan_on_device
from moestro.devices.emulated import EmulatedDevice
from moestro.devices.work import StepSum
from moestro.memory.formats import (
    ExpertFormat,
    ExpertShape,
    MatrixFormat,
    expert_format_named,
    format_named,
    format_names,
)
from test_cpu_kernels import GATES
from test_formats import UNIFORM, random_coded
from test_gpu_kernels import DEVICE, DTYPES, Layer, choice, tolerance

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflow, in the interpreter

NAMED = list(map(format_named, format_names()))
FORMATS = [*NAMED, *UNIFORM[::3]]  # the others, in all dtypes: make test-long
MIXED = [
    ("q4_k", "q4_k", "q6_k", None),  # gate and up in one order, down in another
    ("q4_k", "q6_k", "q4_k", None),  # hidden states in two orders
    ("q5_1", "q3_k", "iq4_xs", None),
    ("bf16", "bf16", "q8_0", 128),
    ("int4", "int4g32z", "bf16", 256),  # one order, of which one takes sums in pieces of its own
    ("q4_0", "q4_1", "fp16", None),  # one order, and gate alone takes no sums
    ("q4_1", "q4_0", "mxfp4", None),
    ("fp8", "int8", "nvfp4", 128),
    ("fp32", "fp16", "int8row", None),
]


def random_part(fmt: MatrixFormat, rows: int, columns: int) -> Tensor | object:
    """Random floats, or random codes with scales of usual sizes."""
    return random_coded(fmt, rows, columns, finite=True) if fmt.is_quantized else torch.randn(rows, columns)


class StoredLayer(Layer):
    """Random experts as a checkpoint has them, with hidden states that make results of usual size."""

    def fill(self, packed: Tensor) -> None:
        shape, fmt = self.math.shape, self.math.format
        sizes = {name: size for name, size in shape.parts.items() if len(size) == 2}
        parts = {name: random_part(fmt.matrices[name], *size) for name, size in sizes.items()}
        coded = {name: part for name, part in parts.items() if not isinstance(part, Tensor)}
        fmt.pack_coded(packed, shape, coded)
        biases = {name: torch.randn(size) for name, size in shape.parts.items() if len(size) == 1}
        fmt.pack(packed, shape, biases | {name: part for name, part in parts.items() if isinstance(part, Tensor)})

    def x(self, tokens: int) -> Tensor:
        packed = self.pool[self.slots[0]].cpu()
        up = self.math.format.unpack(packed, self.math.shape, range(self.math.shape.neurons), torch.float32).up
        size = up.square().mean().sqrt() * self.math.shape.hidden**0.5
        return (torch.randn(tokens, self.math.shape.hidden) / size).to(self.dtype).to(DEVICE)


def stored_layer(
    formats: tuple[str, str, str],
    block: int | None,
    x: str,
    hidden: int,
    neurons: int,
    *,
    gate: str = "silu",
    **shape: bool,
) -> StoredLayer:
    gate_format, up, down = map(format_named, formats)
    fmt = ExpertFormat(down, block, gate=gate_format, up=up)
    return StoredLayer(ExpertMath(ExpertShape(hidden, neurons, **shape), fmt, GATES[gate]), DTYPES[x], experts=2)


def check_pairs(layer: StoredLayer, pairs: int) -> None:
    """One expert with so many of a few more tokens, against float64 and the twin."""
    tokens = pairs + 3
    rows = torch.randperm(tokens)[:pairs].sort().values
    x, neurons = layer.x(tokens), range(layer.math.shape.neurons)
    work = [ExpertWork(layer.pool[layer.slots[0]], neurons, rows, torch.rand(pairs) + 0.1)]
    out = layer.run(plan_of(layer.kernel, layer.pool, work, tokens), x)
    assert (error := layer.error(out, layer.expected(x, work))) <= tolerance(layer.kernel), f"{pairs}: {error:.1e}"
    twin = torch.zeros(x.shape, device=DEVICE)
    run_experts(layer.math, x, [w._replace(rows=w.rows.to(DEVICE), weights=w.weights.to(DEVICE)) for w in work], twin)
    assert layer.error(out, twin.cpu()) <= tolerance(layer.kernel) + 2e-6


def check(layer: StoredLayer, tokens: int) -> None:
    """A random choice of experts, against float64."""
    index, weights = choice(tokens, experts=2, k=1)
    x, work = layer.x(tokens), layer.work(index, weights)
    out = layer.run(plan_on_device(layer.kernel, index.to(DEVICE), weights.to(DEVICE), layer.table), x)
    assert (error := layer.error(out, layer.expected(x, work))) <= tolerance(layer.kernel), f"{error:.1e}"


@pytest.fixture
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs of many rows each: the interpreter takes as long for a row as for hundreds."""
    wide = launch.TILINGS[16]._replace(gate_up=64, down=512)
    monkeypatch.setattr(launch, "TILINGS", dict.fromkeys(launch.TILINGS, wide))


def odd_shape(fmt: MatrixFormat) -> tuple[int, int]:
    """Hidden states and neurons of more than a unit, which neither 64 nor a block of down's divides."""
    hidden = (fmt.unit or 64) + int(torch.randint(1, 80, ()))
    return hidden, fmt.block + int(torch.randint(1, 40, ()))


@pytest.mark.sample(6)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.usefixtures("wide_tiles")
def test_every_format_against_float64(fmt: MatrixFormat) -> None:
    x = list(DTYPES)[int(torch.randint(3, ()))]
    hidden, neurons = odd_shape(fmt)
    pairs = int(torch.randint(1, 65, ()))  # one tile, of 16 to 64 rows, which is rarely full
    check_pairs(stored_layer((fmt.name,) * 3, None, x, hidden, neurons, has_bias=True), pairs)


@pytest.mark.sample(2)
@pytest.mark.parametrize("case", MIXED, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.usefixtures("wide_tiles")
def test_a_format_for_each_matrix(case: tuple[str, str, str, int | None]) -> None:
    *formats, block = case
    layer = stored_layer(tuple(formats), block, "fp16", 300, (block or 256) + 30, has_bias=True)
    check_pairs(layer, int(torch.randint(1, 65, ())))


@pytest.mark.long
@pytest.mark.parametrize("has_gate", [True, False], ids=["gate", "plain"])
@pytest.mark.parametrize("x", list(DTYPES))
@pytest.mark.parametrize("fmt", [*NAMED, *UNIFORM], ids=lambda fmt: fmt.name)
def test_every_format_in_all_dtypes_and_blocks(fmt: MatrixFormat, x: str, has_gate: bool) -> None:
    hidden, neurons = odd_shape(fmt)
    for block in (64, 128, 256):
        if block % fmt.block == 0:
            gate = "gpt_oss" if has_gate else "relu2"
            layer = stored_layer(
                (fmt.name,) * 3, block, x, hidden, neurons + block, gate=gate, has_gate=has_gate, has_bias=block == 128
            )
            check(layer, tokens=20)


@pytest.mark.parametrize("names", ["q4_k+q4_k+q6_k", "mxfp4", "fp8", "nvfp4", "int4g128z", "q5_1+q3_k+iq4_nl"])
def test_the_emulated_device_copies_and_computes_them(names: str) -> None:
    """One expert whole, of another the neurons of its first block, into slots that were full of poison."""
    fmt = expert_format_named(names)
    neurons = 2 * fmt.block + 20
    layer = StoredLayer(
        ExpertMath(ExpertShape(300, neurons, has_bias=True), fmt, GATES["silu"]), torch.float32, experts=2
    )
    device = EmulatedDevice(link_gbps=None)
    pool = device.pool(2, fmt.expert_bytes(layer.math.shape)).fill_(0xFF)
    x, (index, weights) = layer.x(5), choice(5, experts=2, k=2)
    total, done = StepSum(x.cpu(), pool), []
    work = [item._replace(rows=item.rows.contiguous()) for item in layer.work(index, weights)]
    work[1] = work[1]._replace(neurons=range(fmt.block))
    try:
        for slot, item in enumerate(work):
            span = fmt.byte_range(layer.math.shape, item.neurons)
            source, target = item.packed.cpu()[span.start : span.stop], pool[slot, span.start : span.stop]
            copy = device.copy(source, target, True, (0, slot))
            done.append(device.run(layer.math, total, [item._replace(packed=pool[slot])], (0, slot), copy))
        for queued in done:
            queued.wait()
    finally:
        device.close()
    assert total.out is not None
    assert layer.error(total.out, layer.expected(x, work)) <= 3e-6
