"""The kernels' bindings: each argument of each function, made wrong in turn, is refused before memory is touched.

`ROWS` has a valid call for everything that the module offers; a new function or argument without one fails a test.
Tensors lie between guard bytes, which no call may change, and a refused call changes nothing at all.
"""

from __future__ import annotations

import functools
import gc
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moestro.compute import cpu
from moestro.compute.cpu import kernel_format, levels, type_of
from moestro.compute.experts import ExpertWork
from moestro.memory.formats import FORMATS, MATRIX_FORMATS, ExpertFormat, ExpertShape, format_named

pytestmark = pytest.mark.skipif(not levels(), reason="built without the kernels: no compiler was there")
kernels: Any = cpu._kernels
KERNEL_FORMATS: Any = {name: kernel_format(fmt) for name, fmt in MATRIX_FORMATS.items()}

LEVELS = [name for name, usable in levels().items() if usable]
GUARD, POISON = 256, 0xA5
DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
]
FLOATS = DTYPES[:3]
TYPES = dict(zip(FLOATS, ("fp32", "fp16", "bf16"), strict=True))
D, HEAD, HEADS, GROUPS, EXPERTS, TOP_K, TOKENS, LENGTH = 70, 16, 4, 2, 5, 2, 3, 9
SEQUENCES, NEW = 2, 2  # of a step
STEP = SEQUENCES * NEW
NEURONS = 100  # two blocks, of which the second is not full


class Memory:
    """Tensors between guard bytes."""

    def __init__(self) -> None:
        self._rooms: list[Tensor] = []

    def hold(self, values: Tensor, shift: int = 0) -> Tensor:
        """The same numbers, contiguous, in a place of their own, so many bytes behind a cache line's begin."""
        size = values.numel() * values.element_size()
        room = torch.full((size + 2 * GUARD + shift,), POISON, dtype=torch.uint8)
        self._rooms.append(room)
        inside = room[GUARD + shift : GUARD + shift + size].view(values.dtype).view(values.shape)
        return inside.copy_(values)

    def bytes(self) -> list[bytes]:
        return [room.numpy().tobytes() for room in self._rooms]

    def is_guarded(self) -> bool:
        """Whether no guard byte was changed."""
        return all(bool((part == POISON).all()) for room in self._rooms for part in (room[:GUARD], room[-GUARD:]))


@dataclass
class Row:
    """A valid call, and what is wrong with each argument.

    wrong: values to be refused, besides those that every tensor is tried with. free: arguments of which any value will
    do. any_float: tensors of any number type; any_size: and those of any length.
    """

    call: Callable[..., Any]
    given: dict[str, Any]
    wrong: dict[str, list[Any]] = field(default_factory=dict)
    free: frozenset[str] = frozenset()
    any_float: frozenset[str] = frozenset()
    any_size: frozenset[str] = frozenset()


ROWS: dict[str, Callable[[Memory], Row]] = {}
NO_ARGUMENTS = {"MatrixFormat.least_block", "Runner.threads", "Runner.busy_s", "best_level", "levels"}


def row(name: str) -> Callable[[Callable[[Memory], Row]], Callable[[Memory], Row]]:
    def keep(make: Callable[[Memory], Row]) -> Callable[[Memory], Row]:
        ROWS[name] = make
        return make

    return keep


@functools.cache
def _packed_matrix(rows: int, columns: int, name: str) -> Tensor:
    return MATRIX_FORMATS[name].pack(torch.randn(rows, columns) / 8, fast=True).flatten()


@functools.cache
def _packed_expert(width: int) -> Tensor:
    shape, fmt = ExpertShape(width, NEURONS, has_bias=True), FORMATS["int4"]
    packed = torch.zeros(fmt.expert_bytes(shape), dtype=torch.uint8)
    fmt.pack(packed, shape, {part: torch.randn(size) / 8 for part, size in shape.parts.items()}, fast=True)
    return packed


def linear(m: Memory, rows: int, columns: int = D, name: str = "int4") -> Any:
    packed = m.hold(_packed_matrix(rows, columns, name))
    return kernels.Linear(packed, KERNEL_FORMATS[name], rows, columns, m.hold(torch.randn(rows)))


def norm(m: Memory, width: int = D) -> Any:
    return kernels.Norm(m.hold(torch.rand(width) + 0.5), 0.0, 1e-6)


def attention(m: Memory, *, width: int = D, head: int = HEAD, groups: int = GROUPS, dtype: str = "bf16") -> Any:
    k, v = (linear(m, groups * head, width) for _ in range(2))
    return kernels.Attention(
        linear(m, HEADS * head, width), k, v, norm(m, head), None, head, getattr(kernels.Type, dtype), 0.25
    )


def first_half(m: Memory, *, width: int = D, dtype: str = "bf16") -> Any:
    parts = attention(m, width=width, dtype=dtype), linear(m, width, HEADS * HEAD), norm(m, width), norm(m, width)
    return kernels.FirstHalf(*parts)


def router(m: Memory, *, width: int = D, experts: int = EXPERTS, dtype: torch.dtype = torch.bfloat16) -> Any:
    return kernels.Router(m.hold(torch.randn(experts, width).to(dtype)), TOP_K, True, kernels.Type.fp32)


