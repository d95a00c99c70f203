"""Experts whose gate and up are quantized in an order of columns (GPTQ's act-order): x is gathered, orders move along.

Expectations are of float64 products with the weights in the file's own order, or of Transformers with those weights.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

import small_conductor as small
from moestro import load
from moestro.compute.cpu import CpuExperts, levels
from moestro.compute.experts import ExpertMath, ExpertWork, run_experts
from moestro.compute.repack import pack_stored
from moestro.devices.emulated import EmulatedDevice
from moestro.loading.quantization import Quantization
from moestro.loading.sources.layouts import Matrix, read_matrix
from moestro.memory.formats import ExpertFormat, ExpertShape, expert_format_named
from moestro.planning.contract import LayerSpec
from survey_checks import same_bytes
from test_sources_safetensors import FAMILY, gptq, write_checkpoint
from test_stored import DEVICES, _same

LEVELS = ["torch", *(level for level, runs in levels().items() if runs)]
SHAPE = ExpertShape(hidden=96, neurons=160)  # whole groups of 32, but no whole chunks of 64
MATRICES = {"gate": 1, "up": 1, "down": 7}  # seeds: gate and up share their order


def _stored(shape: ExpertShape, seeds: dict[str, int], **kinds: Any) -> tuple[dict[str, Matrix], dict[str, Tensor]]:
    """An expert as GPTQ stores it, and the weights [R, K] that it stands for, in the file's order of columns."""
    found, values = {}, {}
    for part, seed in seeds.items():
        write, config = gptq(act_order=True, seed=1000 * seed, **kinds.get(part, {}))
        tensors, values[part] = write(torch.empty(shape.parts[part]))
        found[part] = read_matrix(part, tensors, shape.parts[part], Quantization("gptq", config))
    return found, values


def _packed(shape: ExpertShape, found: dict[str, Matrix], fmt: ExpertFormat) -> Tensor:
    """Rows of gate and up follow down's columns, as sources have them."""
    rows = found["down"].columns
    parts = {part: (one.raw, None if part == "down" else rows, one.columns) for part, one in found.items()}
    packed = torch.full((fmt.expert_bytes(shape) + 63,), 0xA5, dtype=torch.uint8)
    packed = packed[-packed.data_ptr() % 64 :][: fmt.expert_bytes(shape)]
    pack_stored(packed, fmt, shape, parts, threads=2)
    return packed


def _ffn(values: dict[str, Tensor], x: Tensor) -> Tensor:
    gate, up, down = (values[part].double() for part in ("gate", "up", "down"))
    return (silu(x.double() @ gate.T) * (x.double() @ up.T)) @ down.T


@pytest.mark.sample(24)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("tokens", [1, 3, 14, 40])
@pytest.mark.parametrize(
    ("seeds", "kinds"),
    [
        (MATRICES, {}),
        (MATRICES | {"up": 2}, {}),
        (MATRICES, {"up": {"bits": 8}}),  # of two formats: each product of its own
        (MATRICES | {"up": 2}, {"gate": {"sym": False}, "up": {"bits": 8}}),
    ],
    ids=["one order", "two orders", "two formats", "two of each"],
)
def test_each_level_gathers_the_tokens(level: str, tokens: int, seeds: dict[str, int], kinds: dict[str, Any]) -> None:
    """Two experts of different orders in one call, whose tokens a thread must not take for packed already."""
    name = f"int{kinds.get('up', {}).get('bits', 4)}g32"
    experts = [_stored(SHAPE, {part: seed + 10 * i for part, seed in seeds.items()}, **kinds) for i in range(2)]
    formats = [found[part].raw.fmt.name for found, _ in experts[:1] for part in ("gate", "up", "down")]
    fmt = expert_format_named("+".join(formats) + ("@orders" if seeds["up"] != seeds["gate"] else "@order"))
    assert name.startswith("int8") == (formats[1] != formats[2])
    math = ExpertMath(SHAPE, fmt, lambda gate, up: silu(gate) * up)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, rows = torch.randn(tokens, SHAPE.hidden).to(dtype), torch.arange(tokens)
        weights, out = torch.rand(tokens), torch.zeros(tokens, SHAPE.hidden)
        work = [ExpertWork(_packed(SHAPE, found, fmt), range(SHAPE.neurons), rows, weights) for found, _ in experts]
        CpuExperts(1, level).run(math, x, work, out)
        wanted = sum(_ffn(values, x) for _, values in experts) * weights[:, None].double()
        assert float((out - wanted).abs().max()) <= 5e-4 * float(wanted.abs().max()), dtype


