"""HQQ with axis 0: groups of rows that are far apart. Expectations are of hqq's own dequantizing, in float32."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear, silu

from hqq_writer import Kind, quantize
from moestro.compute import cpu, repack
from moestro.compute.cpu import CpuExperts, Matrix, kernel_format, levels, look_up, run_linear
from moestro.compute.experts import ExpertMath, ExpertWork
from moestro.compute.gpu import kernel_of
from moestro.compute.repack import pack_stored, pack_stored_matrix
from moestro.errors import CheckpointError, ModelError
from moestro.loading.gpu_need import refuse_on_gpu
from moestro.loading.sources.hqq import read_hqq
from moestro.memory.formats import ExpertFormat, ExpertShape, Strided, expert_format_named, format_named, strided_format
from moestro.memory.formats.raw import RawMatrix
from moestro.memory.formats.strided import class_order
from moestro.planning.descriptor import Code, Descriptor, Scale, Zero
from test_bindings import POISON, Memory

LEVELS = [name for name, usable in levels().items() if usable]
needs_kernels = pytest.mark.skipif(not levels(), reason="built without the kernels: no compiler was there")
KINDS = [Kind(2, 16, 128), Kind(4, 64, 256), Kind(3, 32, 64), Kind(8, 128, 32), Kind(2, 256, 8), Kind(4, 16, 1)]
MIXTRAL = ExpertShape(hidden=4096, neurons=14336)
SHAPE = ExpertShape(hidden=192, neurons=320)  # of 64 rows: 3 and 5 classes; of 16: 12 and 20


def stored(rows: int, columns: int, kind: Kind) -> tuple[RawMatrix, Tensor]:
    """A random matrix as a file has it, and the weights [R, K] that it stands for."""
    tensors, values = quantize(torch.randn(rows, columns) / 8, kind)
    return read_hqq("matrix", tensors, (rows, columns)), values


def random_strided(fmt: Descriptor, rows: int, columns: int) -> Strided:
    """A matrix of random bits."""
    torch.manual_seed(5)
    sides = [torch.randint(0, 256, (rows // fmt.group, columns), dtype=torch.uint8) for _ in range(2)]
    codes = torch.randint(0, 2**fmt.code_bits, (rows, columns), dtype=torch.uint8)
    table = torch.randint(0, 256, (fmt.table_rows(rows), 2, 2 * columns), dtype=torch.uint8).view(torch.float16)
    return Strided(codes, *sides, table, torch.tensor([0.25, 3.5]))


def packed_matrix(raw: RawMatrix) -> Tensor:
    packed = torch.full((raw.fmt.matrix_bytes(raw.rows, raw.columns) + 63,), POISON, dtype=torch.uint8)
    packed = packed[-packed.data_ptr() % 64 :][: raw.fmt.matrix_bytes(raw.rows, raw.columns)]
    pack_stored_matrix(packed, raw, None, None, threads=2)
    return packed


def expert(shape: ExpertShape, kind: Kind) -> tuple[dict[str, Any], ExpertFormat, dict[str, Tensor]]:
    """An expert's matrices as sources give them, their format, and their weights, neurons in the file's order."""
    found = {part: stored(*size, kind) for part, size in shape.parts.items()}
    order = class_order(shape.neurons, kind.group)
    parts = {part: (raw, None, order) if part == "down" else (raw, order, None) for part, (raw, _) in found.items()}
    return parts, ExpertFormat(found["down"][0].fmt), {part: values for part, (_, values) in found.items()}


def packed_expert(parts: dict[str, Any], fmt: ExpertFormat, shape: ExpertShape) -> Tensor:
    size = fmt.expert_bytes(shape)
    packed = torch.full((size + 63,), POISON, dtype=torch.uint8)
    packed = packed[-packed.data_ptr() % 64 :][:size]
    pack_stored(packed, fmt, shape, parts, threads=2)
    return packed


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([16, 32, 64, 128, 256]),
    classes=st.integers(1, 12),
    columns=st.integers(1, 200),
    data=st.data(),
)
def test_panels_stand_for_what_hqq_makes_of_a_file(
    bits: int, group: int, classes: int, columns: int, data: st.DataObject
) -> None:
    """Bit for bit; super-groups of any size, which may cut through rows; packed by the kernels and by their twin."""
    rows, count = group * classes, classes * columns
    kind = Kind(bits, group, data.draw(st.sampled_from([n for n in range(1, count + 1) if count % n == 0])))
    tensors, values = quantize(torch.randn(rows, columns), kind)
    raw = read_hqq("matrix", tensors, (rows, columns))
    assert raw.fmt is format_named(f"hqq{bits}r{group}s{kind.super_group}")
    packed = packed_matrix(raw)
    assert torch.equal(raw.fmt.unpack_matrix(packed, rows, columns, torch.float32), values)
    if bits != 3:  # the same bytes, had they been packed in the matrix's own shape
        own = {**tensors, "W_q": tensors["W_q"].view(rows * bits // 8, columns)}
        assert torch.equal(packed_matrix(read_hqq("matrix", own, (rows, columns))), packed)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(repack, "_kernels", None)
        assert torch.equal(packed_matrix(raw), packed)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("has_gate", [True, False], ids=["gate", "plain"])
def test_experts_in_blocks(kind: Kind, has_gate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, and each block alone: its bytes and the head are the only ones that are right."""
    shape = ExpertShape(hidden=512, neurons=768, has_gate=has_gate)
    parts, fmt, values = expert(shape, kind)
    packed, order = packed_expert(parts, fmt, shape), class_order(shape.neurons, kind.group)
    assert fmt.head_bytes(shape) == sum(len(table) for _, table in fmt.tables(shape)) > 0
    whole = fmt.unpack(packed, shape, range(shape.neurons), torch.float32)
    assert torch.equal(whole.up, values["up"][order])
    assert torch.equal(whole.down, values["down"][:, order])
    assert whole.gate is None if not has_gate else torch.equal(whole.gate, values["gate"][order])
    for start in range(0, shape.neurons, fmt.block):
        neurons = range(start, min(start + fmt.block, shape.neurons))
        span = fmt.byte_range(shape, neurons)
        alone = torch.full_like(packed, 0x7F)
        alone[span.start : span.stop] = packed[span.start : span.stop]
        some = fmt.unpack(alone, shape, neurons, torch.float32)
        assert torch.equal(some.up, whole.up[start : neurons.stop])
        assert torch.equal(some.down, whole.down[:, start : neurons.stop])
    monkeypatch.setattr(repack, "_kernels", None)
    assert torch.equal(packed_expert(parts, fmt, shape)[: _used(fmt, shape)], packed[: _used(fmt, shape)])