def shape_values(**changes: Any) -> dict[str, Any]:
    return {
        "hidden": D,
        "neurons": NEURONS,
        "has_gate": True,
        "has_bias": True,
        **dict.fromkeys(("gate", "up", "down"), KERNEL_FORMATS["int4"]),
        "block": 64,
        "activation": kernels.Activation.silu,
        "alpha": 0.0,
        "limit": 0.0,
        "offset": 0.0,
        "orders": 0,
    } | changes


def expert(m: Memory, width: int = D) -> Tensor:
    return m.hold(_packed_expert(width))


def decoder_layer(m: Memory, *, width: int = D, dtype: torch.dtype = torch.bfloat16) -> Any:
    return kernels.DecoderLayer(
        first_half(m, width=width, dtype=TYPES[dtype]),
        router(m, width=width, dtype=dtype),
        kernels.Shape(**shape_values(hidden=width)),
        tuple(expert(m, width) for _ in range(EXPERTS)),
    )


def runner(threads: int = 2) -> Any:
    return kernels.Runner(threads, [])


def numbers(m: Memory, *size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return m.hold(torch.randn(size).to(dtype))


def cache(m: Memory) -> Tensor:
    return numbers(m, SEQUENCES, GROUPS, LENGTH, HEAD)


def wrong_caches(m: Memory) -> list[Tensor]:
    """Of a layer's keys or values, whatever the other ones are."""
    room = numbers(m, 4 * SEQUENCES * GROUPS * LENGTH * HEAD)
    size = SEQUENCES, GROUPS, LENGTH, HEAD
    sizes = [
        (SEQUENCES, GROUPS + 1, LENGTH, HEAD),
        (SEQUENCES, GROUPS, LENGTH, HEAD + 16),
        (SEQUENCES, GROUPS, 0, HEAD),
    ]
    sizes += [(n, GROUPS, LENGTH, HEAD) for n in (0, 1, SEQUENCES + 1, 2 * SEQUENCES)]
    sizes += [(GROUPS, LENGTH, HEAD), (SEQUENCES, GROUPS, LENGTH - 1, HEAD), (SEQUENCES, GROUPS, NEW - 1, HEAD)]
    head = LENGTH * HEAD
    all_heads = GROUPS * head
    strides = [(all_heads, head - 1, HEAD, 1), (all_heads, 0, HEAD, 1), (all_heads, head, HEAD, 2)]
    strides += [(all_heads, 1, HEAD * GROUPS, 1), (all_heads, HEAD, HEAD * GROUPS, 1)]
    strides += [(between, head, HEAD, 1) for between in (0, all_heads - 1)]  # sequences that overlap
    # As far apart as the other's are not.
    strides += [(GROUPS * (head + 16), head + 16, HEAD, 1), (all_heads + 16, head, HEAD, 1)]
    return [numbers(m, *size) for size in sizes] + [room.as_strided(size, stride) for stride in strides]


@row("MatrixFormat")
def _(m: Memory) -> Row:
    code, scale, zero = kernels.Code, kernels.Scale, kernels.Zero
    values = {"code": code.U4, "group": 32, "scale": scale.FP16, "zero": zero.CONSTANT}
    values |= {"constant": 8, "super_group": 0}
    wrong = {
        "code": [code.FP32, code.S8, code.E2M1, code.E4M3, 13, None],
        "group": [-1, 1, 8, 17, 48, 256, 2**40],
        "scale": [scale.NONE, scale.BLOCK, scale.K4, scale.K2, scale.K6, scale.K3, 12, None],
        "zero": [zero.NONE, zero.MIN, zero.INT, 6, None],  # with a constant
        "constant": [-1, 256, 2**40],
        "super_group": [-1, 1, 2**40, None],
    }
    return Row(kernels.MatrixFormat, values, wrong)


@row("MatrixFormat.panel_bytes")
def _(m: Memory) -> Row:
    return Row(kernel_format(MATRIX_FORMATS["int4"]).panel_bytes, {"columns": D}, {"columns": [0, -1, 2**40, None]})


@row("Shape")
def _(m: Memory) -> Row:
    sizes = [0, -1, 2**40]
    clamped = kernels.Activation.clamped_swiglu
    wrong = {"hidden": sizes, "neurons": sizes, "activation": [None, 5, -1]}
    wrong |= {name: [None, 7, kernels.Type.fp32] for name in ("gate", "up", "down")} | {"block": [0, -64, 32, 65, 512]}
    wrong["orders"] = [-1, 3, 2**40, None]
    free = frozenset({"has_bias", "alpha", "limit", "offset", "has_gate"})
    with pytest.raises(ValueError, match="needs a gate"):
        kernels.Shape(**shape_values(has_gate=False, activation=clamped))
    with pytest.raises(ValueError, match="orders"):
        kernels.Shape(**shape_values(has_gate=False, orders=2))
    return Row(kernels.Shape, shape_values(), wrong, free)


@row("Linear")
def _(m: Memory) -> Row:
    rows, fmt = 33, MATRIX_FORMATS["int4"]
    packed = m.hold(fmt.pack(torch.randn(rows, D)).flatten())
    bias = m.hold(torch.randn(rows))
    values = {"packed": packed, "format": KERNEL_FORMATS["int4"], "rows": rows, "columns": D, "bias": bias}
    sizes = [0, -1, 2**40, 2**62]
    wrong: dict[str, list[Any]] = {
        "rows": [*sizes, 32, 49],
        "columns": [*sizes, 64, 129],
        "packed": [m.hold(packed, 1)],
    }
    wrong["format"] = [fmt for name, fmt in KERNEL_FORMATS.items() if name != "int4"]
    return Row(kernels.Linear, values, wrong)


@row("Norm")
def _(m: Memory) -> Row:
    values = {"weight": m.hold(torch.rand(D)), "offset": 0.0, "epsilon": 1e-6}
    free = frozenset({"offset", "epsilon"})
    return Row(kernels.Norm, values, {"weight": [torch.rand(0)]}, free, frozenset({"weight"}), frozenset({"weight"}))


@row("Attention")
def _(m: Memory) -> Row:
    names = ("q", "k", "v", "q_norm", "k_norm", "head", "type", "scaling")
    q, k, v = linear(m, HEADS * HEAD), linear(m, GROUPS * HEAD), linear(m, GROUPS * HEAD)
    values = (q, k, v, norm(m, HEAD), norm(m, GROUPS * HEAD), HEAD, kernels.Type.bf16, 0.25)
    other = [linear(m, GROUPS * HEAD, D + 1), linear(m, GROUPS * HEAD + 1), linear(m, 3 * HEAD), None]
    wrong = {
        "q": [linear(m, HEADS * HEAD, D - 1), linear(m, 3 * HEAD), linear(m, 70), None],
        "k": other,
        "v": other,
        "q_norm": [norm(m, HEAD + 1), norm(m, 2 * HEADS * HEAD)],
        "k_norm": [norm(m, HEAD + 1), norm(m, HEADS * HEAD)],
        "head": [0, -16, 8, 12, 64, 2**40],
        "type": [KERNEL_FORMATS["bf16"], kernels.Code.S8, 7, None],
    }
    return Row(kernels.Attention, dict(zip(names, values, strict=True)), wrong, frozenset({"scaling"}))


def _rotary(m: Memory) -> tuple[dict[str, Tensor], dict[str, list[Any]]]:
    wrong = [numbers(m, STEP, size) for size in (0, 1, HEAD - 1, HEAD + 2, 2 * HEAD)]
    wrong += [numbers(m, tokens, HEAD) for tokens in (1, STEP - 1, 2 * STEP)]
    return {"cosine": numbers(m, STEP, HEAD), "sine": numbers(m, STEP, HEAD)}, {"cosine": wrong, "sine": wrong}


def _seen(m: Memory, *, padded: bool = False) -> tuple[dict[str, Tensor], dict[str, list[Any]]]:
    """What each token sees of the cache, and ranges that are none of it; padding may see nothing."""
    good = torch.tensor([[0, 0] if padded else [0, LENGTH - 1], [0, LENGTH], [3, LENGTH - 1], [3, LENGTH]])
    wrong, empty = [], [] if padded else [[3, 3], [0, 0]]
    beside = (
        [0, LENGTH + 1],
        [LENGTH + 1, LENGTH + 1],
        [-1, 3],
        [-1, -1],
        [4, 3],
        [0, 2**40],
        [-(2**62), 2],
        [0, -(2**63)],
    )
    for bad in (*beside, *empty):
        changed = good.clone()
        changed[int(torch.randint(0, STEP, ()))] = torch.tensor(bad)
        wrong.append(m.hold(changed))
    return {"seen": m.hold(good)}, {"seen": wrong}


def _wrong_steps(m: Memory) -> list[Tensor]:
    """Hidden states of other numbers of tokens: none, too many, and as the cache's sequences cannot all have."""
    return [numbers(m, tokens, D) for tokens in (0, STEP - 1, 65, 66)]


NO_RUNNER: dict[str, list[Any]] = {"runner": [None, 0], "level": ["no such level", None]}


@row("Attention.project")
def _(m: Memory) -> Row:
    rotary, wrong = _rotary(m)
    values = {"runner": runner(), "level": "", "x": numbers(m, STEP, D), **rotary}
    wrong["x"] = _wrong_steps(m)
    values |= {name: numbers(m, STEP, heads * HEAD) for name, heads in (("q", HEADS), ("k", GROUPS), ("v", GROUPS))}
    return Row(attention(m).project, values, NO_RUNNER | wrong)


@row("Attention.attend")
def _(m: Memory) -> Row:
    seen, wrong = _seen(m, padded=True)
    query, out = numbers(m, STEP, HEADS * HEAD), numbers(m, STEP, HEADS * HEAD)
    values = {"runner": runner(), "level": "", "query": query, "keys": cache(m), "values": cache(m), **seen}
    wrong |= NO_RUNNER | {"keys": wrong_caches(m), "values": wrong_caches(m)}
    return Row(attention(m).attend, values | {"out": out}, wrong)


@row("FirstHalf")
def _(m: Memory) -> Row:
    values = {"attention": attention(m), "output": linear(m, D, HEADS * HEAD), "before": norm(m), "after": norm(m)}
    norms = [norm(m, D + 1), norm(m, D - 1), None]
    wrong = {
        "attention": [attention(m, width=D + 1), attention(m, head=32), None],
        "output": [
            linear(m, D, HEADS * HEAD // 2),
            linear(m, D + 1, HEADS * HEAD),
            linear(m, D - 1, HEADS * HEAD),
            None,
        ],
        "before": norms,
        "after": norms,
    }
    return Row(kernels.FirstHalf, values, wrong)


@row("FirstHalf.run")
def _(m: Memory) -> Row:
    rotary, wrong = _rotary(m)
    seen, wrong_seen = _seen(m)
    x, hidden, normed = (numbers(m, SEQUENCES, NEW, D) for _ in range(3))
    values = {"runner": runner(), "level": "", "x": x, **rotary, "keys": cache(m), "values": cache(m), **seen}
    wrong |= NO_RUNNER | wrong_seen | {"keys": wrong_caches(m), "values": wrong_caches(m), "x": _wrong_steps(m)}
    return Row(first_half(m).run, values | {"hidden": hidden, "normed": normed}, wrong)


@row("Router")
def _(m: Memory) -> Row:
    values = {
        "weight": numbers(m, EXPERTS, D),
        "top_k": TOP_K,
        "normalized": True,
        "score_type": kernels.Type.fp32,
    }
    wrong = {
        "weight": [numbers(m, EXPERTS * D), numbers(m, 1, D), numbers(m, 0, D), numbers(m, EXPERTS, 0)],
        "top_k": [0, -1, EXPERTS + 1, 2**40],
        "score_type": [KERNEL_FORMATS["fp32"], kernels.Code.FP32, 7],
    }
    weight = frozenset({"weight"})
    return Row(kernels.Router, values, wrong, frozenset({"normalized"}), weight, weight)


@row("Router.run")
def _(m: Memory) -> Row:
    values = {"runner": runner(), "level": "", "x": numbers(m, STEP, D), "logits": numbers(m, STEP, EXPERTS)}
    chosen = m.hold(torch.zeros(STEP, TOP_K, dtype=torch.int64))
    values |= {"scores": m.hold(torch.rand(STEP, TOP_K)), "chosen": chosen}
    return Row(router(m).run, values, NO_RUNNER)


@row("DecoderLayer")
def _(m: Memory) -> Row:
    experts = tuple(expert(m) for _ in range(EXPERTS))
    shape = kernels.Shape(**shape_values())
    others = [shape_values(hidden=D + 1), shape_values(neurons=NEURONS + 64), shape_values(has_bias=False)]
    others += [shape_values(has_gate=False), shape_values(up=KERNEL_FORMATS["int8"]), shape_values(orders=1)]
    routers = [router(m, width=D - 1), router(m, experts=EXPERTS + 1), router(m, experts=EXPERTS - 1)]
    wrong = {
        "first": [first_half(m, width=D + 1), first_half(m, dtype="fp32"), first_half(m, dtype="fp16"), None],
        "router": [*routers, router(m, dtype=torch.float32), None],
        "shape": [*(kernels.Shape(**values) for values in others), None],
        "experts": [(*experts[:-1], wrong) for wrong in wrong_tensors(experts[-1], m)],
    }
    wrong["experts"] += [(*experts[:-1], m.hold(experts[0], 4)), experts[:-1], (*experts, experts[0]), (), None]
    return Row(kernels.DecoderLayer, dict(zip(wrong, (first_half(m), router(m), shape, experts), strict=True)), wrong)


@row("DecoderLayers")
def _(m: Memory) -> Row:
    layer = decoder_layer(m)
    others = [decoder_layer(m, width=D + 1), decoder_layer(m, dtype=torch.float16), None]
    return Row(kernels.DecoderLayers, {"layers": [layer, layer]}, {"layers": [[], None, *([layer, x] for x in others)]})


@row("DecoderLayers.run")
def _(m: Memory) -> Row:
    rotary, wrong = _rotary(m)
    caches = [(cache(m), cache(m)) for _ in range(2)]
    bad = [*wrong_caches(m), *wrong_tensors(caches[1][0], m)]
    wrong["caches"] = [caches[:1], [*caches, caches[0]], [], None, [caches[0], caches[1][:1]]]
    wrong["caches"] += [[caches[0], (one, caches[1][1])] for one in bad] + [
        [caches[0], (caches[1][0], one)] for one in bad
    ]
    seen, wrong_seen = _seen(m)
    x, hidden = (numbers(m, SEQUENCES, NEW, D) for _ in range(2))
    values = {"runner": runner(), "level": "", "x": x, **rotary, "caches": caches, **seen}
    layers = kernels.DecoderLayers([decoder_layer(m) for _ in range(2)])
    return Row(layers.run, values | {"hidden": hidden}, NO_RUNNER | wrong | wrong_seen | {"x": _wrong_steps(m)})


@row("Runner")
def _(m: Memory) -> Row:
    wrong = {"threads": [0, -1, 2000, 2**31 - 1], "cpus": [[-1], [0, -5], None]}
    return Row(kernels.Runner, {"threads": 2, "cpus": [0]}, wrong)


def _works(m: Memory) -> tuple[list[ExpertWork], list[Any]]:
    """One expert's work on some of the tokens, and all that can be wrong with it."""
    rows, weights = m.hold(torch.tensor([2, 0, 1, 1])), m.hold(torch.rand(4))
    good = ExpertWork(expert(m), range(NEURONS), rows, weights, range(1, 3), 0)
    wrong: list[Any] = []
    for name in ("packed", "rows", "weights"):
        value = getattr(good, name)
        wrong += [good._replace(**{name: one}) for one in wrong_tensors(value, m)]
    wrong.append(good._replace(packed=m.hold(good.packed, 32)))
    for bad in (-1, TOKENS, 2**40, -(2**63)):
        wrong.append(good._replace(rows=m.hold(torch.tensor([0, 0, bad, 0]))))
    for begin, end in [(0, 101), (0, 65), (-64, 64), (32, 100), (64, 0), (0, 128), (128, 128), (0, 2**62)]:
        wrong.append(good._replace(neurons=range(begin, end)))
    wrong += [good._replace(span=span) for span in (range(5), range(-1, 2), range(3, 1), range(4, 5), 3)]
    wrong += [good[:4], (), None, good._replace(neurons=None)]
    return [good], [[good, one] for one in wrong] + [None, 3]


@row("Runner.run")
def _(m: Memory) -> Row:
    works, wrong = _works(m)
    shape = kernels.Shape(**shape_values())
    others = [kernels.Shape(**shape_values(hidden=D + 1)), kernels.Shape(**shape_values(neurons=NEURONS + 64)), None]
    values = {
        "level": "",
        "shape": shape,
        "x": numbers(m, TOKENS, D),
        "works": works,
        "out": m.hold(torch.zeros(TOKENS, D)),
    }
    wrongs = {"level": NO_RUNNER["level"], "shape": others, "works": wrong, "x": [numbers(m, D, TOKENS)]}
    return Row(runner().run, values, wrongs, any_float=frozenset({"x"}))


@row("Runner.run_linear")
def _(m: Memory) -> Row:
    values = {"level": "", "linear": linear(m, 33), "x": numbers(m, TOKENS, D), "out": numbers(m, TOKENS, 33)}
    others = [linear(m, 33, D + 1), linear(m, 34), linear(m, 32), None]
    return Row(runner().run_linear, values, {"level": NO_RUNNER["level"], "linear": others})


@row("Runner.look_up")
def _(m: Memory) -> Row:
    ids = m.hold(torch.tensor([[0, 32, 7]]))
    values = {"level": "", "table": linear(m, 33), "ids": ids, "out": numbers(m, 1, 3, D)}
    wrong = [m.hold(torch.tensor([[0, bad, 7]])) for bad in (-1, 33, 2**40, -(2**63))]
    others = [linear(m, 33, D + 1), linear(m, 32), None]
    wrongs = {"level": NO_RUNNER["level"], "table": others, "ids": wrong}
    return Row(runner().look_up, values, wrongs, any_float=frozenset({"out"}))


@row("Runner.rms_norm")
def _(m: Memory) -> Row:
    values = {"level": "", "x": numbers(m, TOKENS, D), "weight": m.hold(torch.rand(D)), "offset": 0.0, "epsilon": 1e-6}
    values["out"] = numbers(m, TOKENS, D)
    wrong = {"level": NO_RUNNER["level"], "weight": [torch.rand(0)]}
    return Row(runner().rms_norm, values, wrong, frozenset({"offset", "epsilon"}), any_float=frozenset({"weight"}))


@row("Runner.touch")
def _(m: Memory) -> Row:
    memory = m.hold(torch.zeros(10_000, dtype=torch.uint8))
    return Row(runner().touch, {"memory": memory}, any_size=frozenset({"memory"}))


@row("Runner.read_seconds")
def _(m: Memory) -> Row:
    values = {"level": "", "memory": m.hold(torch.rand(5_001)), "prefetch": 512}
    wrong = {"level": NO_RUNNER["level"], "prefetch": [-2, 2**40, None]}
    return Row(runner().read_seconds, values, wrong, any_size=frozenset({"memory"}))


@row("Runner.fma_flops")
def _(m: Memory) -> Row:
    values = {"level": "", "rounds": 100}
    return Row(runner().fma_flops, values, {"level": NO_RUNNER["level"], "rounds": [0, -1, None]})


@row("Runner.dot_flops")
def _(m: Memory) -> Row:
    values = {"level": "", "rounds": 100}
    return Row(runner().dot_flops, values, {"level": NO_RUNNER["level"], "rounds": [0, -1, None]})


def stored_values(m: Memory, **changes: Any) -> dict[str, Any]:
    """40 rows of 96 columns of 4 bits, with a scale and a zero for 32 each."""
    fmt = kernels.MatrixFormat(
        code=kernels.Code.U4,
        group=32,
        scale=kernels.Scale.FP16,
        zero=kernels.Zero.INT,
        constant=0,
        super_group=0,
    )
    return {
        "format": fmt,
        "layout": kernels.Layout.nibbles,
        "rows": 40,
        "columns": 96,
        "codes": m.hold(torch.randint(0, 256, (40 * 48,), dtype=torch.uint8)),
        "row_stride": 0,
        "column_stride": 0,
        "scales": m.hold(torch.randint(0, 256, (40 * 3 * 2,), dtype=torch.uint8)),
        "zeros": m.hold(torch.randint(0, 16, (40 * 3,), dtype=torch.uint8)),
        "flip": 0,
        "tensor_scale": 1.0,
        "row_order": m.hold(torch.randperm(40)),
        "column_order": m.hold(torch.randperm(96)),
        **changes,
    }


@row("Stored")
def _(m: Memory) -> Row:
    layouts = kernels.Layout
    wrong = {
        "format": [None, 7, kernel_format(MATRIX_FORMATS["int8"]), kernel_format(MATRIX_FORMATS["bf16"])],
        "layout": [None, 7, layouts.plain, layouts.gguf],
        "rows": [0, -1, 39, 41, 2**40, None],
        "columns": [0, -1, 94, 98, 2**40, None],
        "flip": [1, 127, 256, -128, None],
        "row_order": [m.hold(torch.tensor([0, bad])) for bad in (-1, 40, 2**40)],
        "column_order": [m.hold(torch.full((96,), bad)) for bad in (-1, 96)],
    }
    free = frozenset({"row_stride", "column_stride", "tensor_scale"})
    plain = stored_values(m, layout=layouts.plain, format=kernel_format(format_named("q8_0")), zeros=None)
    plain |= {"codes": m.hold(torch.zeros(40 * 96, dtype=torch.uint8)), "row_stride": 96, "column_stride": 1}
    kernels.Stored(**plain)
    for change in ({"row_stride": 97}, {"column_stride": 2}, {"row_stride": -1}, {"row_stride": 2**60}):
        with pytest.raises(ValueError, match=r"strides|bytes"):
            kernels.Stored(**plain | change)
    return Row(kernels.Stored, stored_values(m), wrong, free, any_size=frozenset({"row_order"}))


@row("repack")
def _(m: Memory) -> Row:
    matrix = kernels.Stored(**stored_values(m))
    out = m.hold(torch.zeros(2 * format_named("int4g32z").panel_bytes(128), dtype=torch.uint8))
    right = (matrix, 0, 32, 0, 128, out)
    wrong: list[Any] = [None, [None], [right[:5]], [(*right, 0)], [(None, *right[1:])]]
    for place, values in enumerate(
        ([-1, 2**40], [0, 33, -16, 2**40], [-128, 1, 32, 64, 96], [0, 32, 64, 256, -1]), start=1
    ):
        wrong += [[(*right[:place], value, *right[place + 1 :])] for value in values]
    wrong += [[(*right[:5], bad)] for bad in wrong_tensors(out, m)]
    return Row(kernels.repack, {"runner": runner(), "jobs": [right]}, {"runner": [None, 3], "jobs": wrong})


@row("solve")
def _(m: Memory) -> Row:
    rows, columns, group = 9, D, 32
    groups = -(-columns // group)
    sizes = [0, -1, 2**40, 2**62, None]
    values = {"runner": runner(), "level": "", "weights": numbers(m, rows, columns), "rows": rows, "columns": columns}
    values |= {"bits": 3, "group": group, "iterate": True, "round_zero": False}
    values["codes"] = m.hold(torch.zeros(rows, groups * group, dtype=torch.uint8))
    values |= {name: m.hold(torch.zeros(rows, groups)) for name in ("scales", "zeros")}
    wrong = NO_RUNNER | {"rows": [*sizes, rows - 1, rows + 1], "columns": [*sizes, columns - 1, columns + 1]}
    wrong |= {"bits": [0, 1, 7, 9, 16, -3, 2**40, None], "group": [0, -32, 8, 16, 48, 64, 128, 256, 2**40, None]}
    wrong |= {"iterate": [None, "yes"], "round_zero": [None, "yes"]}
    return Row(kernels.solve, values, wrong, any_float=frozenset({"weights"}))


@row("write_fitted")
def _(m: Memory) -> Row:
    rows, columns, fmt = 9, D, MATRIX_FORMATS["hqq2"]
    groups = -(-columns // fmt.group)
    sizes = [0, -1, 2**40, 2**62, None]
    values = {"runner": runner(), "format": KERNEL_FORMATS["hqq2"], "weights": numbers(m, rows, columns)}
    values |= {"rows": rows, "columns": columns}
    values |= {name: m.hold(torch.zeros(rows, groups)) for name in ("scales", "zeros")}
    values["out"] = m.hold(torch.zeros(1, fmt.matrix_bytes(rows, columns), dtype=torch.uint8))
    wrong = NO_RUNNER | {"rows": [*sizes, rows - 1, rows + 1], "columns": [*sizes, columns - 1, columns + 1]}
    wrong["format"] = [None, 3, *(kernel for name, kernel in KERNEL_FORMATS.items() if name != "hqq2")]
    wrong["out"] = _wrong_blocks(m, 1, fmt.matrix_bytes(rows, columns))
    return Row(kernels.write_fitted, values, wrong, any_float=frozenset({"weights"}))


def _wrong_blocks(m: Memory, blocks: int, n_bytes: int) -> list[Tensor]:
    """Bytes for panels in other blocks than there are, or in rows that overlap."""
    right = m.hold(torch.zeros(blocks * n_bytes, dtype=torch.uint8))
    overlapping = right.as_strided((max(blocks, 2), n_bytes), (n_bytes - 1 if blocks > 1 else 0, 1))
    shapes = [(blocks * n_bytes,), (1, blocks, n_bytes), (0, n_bytes), (blocks * n_bytes, 1)]
    return [right[: blocks * n_bytes * (0 not in shape)].view(shape) for shape in shapes] + [overlapping]


@row("write_signed_bytes")
def _(m: Memory) -> Row:
    blocks, rows, columns, fmt = 3, 9, D, MATRIX_FORMATS["int8"]
    sizes = [0, -1, 2**40, 2**62, None]
    values = {"runner": runner(), "format": KERNEL_FORMATS["int8"], "weights": numbers(m, blocks, rows, columns)}
    values |= {"rows": rows, "columns": columns}
    values["out"] = m.hold(torch.zeros(blocks, fmt.matrix_bytes(rows, columns), dtype=torch.uint8))
    wrong = NO_RUNNER | {"rows": [*sizes, rows - 1, rows + 1], "columns": [*sizes, columns - 1, columns + 1]}
    wrong["format"] = [None, 3, *(kernel for name, kernel in KERNEL_FORMATS.items() if name != "int8")]
    wrong["out"] = _wrong_blocks(m, blocks, fmt.matrix_bytes(rows, columns))
    wrong["weights"] = [
        numbers(m, *size) for size in ((2, rows, columns), (blocks * rows, columns), (0, rows, columns))
    ]
    return Row(kernels.write_signed_bytes, values, wrong, any_float=frozenset({"weights"}))


@row("crc32c")
def _(m: Memory) -> Row:
    values = {"data": m.hold(torch.randint(0, 256, (13_000,), dtype=torch.uint8)), "crc": 5, "by_tables": False}
    wrong = {"crc": [-1, 2**32, 2**70, None], "by_tables": [None, 7]}
    return Row(kernels.crc32c, values, wrong, any_size=frozenset({"data"}))


@row("crc32c_combine")
def _(m: Memory) -> Row:
    wrong = {name: [-1, 2**32, 2**70, None] for name in ("first", "second")} | {"second_bytes": [-1, 2**70, None]}
    return Row(kernels.crc32c_combine, {"first": 1, "second": 2, "second_bytes": 3}, wrong)


def wrong_tensors(
    right: Tensor, m: Memory, *, any_float: bool = False, any_size: bool = False, optional: bool = False
) -> list[Any]:
    """What every function refuses in the place of a tensor."""
    fits = FLOATS if any_float else [right.dtype]
    wrong: list[Any] = [m.hold(torch.ones(right.shape).to(dtype)) for dtype in DTYPES if dtype not in fits]
    if not any_size:
        *lead, last = right.shape
        wrong += [m.hold(right.flatten()[:-1]), m.hold(torch.cat([right.flatten(), right.flatten()[:1]]))]
        wrong += [m.hold(torch.ones(*lead, size).to(right.dtype)) for size in (last - 1, last + 1)]
    if right.numel() > 1:
        wrong.append(m.hold(right.repeat_interleave(2, -1))[..., ::2])
        wrong.append(m.hold(right.flatten()[:1]).expand(right.shape))
    wrong += [torch.ones(right.shape, dtype=right.dtype, device="meta"), right.to_sparse(), 0, right.tolist(), "x"]
    if right.element_size() > 1:
        room = bytearray(right.numel() * right.element_size() + 1)
        wrong.append(torch.frombuffer(room, dtype=right.dtype, offset=1).view(right.shape))
    return wrong if optional else [*wrong, None]


def mutations(row: Row, m: Memory) -> Iterator[tuple[str, Any]]:
    for name, value in row.given.items():
        for bad in row.wrong.get(name, []):
            yield name, bad
        if isinstance(value, Tensor):
            kinds = {
                "any_float": name in row.any_float,
                "any_size": name in row.any_size,
                "optional": name in ("bias", "row_order", "column_order", "seen"),
            }
            for bad in wrong_tensors(value, m, **kinds):
                yield name, bad


def offered() -> dict[str, Any]:
    """Everything that the module has, by name: functions, classes, their methods and properties."""
    found: dict[str, Any] = {}
    for name in dir(kernels):
        value = getattr(kernels, name)
        if name.startswith("__") or hasattr(value, "__members__") or isinstance(value, int):  # an enum checks its own
            continue
        if not isinstance(value, type):
            found[name] = value
            continue
        methods = [leaf for leaf in dir(value) if not leaf.startswith("__")]
        found |= {f"{name}.{leaf}": getattr(value, leaf) for leaf in methods} | {name: value.__init__}
    return found


def test_every_function_has_a_row() -> None:
    assert set(offered()) == set(ROWS) | NO_ARGUMENTS
    assert not set(ROWS) & NO_ARGUMENTS


@pytest.mark.parametrize("name", ROWS)
def test_every_argument_is_tried(name: str) -> None:
    memory = Memory()
    row = ROWS[name](memory)
    signature = re.sub(r"\[[^\]]*\]", "", offered()[name].__nb_signature__[0][0])
    arguments = set(re.findall(r"(\w+):", signature)) - {"self"}
    assert arguments == set(row.given), "the valid call leaves out an argument, or names one that is not there"
    assert arguments - {argument for argument, _ in mutations(row, memory)} == set(row.free)


@pytest.mark.parametrize("name", ROWS)
def test_a_valid_call_stays_inside(name: str) -> None:
    memory = Memory()
    row = ROWS[name](memory)
    row.call(**row.given)
    assert memory.is_guarded()


@pytest.mark.parametrize("name", ROWS)
def test_what_does_not_fit_is_refused_untouched(name: str) -> None:
    memory = Memory()
    row = ROWS[name](memory)
    for argument, bad in list(mutations(row, memory)):
        before = memory.bytes()
        with suppress(ValueError, IndexError, TypeError):
            row.call(**row.given | {argument: bad})
            pytest.fail(f"{argument} = {bad!r} was taken")
        assert memory.bytes() == before, (argument, bad)
    row.call(**row.given)  # which was not spoiled either


@pytest.mark.parametrize("name", [name for name in ROWS if "." not in name])
def test_objects_cannot_change(name: str) -> None:
    row = ROWS[name](Memory())
    made = row.call(**row.given)
    for attribute in [*row.given, "anything", *(leaf for leaf in dir(made) if not leaf.startswith("__"))]:
        with pytest.raises(AttributeError):
            setattr(made, attribute, None)


def test_objects_keep_what_they_read_alive() -> None:
    memory, seen = Memory(), []
    hold = memory.hold

    def held(values: Tensor) -> Tensor:
        inside = hold(values)
        seen.append(weakref.ref(inside))
        return inside

    memory.hold = held  # type: ignore[method-assign]
    layers = kernels.DecoderLayers([decoder_layer(memory) for _ in range(2)])
    gc.collect()
    assert seen
    assert all(tensor() is not None for tensor in seen)
    del layers
    gc.collect()
    assert all(tensor() is None for tensor in seen)


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_odd_sizes_stay_inside(level: str, data: st.DataObject) -> None:
    """Sizes that fill no panel, group or vector; results are others' business."""
    m, run = Memory(), runner(data.draw(st.integers(1, 3)))
    width, rows, tokens = (data.draw(st.integers(1, most)) for most in (150, 70, 40))
    name, dtype = data.draw(st.sampled_from(sorted(KERNEL_FORMATS))), data.draw(st.sampled_from(FLOATS))
    matrix = linear(m, rows, width, name)
    x, out = numbers(m, tokens, width, dtype=dtype), numbers(m, tokens, rows, dtype=dtype)
    run.run_linear(level, matrix, x, out)
    run.look_up(level, matrix, m.hold(torch.randint(0, rows, (tokens,))), numbers(m, tokens, width, dtype=dtype))
    run.rms_norm(level, x, m.hold(torch.rand(width)), 1.0, 1e-6, numbers(m, tokens, width, dtype=dtype))
    solve_odd_sizes(m, run, level, data, x)
    shape = ExpertShape(width, data.draw(st.integers(1, 150)), data.draw(st.booleans()), data.draw(st.booleans()))
    orders = data.draw(st.integers(0, 1 + shape.has_gate))
    fmt = ExpertFormat(MATRIX_FORMATS[name], orders=orders)
    size = fmt.expert_bytes(shape)
    packed = m.hold(torch.zeros(size, dtype=torch.uint8))
    part = range(shape.neurons if data.draw(st.booleans()) else min(fmt.block, shape.neurons))
    index = m.hold(torch.randint(0, tokens, (data.draw(st.integers(0, 40)),)))
    values = {"hidden": width, "neurons": shape.neurons, "has_gate": shape.has_gate, "has_bias": shape.has_bias}
    kernel = kernels.Shape(
        **shape_values(
            orders=orders,
            block=fmt.block,
            **values,
            **dict.fromkeys(("gate", "up", "down"), KERNEL_FORMATS[name]),
        )
    )
    work = ExpertWork(packed, part, index, m.hold(torch.rand(len(index))))
    run.run(level, kernel, x, [work], m.hold(torch.zeros(tokens, width)))
    experts = data.draw(st.integers(1, 70))
    weight, top_k = numbers(m, experts, width, dtype=dtype), data.draw(st.integers(1, experts))
    chosen = m.hold(torch.zeros(tokens, top_k, dtype=torch.int64))
    route = kernels.Router(weight, top_k, False, kernels.Type.fp32)
    route.run(run, level, x, numbers(m, tokens, experts, dtype=dtype), m.hold(torch.zeros(tokens, top_k)), chosen)
    assert bool(((chosen >= 0) & (chosen < experts)).all())
    assert memory_of_attention(m, run, level, data, width, dtype)
    assert m.is_guarded()


def solve_odd_sizes(m: Memory, run: Any, level: str, data: st.DataObject, weights: Tensor) -> None:
    bits, group = data.draw(st.sampled_from([2, 3, 4, 5, 6, 8])), data.draw(st.sampled_from([16, 32, 64, 128]))
    (rows, columns), groups = weights.shape, -(-weights.shape[1] // group)
    codes = m.hold(torch.full((rows, groups * group), 255, dtype=torch.uint8))
    scales, zeros = (m.hold(torch.full((rows, groups), torch.nan)) for _ in range(2))
    kernels.solve(run, level, weights, rows, columns, bits, group, data.draw(st.booleans()), True, codes, scales, zeros)
    assert int(codes.max()) < 2**bits
    assert not bool((scales.isnan() | zeros.isnan()).any())


def memory_of_attention(m: Memory, run: Any, level: str, data: st.DataObject, width: int, dtype: torch.dtype) -> bool:
    """Run a layer's first half of odd sizes; whether only the last tokens of the cache were written."""
    head, groups, shared = 16 * data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    length, more = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 3))
    heads, turned = groups * shared, 2 * data.draw(st.integers(1, head // 2))
    q, k, v = (linear(m, size * head, width) for size in (heads, groups, groups))
    parts = kernels.Attention(q, k, v, norm(m, head), norm(m, groups * head), head, type_of(dtype), 0.1)
    first = kernels.FirstHalf(parts, linear(m, width, heads * head), norm(m, width), norm(m, width))
    sequences, new = data.draw(st.integers(1, 4)), data.draw(st.integers(1, min(5, length)))
    room = numbers(m, 2, sequences, groups, length + more, head, dtype=dtype)
    before, cosine, sine = room.clone(), *(numbers(m, sequences * new, turned, dtype=dtype) for _ in range(2))
    x, hidden, normed = (numbers(m, sequences, new, width, dtype=dtype) for _ in range(3))
    first.run(run, level, x, cosine, sine, room[0, :, :, :length], room[1, :, :, :length], None, hidden, normed)
    own = slice(length - new, length)
    room[:, :, :, own] = before[:, :, :, own] = 0
    return torch.equal(room, before)