def test_a_share_of_an_expert_has_the_orders_with_it() -> None:
    """Whatever blocks are copied alone into a slot, they compute there; the planner counts the same bytes."""
    found, values = _stored(SHAPE, MATRICES | {"up": 2})
    fmt = expert_format_named("int4g32@orders")
    packed, x = _packed(SHAPE, found, fmt), torch.randn(5, SHAPE.hidden)
    math = ExpertMath(SHAPE, fmt, lambda gate, up: silu(gate) * up)
    out = torch.zeros(5, SHAPE.hidden)
    of = LayerSpec(
        1,
        SHAPE.neurons,
        fmt.expert_bytes(SHAPE),
        block=fmt.block,
        block_bytes=fmt.block_bytes(SHAPE),
        head_bytes=fmt.head_bytes(SHAPE),
    )
    for share in (range(fmt.block), range(fmt.block, SHAPE.neurons)):
        part = fmt.byte_range(SHAPE, share)
        assert len(part) == of.share_bytes(share)
        slot = torch.full_like(packed, 0xFF)
        slot[part.start : part.stop] = packed[part.start : part.stop]
        run_experts(math, x, [ExpertWork(slot, share, torch.arange(5), torch.ones(5))], out)
    torch.testing.assert_close(out.double(), _ffn(values, x), rtol=0, atol=1e-4)
    assert of.share_bytes(None) == fmt.expert_bytes(SHAPE)
    assert replace(of, head_bytes=0).share_bytes(range(fmt.block)) == fmt.block_bytes(SHAPE)


def test_no_token_is_read_where_an_order_points_outside() -> None:
    found, _ = _stored(SHAPE, MATRICES)
    fmt = expert_format_named("int4g32@order")
    math = ExpertMath(SHAPE, fmt, lambda gate, up: silu(gate) * up)
    x, out = torch.randn(1, SHAPE.hidden), torch.zeros(1, SHAPE.hidden)
    for level in LEVELS:
        for place, column in ((0, -1), (95, 96), (50, 2**31 - 1), (3, -(2**31))):
            packed = _packed(SHAPE, found, fmt)
            packed[4 * place : 4 * place + 4] = torch.tensor([column], dtype=torch.int32).view(torch.uint8)
            work = [ExpertWork(packed, range(SHAPE.neurons), torch.tensor([0]), torch.ones(1))]
            if level == "torch" and column == -1:
                continue  # torch counts it from the end
            with pytest.raises(IndexError):
                CpuExperts(1, level).run(math, x, work, out)
    assert not out.any()


def test_orders_are_permutations_that_the_format_keeps() -> None:
    found, _ = _stored(SHAPE, MATRICES | {"up": 2})
    fmt = expert_format_named("int4g32@order")
    packed = torch.zeros(fmt.expert_bytes(SHAPE), dtype=torch.uint8)
    for order in (torch.zeros(96), torch.arange(95), torch.arange(97), torch.arange(1, 97)):
        with pytest.raises(ValueError, match="each a permutation"):
            fmt.pack_orders(packed, SHAPE, [order.long()])
    with pytest.raises(ValueError, match="each a permutation"):
        fmt.pack_orders(packed, SHAPE, [])
    for name in ("int4g32", "int4g32@order"):
        with pytest.raises(ValueError, match="does not keep the order"):
            _packed(SHAPE, found, expert_format_named(name))
    for name in ("int4g32@", "int4g32@other", "nothing@order"):
        with pytest.raises(KeyError):
            expert_format_named(name)


