"""Bytes of every format: panels against an independent writer, back again, and their sizes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moestro.compute.cpu import kernel_format, levels
from moestro.errors import CheckpointError
from moestro.memory.formats import Coded, ExpertFormat, ExpertShape, MatrixFormat, format_named, format_names, uniform
from moestro.memory.formats.codes import values
from moestro.memory.formats.quantize import quantize_hqq
from moestro.planning.descriptor import ROW, Code, Scale, Zero
from panel_writer import BITS, PanelWriter

UNIFORM = [
    *(uniform(bits, group) for bits in (4, 8) for group in (16, 32, 64, 128, ROW)),
    *(uniform(bits, group, zeros=True) for bits in (3, 4, 6, 8) for group in (16, 32, 64, 128, ROW)),
    *(uniform(4, group, scale) for scale in ("bf16", "fp32") for group in (32, 128, ROW)),
    *(uniform(bits, 32) for bits in (2, 3, 5, 6)),
]
NAMED = [fmt for fmt in map(format_named, format_names()) if fmt.is_quantized]
CODED = [*NAMED, *UNIFORM]
SMALL = {Scale.K4: 6, Scale.K2: 4, Scale.K3: 6}  # bits of the small scales and mins that have less than a byte
SIDES = {Scale.FP16: torch.float16, Scale.BF16: torch.bfloat16, Scale.FP32: torch.float32}
# Bits a weight of the file that each comes from, in its groups. Packed experts are at most 1.02 of these.
FILE_BITS = {
    "mxfp4": 4.25,
    "nvfp4": 4.5,
    "mxfp8": 8.25,
    "fp8": 8 + 32 / 128**2,
    "q8_0": 8.5,
    "q4_0": 4.5,
    "q4_1": 5,
    "q5_0": 5.5,
    "q5_1": 6,
    "iq4_nl": 4.5,
    "iq4_xs": 4.25,
    "q2_k": 2.625,
    "q3_k": 3.4375,
    "q4_k": 4.5,
    "q5_k": 5.5,
    "q6_k": 6.5625,
    "int4g32": 4.5,
    "int4g32bf16": 4.5,
    "int4g128": 4.125,
    "int8g128": 8.125,
    "int8row": 8,
    "int4g32z": 4.625,
    "int4g64z": 4.25 + 4 / 64,
    "int4g128z": 4.125 + 4 / 128,
    "int8g128z": 8.125 + 8 / 128,
}
by_name = pytest.mark.parametrize("fmt", CODED, ids=lambda fmt: fmt.name)


def random_coded(fmt: MatrixFormat, rows: int, columns: int, *, finite: bool = False) -> Coded:
    """A matrix of random bits; scales that are floats have random bits too, or usual values if they must be finite."""

    def below(bits: int, *size: int) -> Tensor:
        return torch.randint(0, 2**bits, size, dtype=torch.uint8)

    def floats(dtype: torch.dtype, *size: int) -> Tensor:
        if finite:
            return torch.randn(size).to(dtype)
        return torch.randint(0, 256, (*size[:-1], size[-1] * dtype.itemsize), dtype=torch.uint8).view(dtype)

    bits, groups = BITS.get(fmt.code.name, 8), 1 if fmt.group == ROW else -(-columns // fmt.group)
    coded = {"codes": below(bits, rows, columns)}
    if finite and fmt.code is Code.E4M3:
        coded["codes"] = torch.randn(rows, columns).to(torch.float8_e4m3fn).view(torch.uint8)
    if fmt.scale is Scale.BLOCK:
        grid = torch.randn(-(-rows // 128), groups)
        coded["scales"] = grid.repeat_interleave(128, 0)[:rows]
    elif fmt.scale in SIDES:
        coded["scales"] = floats(SIDES[fmt.scale], rows, groups)
    else:
        coded["scales"] = below(SMALL.get(fmt.scale, 8), rows, groups)
        if finite and fmt.scale in (Scale.E8M0, Scale.E4M3):
            coded["scales"] = coded["scales"] % 16 + (120 if fmt.scale is Scale.E8M0 else 40)
    if fmt.zero is Zero.INT:
        coded["zeros"] = below(bits, rows, groups)
    elif fmt.zero in (Zero.FP16, Zero.ADD):
        coded["zeros"] = floats(torch.float16, rows, groups)
    elif fmt.zero is Zero.MIN:
        coded["zeros"] = below(SMALL[fmt.scale], rows, groups)
    elif fmt.zero is Zero.FIXED:
        coded["zeros"] = below(8, rows, groups)
    supers = -(-columns // 256)
    if fmt.scale is Scale.SHIFTED:
        coded["d"] = below(8, rows, 1) % 16 + 112 if finite else below(8, rows, 1)
    elif fmt.is_two_level:
        coded["d"] = floats(torch.float16, rows, supers)
        if fmt.zero is Zero.MIN:
            coded["dmin"] = floats(torch.float16, rows, supers)
    if fmt.scale is Scale.E4M3:
        coded["tensor"] = torch.randn(())
    return Coded(**coded)


def assert_same(found: Coded, expected: Coded, rows: int) -> None:
    """All parts have the same bits in the rows that there are."""
    for each in fields(Coded):
        a, b = getattr(found, each.name), getattr(expected, each.name)
        assert (a is None) == (b is None), each.name
        if a is None:
            continue
        assert a.dtype == b.dtype, each.name
        if each.name == "tensor":
            assert torch.equal(a, b)
            continue
        bits = [one.clone(memory_format=torch.contiguous_format).view(torch.uint8) for one in (a, b)]
        assert torch.equal(bits[0][:rows], bits[1]), each.name


@by_name
@settings(max_examples=8, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 600), seed=st.integers(0, 2**31))
def test_what_is_written_is_read_again(fmt: MatrixFormat, rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    coded = random_coded(fmt, rows, columns)
    panels = fmt.write(coded)
    assert panels.shape == (-(-rows // 16), fmt.panel_bytes(columns))
    assert panels.numel() == fmt.matrix_bytes(rows, columns)
    assert_same(fmt.read(panels, columns), coded, rows)


@by_name
@pytest.mark.parametrize(("rows", "columns"), [(5, 7), (16, 64), (21, 330), (17, 512)])
def test_panels_are_what_an_independent_writer_makes(fmt: MatrixFormat, rows: int, columns: int) -> None:
    """Byte by byte, so what fills up rows, columns and units is zero too."""
    coded = random_coded(fmt, rows, columns)
    assert torch.equal(fmt.write(coded), PanelWriter(fmt, coded).write())


@pytest.mark.parametrize("fmt", [format_named("fp8")], ids=["fp8"])
def test_a_scale_of_128_rows_is_in_each_of_their_panels(fmt: MatrixFormat) -> None:
    coded = random_coded(fmt, 150, 130)
    assert torch.equal(fmt.write(coded), PanelWriter(fmt, coded).write())
    with pytest.raises(CheckpointError, match="begin within 16 rows"):
        fmt.write(coded.rows(torch.arange(8, 150)))


@by_name
def test_a_weight_is_scale_times_code_less_zero(fmt: MatrixFormat) -> None:
    """In float64, from tables of the codes' own definitions."""
    coded = random_coded(fmt, 20, 300, finite=True)
    e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    iq4 = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
    codes = coded.codes
    number = {
        Code.E2M1: lambda: torch.tensor(e2m1).double()[codes.long()],
        Code.IQ4NL: lambda: torch.tensor(iq4).double()[codes.long()],
        Code.S8: lambda: codes.view(torch.int8).double(),
        Code.E4M3: lambda: codes.view(torch.float8_e4m3fn).double(),
    }.get(fmt.code, codes.double)()
    column = torch.arange(300)
    group = column * 0 if fmt.group == ROW else column // fmt.group
    scale, of_super = coded.scales[:, group], column // 256
    if fmt.scale is Scale.E8M0:
        scale = torch.exp2(scale.double() - 127)
    elif fmt.scale is Scale.E4M3:
        assert coded.tensor is not None
        scale = scale.contiguous().view(torch.float8_e4m3fn).double() * coded.tensor.double()
    elif fmt.scale is Scale.SHIFTED:
        assert coded.d is not None
        scale = torch.exp2(coded.d.double() - 127) * scale.double()
    elif fmt.is_two_level:
        assert coded.d is not None
        signed = scale.contiguous().view(torch.int8) if fmt.scale in (Scale.K6, Scale.IQ4XS) else scale
        scale = coded.d.double()[:, of_super] * (signed.double() - (32 if fmt.scale is Scale.K3 else 0))
    zero = fmt.constant if coded.zeros is None else coded.zeros.double()[:, group]
    if fmt.zero is Zero.FIXED:
        zero = zero * 2**fmt.code_bits / 256 - 0.5
    if fmt.zero is Zero.MIN:
        assert coded.dmin is not None
        expected = number * scale - zero * coded.dmin.double()[:, of_super]
    else:
        expected = number * scale + zero if fmt.zero is Zero.ADD else (number - zero) * scale.double()
    found = values(fmt, coded).double()
    size = number.abs() * scale.double().abs() + (expected - number * scale).abs()  # of the terms that may cancel
    assert ((found - expected).abs() <= 2**-22 * size).all()
    again = fmt.unpack(fmt.write(coded), 300, torch.float32)
    assert torch.equal(again[:20], values(fmt, coded))