def _used(fmt: ExpertFormat, shape: ExpertShape) -> int:
    """Bytes of an expert before what fills it up to a cache line."""
    return fmt.head_bytes(shape) + fmt.blocks(shape) * fmt.block_bytes(shape)


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("level", ["torch", *LEVELS])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_linear_layers_at_each_level(level: str, kind: Kind) -> None:
    """Outputs and looked-up rows are in the order of the file; weights are exact."""
    rows, columns = kind.group * int(torch.randint(1, 6, ())), 8 * int(torch.randint(1, 40, ()))
    raw, values = stored(rows, columns, Kind(kind.bits, kind.group, 8))
    for bias in (None, torch.randn(rows)):
        matrix = Matrix(packed_matrix(raw), raw.fmt, rows, columns, bias)
        assert torch.equal(matrix.unpack(torch.float32), values)
        for tokens in (1, 2, 3, 7, 8, 17, 130):
            x = torch.randn(tokens, columns)
            wanted = linear(x.double(), values.double(), None if bias is None else bias.double())
            assert _error(run_linear(matrix, x, threads=2, level=level), wanted) <= 5e-6, tokens
    ids = torch.randint(0, rows, (3, 5))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(look_up(matrix, ids, dtype, threads=2, level=level), values.to(dtype)[ids])