@pytest.mark.parametrize(("group", "seeds"), [(128, MATRICES), (32, MATRICES | {"up": 2})])
def test_packed_experts_are_as_large_as_the_files(group: int, seeds: dict[str, int]) -> None:
    """Qwen3-30B's experts; padding aside, of which these have none."""
    shape = ExpertShape(hidden=2048, neurons=768)
    fmt = expert_format_named(f"int4g{group}@order{'s' if seeds['up'] != seeds['gate'] else ''}")
    in_file = 0
    for part, seed in seeds.items():
        write, _ = gptq(group=group, act_order=True, seed=1000 * seed)
        in_file += sum(tensor.nbytes for tensor in write(torch.empty(shape.parts[part]))[0].values())
    assert fmt.expert_bytes(shape) <= 1.02 * in_file


def _seed(kind: str, name: str) -> int:
    """Of the order of a weight's columns, by its name."""
    found = re.search(r"experts\.(\d+)\.(w\d|\w+_proj)", name)
    if found is None:
        return 0
    number = 1000 * int(found[1])
    if kind == "gate and up differ" or (kind == "in some experts" and int(found[1]) % 2):
        return number + 100 * (found[2] in ("w3", "up_proj"))
    return number


@pytest.mark.sample(4)
@pytest.mark.parametrize("options", DEVICES, ids=lambda options: options["device"])
@pytest.mark.parametrize("kind", ["gate and up share", "gate and up differ", "in some experts"])
@pytest.mark.parametrize(("family", "v2", "sym"), [("mixtral", False, True), ("qwen3_moe", True, False)])
def test_whole_models(family: str, v2: bool, sym: bool, kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Each expert has orders of its own; prompts of 37 tokens and tokens one by one."""

    def writer_of(name: str) -> Any:
        return gptq(act_order=True, v2=v2, sym=sym, seed=_seed(kind, name))[0]

    stored = {False: "gptq-act-order", True: "gptq-asymmetric-v2"}[v2]
    expected = write_checkpoint(tmp_path, FAMILY[family], stored, writer_of)
    model = load(str(tmp_path), dtype="float32", threads=2, **options)
    same_bytes(tmp_path, model, **options)
    for math in model.moestro.math:
        assert math.format.orders == (1 if kind == "gate and up share" else 2)
    _same(model, expected)


@pytest.mark.parametrize("orders", [1, 2])
def test_experts_are_divided_between_link_and_cpu(orders: int) -> None:
    """By a policy that decides at random; each expert has orders of its own, and slots hold others' before."""
    plain = small.SHAPE
    fmt = ExpertFormat(small.FORMAT.matrices["down"], orders=orders)
    policy = small.Drawn(orders)
    conductor, parts = small.small_conductor(policy, 4, EmulatedDevice(link_gbps=None), fmt)
    for layer, expert in conductor.store.experts:
        own = parts[layer][expert]
        perms = [torch.randperm(plain.hidden) for _ in range(orders)]
        packed = conductor.store[layer, expert]
        fmt.pack(packed, plain, {"gate": own["gate"][:, perms[0]], "up": own["up"][:, perms[-1]], "down": own["down"]})
        fmt.pack_orders(packed, plain, perms)
    for step in range(40):
        x, weights = torch.randn(1 + step % 3, plain.hidden), torch.rand(1 + step % 3, small.TOP_K)
        index = torch.stack([torch.randperm(small.EXPERTS)[: small.TOP_K] for _ in x])
        for layer in range(small.LAYERS):
            out = conductor.run_layer(layer, x, index, weights)
            wanted = small.reference_of(parts[layer], x, index, weights)
            torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    conductor.close()
    assert conductor.counters.moved_bytes