@pytest.mark.parametrize("name", FILE_BITS)
def test_packed_weights_are_as_small_as_in_the_file(name: str) -> None:
    fmt = format_named(name)
    bits = 8 * fmt.matrix_bytes(2048, 4096) / 2048 / 4096
    assert FILE_BITS[name] <= bits <= 1.02 * FILE_BITS[name]
    assert fmt.bits_per_weight == pytest.approx(bits, rel=0.01)


@pytest.mark.parametrize(("name", "most"), [("hqq4", 4.30), ("hqq3", 3.30), ("hqq2", 3.05)])
def test_scales_and_zeros_of_a_byte_keep_few_bits_small(name: str, most: float) -> None:
    for rows, columns in ((2048, 4096), (2048, format_named(name).block)):
        assert 8 * format_named(name).matrix_bytes(rows, columns) / rows / columns <= most


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(["hqq4", "hqq3", "hqq2"]),
    columns=st.integers(1, 5000),
    tail=st.sampled_from([1.0, 20.0, 1000.0]),
    seed=st.integers(0, 2**31),
)
def test_a_power_for_a_whole_row_serves_groups_much_smaller_than_its_largest(
    name: str, columns: int, tail: float, seed: int
) -> None:
    """A weight between a group's extremes is off by half a step of its codes, and by what a byte cannot say of scale
    and zero: up to half of the least scale that the row's power allows, and half a step of the zero, for each code."""
    torch.manual_seed(seed)
    fmt = format_named(name)
    sizes = torch.rand(16, -(-columns // fmt.group)).pow(3) * tail
    weights = torch.randn(16, columns) * sizes.repeat_interleave(fmt.group, 1)[:, :columns]
    coded = quantize_hqq(weights, fmt, fit=False)
    assert coded.d is not None
    assert coded.d.shape == (16, 1)
    power, most = torch.exp2(coded.d.double() - 127), 2**fmt.code_bits - 1
    scale = (power * coded.scales)[:, torch.arange(columns) // fmt.group]
    off = (fmt.unpack(fmt.write(coded), columns, torch.float32) - weights).abs().double()
    of_zero = scale * 2**fmt.code_bits / 512
    bound = scale / 2 + of_zero + most * power / 2
    assert (off <= bound * (1 + 1e-5)).all()


def test_names_and_parameters_give_one_object() -> None:
    for fmt in CODED:
        assert format_named(fmt.name) is fmt
        assert format_named(fmt.name) == fmt
    assert len({fmt.name for fmt in CODED}) == len(CODED)
    assert uniform(4, 128, "bf16") is format_named("int4g128bf16")
    for name in ("int7g32", "int4g48", "q9_0", "int4", ""):
        if name != "int4":
            with pytest.raises(KeyError):
                format_named(name)


@pytest.mark.parametrize(
    "parts",
    [
        (Code.FP16, 64, Scale.FP16),
        (Code.U4, 64, Scale.NONE),
        (Code.U4, 48, Scale.FP16),
        (Code.U4, 256, Scale.FP16),
        (Code.E4M3, 64, Scale.BLOCK),
        (Code.U4, 16, Scale.K4, Zero.MIN),
        (Code.U4, 32, Scale.K4, Zero.NONE),
        (Code.U4, 32, Scale.FP16, Zero.MIN),
        (Code.S8, 32, Scale.FP16, Zero.CONSTANT, 8),
        (Code.E2M1, 32, Scale.E8M0, Zero.INT),
        (Code.U4, 32, Scale.FP16, Zero.CONSTANT, 16),
        (Code.U4, 32, Scale.FP16, Zero.NONE, 8),
    ],
    ids=str,
)
def test_parts_that_do_not_go_together_are_refused(parts: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match="odd is no format"):
        MatrixFormat("odd", *parts)  # type: ignore[arg-type]


# Experts: a format for each matrix, blocks of neurons that down's columns fill.

MIXED = [
    ("q4_k", "q4_k", "q6_k", 512, 512, 256),
    ("q4_0", "q5_1", "q8_0", 64, 160, 128),
    ("mxfp4", "mxfp4", "mxfp4", 96, 160, 128),
    ("nvfp4", "nvfp4", "nvfp4", 80, 144, 128),
    ("fp8", "fp8", "fp8", 200, 330, 64),
    ("int4g128", "int4g128", "int4g128bf16z", 256, 384, 128),
    ("int8row", "int8row", "int8row", 100, 300, 256),
    ("int4rowz", "q3_k", "iq4_xs", 256, 768, 256),
    ("q2_k", "q2_k", "q3_k", 256, 1280, 256),
    ("fp8row", "int4", "int8", 40, 130, 64),
]


@pytest.mark.parametrize("case", MIXED, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize("has_gate", [True, False], ids=["gate", "plain"])
def test_an_expert_has_a_format_for_each_matrix(case: tuple[str, str, str, int, int, int], has_gate: bool) -> None:
    *names, hidden, neurons, block = case
    gate, up, down = (format_named(str(name)) for name in names)
    fmt = ExpertFormat(down, gate=gate, up=up)
    assert fmt.block == block == down.block
    shape = ExpertShape(hidden=hidden, neurons=neurons, has_gate=has_gate, has_bias=True)
    parts = {"up": random_coded(up, neurons, hidden, finite=True)}
    parts["down"] = random_coded(down, hidden, neurons, finite=True)
    if has_gate:
        parts["gate"] = random_coded(gate, neurons, hidden, finite=True)
    biases = {name: torch.randn(size) for name, size in shape.parts.items() if name.endswith("bias")}
    packed = torch.full((fmt.expert_bytes(shape),), 0xA5, dtype=torch.uint8)
    fmt.pack_coded(packed, shape, parts)
    fmt.pack(packed, shape, biases)
    expected = {name: values(fmt.matrices[name], coded) for name, coded in parts.items()} | biases
    whole = fmt.unpack(packed, shape, range(neurons), torch.float32)
    for name, tensor in expected.items():
        assert torch.equal(getattr(whole, name), tensor), name
    for start in range(0, neurons, block):  # each block alone, its bytes the only ones that are right
        stop = min(start + block, neurons)
        span = fmt.byte_range(shape, range(start, stop))
        alone = torch.full_like(packed, 0x7F)
        alone[span.start : span.stop] = packed[span.start : span.stop]
        some = fmt.unpack(alone, shape, range(start, stop), torch.float32)
        assert torch.equal(some.up, expected["up"][start:stop])
        assert torch.equal(some.down, expected["down"][:, start:stop])
        assert (some.down_bias is not None) == (stop == neurons)


def test_the_last_block_of_an_expert_is_filled_up_with_neurons_that_add_nothing() -> None:
    """Biases and down's bytes beyond the last neuron are zero whatever was there before."""
    fmt, shape = ExpertFormat(format_named("q8_0")), ExpertShape(hidden=64, neurons=96, has_bias=True)
    parts = {name: random_coded(format_named("q8_0"), *size) for name, size in shape.parts.items() if len(size) == 2}
    biases = {name: torch.randn(size) for name, size in shape.parts.items() if len(size) == 1}
    found = []
    for poison in (0x00, 0xFF):
        packed = torch.full((fmt.expert_bytes(shape),), poison, dtype=torch.uint8)
        fmt.pack_coded(packed, shape, parts)
        fmt.pack(packed, shape, biases)
        used = fmt.blocks(shape) * fmt.block_bytes(shape) + 4 * shape.hidden
        found.append(packed[:used])
    assert torch.equal(*found)


@pytest.mark.skipif(not levels(), reason="built without the kernels: no compiler was there")
@pytest.mark.parametrize("fmt", [*map(format_named, format_names()), *UNIFORM], ids=lambda fmt: fmt.name)
def test_kernels_count_the_same_bytes(fmt: MatrixFormat) -> None:
    kernel = kernel_format(fmt)
    assert kernel is not None
    for columns in (1, 2, 63, 64, 65, 128, 129, 255, 256, 257, 640, 2880, 4097):
        assert kernel.panel_bytes(columns) == fmt.panel_bytes(columns), columns
    assert kernel.least_block == fmt.block


def test_the_documents_table_is_what_the_formats_are() -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "formats.md"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.read_text().splitlines()]
    table = {row[0]: row for row in rows if len(row) == 7 and row[0] not in ("format", "---")}
    assert set(format_names()) <= set(table)
    for name, (_, code, group, scale, zero, bits, _) in table.items():
        fmt = format_named(name)
        constant = f" {fmt.constant}" if fmt.zero is Zero.CONSTANT else ""
        assert [code, scale, zero] == [fmt.code.name, fmt.scale.name, f"{fmt.zero.name}{constant}"], name
        assert group == ("" if fmt.is_float else "row" if fmt.group == ROW else str(fmt.group)), name
        assert float(bits) == pytest.approx(fmt.bits_per_weight, abs=0.0051), name


@pytest.mark.parametrize("name", FILE_BITS)
def test_packed_experts_are_as_small_as_in_the_file(name: str) -> None:
    shape = ExpertShape(hidden=2048, neurons=768)
    n_bytes = ExpertFormat(format_named(name)).expert_bytes(shape)
    assert n_bytes <= 1.02 * 3 * shape.hidden * shape.neurons * FILE_BITS[name] / 8