@pytest.mark.sample(36)
@pytest.mark.parametrize("level", ["torch", *LEVELS])
@pytest.mark.parametrize("kind", [Kind(2, 16, 128), Kind(4, 64, 64), Kind(3, 32, 64)], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 17, 130])
def test_experts_at_each_level(level: str, kind: Kind, tokens: int) -> None:
    """Two experts, one of them in two shares; the last block is not full where blocks are of 64 or 128."""
    math = ExpertMath(SHAPE, ExpertFormat(strided_format(*kind)), lambda gate, up: silu(gate) * up)
    x, work = torch.randn(tokens + 2, SHAPE.hidden), list[ExpertWork]()
    wanted = torch.zeros(tokens + 2, SHAPE.hidden, dtype=torch.float64)
    for number in range(2):
        parts, fmt, values = expert(SHAPE, kind)
        assert fmt.name == math.format.name
        packed = packed_expert(parts, fmt, SHAPE)
        rows, weights = torch.randperm(tokens + 2)[:tokens], torch.rand(tokens)
        shares = [range(fmt.block), range(fmt.block, SHAPE.neurons)] if number else [range(SHAPE.neurons)]
        work += [ExpertWork(packed, share, rows, weights) for share in shares]
        gate, up, down = (values[part].double() for part in ("gate", "up", "down"))
        h = x[rows].double()
        wanted.index_add_(0, rows, linear(silu(linear(h, gate)) * linear(h, up), down) * weights[:, None])
    out = torch.zeros(tokens + 2, SHAPE.hidden)
    experts = CpuExperts(2, level)
    assert level == "torch" or experts.kernel(math) is not None
    experts.run(math, x, work, out)
    assert _error(out, wanted) <= 5e-6


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", [Kind(2, 16, 128), Kind(4, 64, 64), Kind(3, 32, 64)], ids=str)
def test_a_token_is_the_same_alone_and_beside_others(level: str, kind: Kind) -> None:
    """In an expert that others share, and beside so many experts that the kernels cut none of them."""
    math = ExpertMath(SHAPE, ExpertFormat(strided_format(*kind)), lambda gate, up: silu(gate) * up)
    experts = CpuExperts(1, level)
    experts.kernel(math)
    parts, fmt, _ = expert(SHAPE, kind)
    packed, x = packed_expert(parts, fmt, SHAPE), torch.randn(64, SHAPE.hidden)

    def first(tokens: int, others: int) -> Tensor:
        work = [ExpertWork(packed, range(SHAPE.neurons), torch.arange(tokens), torch.full((tokens,), 0.3))]
        work += [ExpertWork(packed, range(SHAPE.neurons), torch.tensor([63]), torch.ones(1))] * others
        out = torch.zeros(64, SHAPE.hidden)
        experts.run(math, x, work, out)
        return out[0]

    alone = first(1, 0)
    for tokens in (2, 3, 5, 16, 17, 63):
        for others in (0, 20):
            assert torch.equal(first(tokens, others), alone), (tokens, others)


def test_packed_is_as_large_as_the_file() -> None:
    """The experts and attention of Mixtral, as published: 28,672 pairs of numbers for 3,670,016 scales a matrix."""
    fmt = expert_format_named("hqq2r16s128")
    each = MIXTRAL.hidden * MIXTRAL.neurons
    in_file = 3 * (each // 4 + 2 * each // 16 + 2 * 2 * 28_672 + 4)
    assert in_file <= fmt.expert_bytes(MIXTRAL) <= 1.001 * in_file
    four = ExpertFormat(strided_format(4, 64, 256))
    in_file = 3 * (each // 2 + 2 * each // 64 + 2 * 2 * each // 64 // 256 + 4)
    assert in_file <= four.expert_bytes(MIXTRAL) <= 1.02 * in_file
    for rows in (4096, 1024):
        in_file = rows * 4096 // 2 + 2 * rows * 4096 // 64 + 2 * 2 * rows * 4096 // 64 // 256 + 4
        assert in_file <= format_named("hqq4r64s256").matrix_bytes(rows, 4096) <= 1.01 * in_file


@needs_kernels
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_kernels_count_the_same_bytes(kind: Kind) -> None:
    fmt = strided_format(*kind)
    kernel: Any = kernel_format(fmt)
    for columns in (1, 63, 64, 65, 257, 4097):
        assert kernel.panel_bytes(columns) == fmt.panel_bytes(columns)
        for rows in (kind.group, 7 * kind.group):
            size = fmt.matrix_bytes(rows, columns)
            cpu._kernels.Linear(torch.zeros(size, dtype=torch.uint8), kernel, rows, columns, None)
            with pytest.raises(ValueError, match="packed"):
                cpu._kernels.Linear(torch.zeros(size - 1, dtype=torch.uint8), kernel, rows, columns, None)
    assert kernel.least_block == fmt.block


@needs_kernels
@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_odd_sizes_stay_inside(level: str, data: st.DataObject) -> None:
    """Random bytes between guards: of a linear layer, of experts, and of what is repacked."""
    m, pool = Memory(), cpu.runner(2)
    kind = Kind(data.draw(st.sampled_from([2, 3, 4, 5, 6, 8])), data.draw(st.sampled_from([16, 32, 64, 128])), 12)
    fmt, kernel = strided_format(*kind), kernel_format(strided_format(*kind))
    rows, neurons = (kind.group * data.draw(st.integers(1, 5)) for _ in range(2))
    columns, tokens = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 20))

    def some(*size: int) -> Tensor:
        return m.hold(torch.randint(0, 128, size, dtype=torch.uint8))

    held = kind.bits if kind.bits in (2, 4) else 8
    words = -(-kind.group // 10) * rows // kind.group * columns * 4 if kind.bits == 3 else rows * columns * held // 8
    sides = {name: some(rows // kind.group * columns) for name in ("scales", "zeros")}
    given: dict[str, Any] = {"format": kernel, "rows": rows, "columns": columns, "codes": some(words), **sides}
    order = m.hold(torch.randperm(columns)) if data.draw(st.booleans()) else None
    made = cpu._kernels.Stored(layout=cpu._kernels.Layout.strided, column_order=order, **given)
    panels = some(fmt.panels_bytes(rows, columns))
    cpu._kernels.repack(pool, [(made, 0, rows, 0, columns, panels)])
    matrix = cpu._kernels.Linear(some(fmt.matrix_bytes(rows, columns)), kernel, rows, columns, None)
    x = m.hold(torch.randn(tokens, columns))
    pool.run_linear(level, matrix, x, m.hold(torch.zeros(tokens, rows)))
    pool.look_up(level, matrix, m.hold(torch.randint(0, rows, (tokens,))), m.hold(torch.zeros(tokens, columns)))
    shape, experts = ExpertShape(rows, neurons, data.draw(st.booleans())), ExpertFormat(fmt)
    packed = some(experts.expert_bytes(shape))
    math = ExpertMath(shape, experts, lambda gate, up: silu(up if gate is None else gate))
    known = _shape(shape, experts, kernel)
    part = range(min(experts.block, neurons) if data.draw(st.booleans()) else neurons)
    work = ExpertWork(packed, part, m.hold(torch.arange(tokens)), m.hold(torch.rand(tokens)))
    pool.run(level, known, m.hold(torch.randn(tokens, rows)), [work], m.hold(torch.zeros(tokens, rows)))
    assert m.is_guarded()
    assert kernel_of(math, torch.float32, torch.device("cpu")) is None


def _shape(shape: ExpertShape, fmt: ExpertFormat, kernel: Any, **others: Any) -> Any:
    formats = dict.fromkeys(("gate", "up", "down"), kernel)
    values = {"hidden": shape.hidden, "neurons": shape.neurons, "has_gate": shape.has_gate, "has_bias": False}
    gate = {"activation": cpu._kernels.Activation.silu, "alpha": 0.0, "limit": 0.0, "offset": 0.0}
    return cpu._kernels.Shape(**{**values, **formats, **gate, "block": fmt.block, "orders": 0, **others})


@needs_kernels
def test_kernels_refuse_what_does_not_fit() -> None:
    fmt = strided_format(4, 64, 32)
    kernel, other, plain = (kernel_format(one) for one in (fmt, strided_format(4, 32, 32), format_named("int4")))
    experts = ExpertFormat(fmt)
    _shape(SHAPE, experts, kernel)
    for change in (
        {"down": plain},
        {"gate": plain, "up": plain},
        {"gate": other},
        {"hidden": 200},
        {"neurons": 330},
        {"has_bias": True},
        {"orders": 1},
        {"up": kernel_format(strided_format(4, 128, 32)), "gate": kernel_format(strided_format(4, 128, 32))},
    ):
        with pytest.raises(ValueError, match=r"formats:|block:"):
            _shape(SHAPE, experts, kernel, **change)
    size = fmt.matrix_bytes(64, 96)
    for rows in (63, 96, 100):
        with pytest.raises(ValueError, match="classes"):
            cpu._kernels.Linear(torch.zeros(2 * size, dtype=torch.uint8), kernel, rows, 96, None)
    layouts, bytes_ = cpu._kernels.Layout, [torch.zeros(n, dtype=torch.uint8) for n in (128 * 96 // 2, 2 * 96, 2 * 96)]
    given: dict[str, Any] = dict(zip(("codes", "scales", "zeros"), bytes_, strict=True))
    given |= {"format": kernel, "layout": layouts.strided, "rows": 128, "columns": 96}
    made = cpu._kernels.Stored(**given)
    for name, value in (
        ("layout", layouts.nibbles),
        ("format", plain),
        ("rows", 96),
        ("rows", 192),
        ("columns", 97),
        ("codes", torch.zeros(128 * 96 // 2 - 1, dtype=torch.uint8)),
        ("scales", torch.zeros(2 * 96 - 1, dtype=torch.uint8)),
        ("zeros", None),
        ("row_order", torch.arange(128)),
        ("column_order", torch.full((96,), 96)),
    ):
        with pytest.raises((ValueError, TypeError, IndexError)):
            cpu._kernels.Stored(**given | {name: value})
    out = torch.zeros(fmt.panels_bytes(64, 96), dtype=torch.uint8)
    with pytest.raises(ValueError, match="class"):
        cpu._kernels.repack(cpu.runner(1), [(made, 32, 64, 0, 96, out)])


def test_parts_that_do_not_go_together() -> None:
    for name in ("hqq2r16s128+hqq2r16s128+int4", "int4+int4+hqq2r16s128", "hqq2r16s8+hqq2r32s8+hqq2r16s8"):
        with pytest.raises(KeyError):
            expert_format_named(name)
    for name in ("hqq2r16s128@order", "hqq7r16s8", "hqq2r48s8", "hqq2r16s0", "hqq2r16", "hqq2r16s08"):
        with pytest.raises(KeyError):
            expert_format_named(name)
    for wrong in (
        {"zero": Zero.NONE},
        {"scale": Scale.FP16},
        {"group": 48},
        {"super_group": 0},
        {"constant": 1},
        {"code": Code.E2M1},
    ):
        parts: dict[str, Any] = {"code": Code.U2, "group": 16, "scale": Scale.COLUMN, "zero": Zero.COLUMN}
        with pytest.raises(ValueError, match="no format"):
            Descriptor("odd", **{**parts, "super_group": 8, **wrong})
    raw, _ = stored(64, 32, Kind(2, 16, 8))
    with pytest.raises(ValueError, match="another order"):
        pack_stored_matrix(torch.zeros(raw.fmt.matrix_bytes(64, 32)), raw, torch.arange(64), None, threads=1)
    with pytest.raises(ValueError, match="need the table"):
        raw.fmt.unpack(torch.zeros(4, raw.fmt.panel_bytes(32), dtype=torch.uint8), 32, torch.float32)
    with pytest.raises(ValueError, match="nothing here quantizes"):
        raw.fmt.pack(torch.zeros(64, 32))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("meta.scale_q"), "has no meta.scale_q"),
        (lambda t: t.pop("meta.meta_zero.zero"), "has no meta.meta_zero.zero"),
        (lambda t: t.update({"W_q": t["W_q"][:-1]}), r"W_q \[3, 192\] of uint8: not of 2, 3, 4 or 8 bits"),
        (lambda t: t.update({"W_q": t["W_q"].int()}), "of int32: not of"),
        (lambda t: t.update({"meta.scale_q": t["meta.scale_q"][:-1]}), "no groups of 16, 32, 64, 128 or 256 rows"),
        (lambda t: t.update({"meta.scale_q": t["meta.scale_q"].view(24, 8)}), r"scale_q \[24, 8\] of uint8, where \["),
        (lambda t: t.update({"meta.zero_q": t["meta.zero_q"].float()}), "zero_q .* of float32"),
        (lambda t: t.update({"meta.zero_q": t["meta.zero_q"][:, 1:]}), r"zero_q \[1, 191\]"),
        (
            lambda t: t.update({"meta.meta_scale.scale": t["meta.meta_scale.scale"][:, 1:]}),
            "super-groups of 11 scales and 12 zeros",
        ),
        (lambda t: t["meta.meta_scale.zero"].fill_(torch.inf), "no finite floats"),
        (lambda t: t["meta.meta_zero.scale"].fill_(torch.nan), "no finite floats"),
        (
            lambda t: t.update({"meta.meta_scale.scale": t["meta.meta_scale.scale"].float() + 1e-7}),
            "float16 does not hold",
        ),
        (lambda t: t.update({"meta.meta_zero.zero": torch.zeros(1, 4)}), "all share one"),
    ],
)
def test_one_line_on_what_does_not_fit(change: Any, says: str) -> None:
    tensors, _ = quantize(torch.randn(64, 48), Kind(2, 16, 16))
    change(tensors)
    with pytest.raises((CheckpointError, ModelError), match=says) as error:
        read_hqq("a.matrix", tensors, (64, 48))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("a.matrix ")


def test_scales_that_are_plain_floats_are_refused() -> None:
    """As hqq writes them since it no longer quantizes them."""
    tensors, _ = quantize(torch.randn(64, 48), Kind(2, 16, 16))
    tensors = {"W_q": tensors["W_q"], "meta.scale": torch.ones(1, 192), "meta.zero": torch.ones(1, 192)}
    with pytest.raises(ModelError, match="is of HQQ, which Moestro does not read where scales and zeros are not"):
        read_hqq("a.matrix", tensors, (64, 48))


def test_shapes_that_no_classes_divide() -> None:
    fmt = expert_format_named("hqq2r16s8+hqq2r16s8+hqq4r64s8")
    assert fmt.divides(ExpertShape(hidden=192, neurons=80))
    for shape in (ExpertShape(192, 72), ExpertShape(96, 80), ExpertShape(192, 80, has_bias=True)):
        assert not fmt.divides(shape)
        assert expert_format_named("int4").divides(shape)


def test_a_gpu_refuses_them() -> None:
    gpu: Any = SimpleNamespace(accelerator=True, is_pretended=False)
    with pytest.raises(ModelError, match=r"\(hqq2r16s128\) are computed by the CPU's kernels alone; use device='cpu'"):
        refuse_on_gpu(gpu, [format_named("int4"), format_named("hqq2r16s128")])
    refuse_on_gpu(gpu, [format_named("int4")])
    refuse_on_gpu(SimpleNamespace(accelerator=None), [format_named("hqq2r16s128")])  # type: ignore[arg-type]
