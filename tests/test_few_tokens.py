"""What few tokens meet in a decoder layer, in the kernels, against float64, torch, and each sequence alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from moestro.compute.cpu import CpuExperts, levels
from moestro.compute.experts import ExpertMath
from moestro.compute.few_tokens import (
    Norm,
    StepAttention,
    StepFirstHalf,
    StepLayer,
    StepLayers,
    StepRouter,
)
from moestro.memory.formats import FORMATS, MATRIX_FORMATS, ExpertShape
from packing import pack_matrix

LEVELS = [name for name, usable in levels().items() if usable]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
pytestmark = pytest.mark.skipif(not levels(), reason="built without the kernels: no compiler was there")


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """[heads, d] in float64."""
    first, second = x.chunk(2, -1)
    return x * cosine.double() + torch.cat((-second, first), -1) * sine.double()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", ["plain", "whole", "each head"])
def test_one_token_attention_at_every_level(level: str, dtype: torch.dtype, normed: str) -> None:
    """Projection, norms, rotary embedding and attention against float64; outputs start as NaN."""
    columns, head, heads, groups, scaling = 70, 48, 6, 2, 0.17
    fmt = MATRIX_FORMATS["fp32"]
    x, tolerance = torch.randn(columns).to(dtype), {torch.float32: 1e-5, torch.float16: 4e-3}.get(dtype, 3e-2)
    sizes = [heads * head, groups * head, groups * head]
    matrices, biases = [torch.randn(size, columns) / 8 for size in sizes], [torch.randn(sizes[0]), None, None]
    norms = [None if normed == "plain" else torch.randn(head if normed == "each head" else size) for size in sizes[:2]]
    cosine, sine = (part(torch.rand(head // 2) * 6).repeat(2).to(dtype) for part in (torch.cos, torch.sin))
    wanted: list[Tensor] = []
    for matrix, bias, norm in zip(matrices, biases, [*norms, None], strict=True):
        y = linear(x.double(), matrix.double(), None if bias is None else bias.double())
        if norm is not None:
            y = y.view(-1, norm.numel())
            y = (y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm).flatten()
        wanted.append(y.view(-1, head) if len(wanted) == 2 else _rotate(y.view(-1, head), cosine, sine))
    for threads in (1, 3):
        kernel = StepAttention(
            tuple(pack_matrix(fmt, m, b) for m, b in zip(matrices, biases, strict=True)),
            tuple(None if norm is None else Norm(norm, 0.0, 1e-6) for norm in norms),
            head=head,
            scaling=scaling,
            dtype=dtype,
            threads=threads,
            level=level,
        )
        q, k, v = (torch.full((size,), torch.nan, dtype=dtype) for size in sizes)
        kernel.project(x, cosine, sine, q, k, v)
        for got, exact in zip((q, k, v), wanted, strict=True):
            assert (got.double() - exact.flatten()).norm() <= tolerance * exact.norm()
        for length in (1, 2, 17, 129):
            room = torch.randn(2, 1, groups, length + 5, head).to(dtype)
            keys, values = room[0, :, :, :length], room[1, :, :, :length]  # heads are not next to one another
            got = kernel.attend(q, keys, values)
            query = q.double().view(groups, -1, head)
            share = (query @ keys[0].double().transpose(1, 2) * scaling).softmax(-1)  # [G, H / G, S]
            exact = (share @ values[0].double()).flatten()
            assert (got.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_router_kernel_at_every_level(level: str, dtype: torch.dtype) -> None:
    for experts, width, top_k in [(4, 33, 2), (64, 70, 8), (130, 2048, 1), (7, 5, 7)]:
        for normalized in (True, False):
            weight, x = torch.randn(experts, width).to(dtype), torch.randn(width).to(dtype)
            router = StepRouter(
                weight, top_k=top_k, normalized=normalized, score_dtype=torch.float32, threads=2, level=level
            )
            logits, scores, index = router.run(x)
            exact = linear(x.double(), weight.double())
            step = max(torch.finfo(dtype).eps, 1e-6)
            assert (logits[0].double() - exact).norm() <= step * exact.norm()
            shares, best = logits.float().softmax(-1).topk(top_k)
            assert torch.equal(index, best)
            torch.testing.assert_close(scores, shares / shares.sum() if normalized else shares, rtol=1e-5, atol=1e-8)


def test_equal_logits_are_chosen_as_torch_chooses() -> None:
    ties = 0
    for experts, top_k in [(8, 2), (64, 8), (128, 8), (256, 8), (600, 4)]:
        for _ in range(30):
            weight = torch.randint(-2, 3, (experts, 4)).float()
            router = StepRouter(weight, top_k=top_k, normalized=False, score_dtype=torch.float32, threads=1)
            logits, _, index = router.run(torch.tensor([1.0, 0.5, 0.25, 0.125]).mul(4).round())
            ties += len(logits.unique()) < experts
            assert torch.equal(index, logits.softmax(-1).topk(top_k).indices)
    assert ties > 100


def _normed(x: Tensor, norm: Norm) -> Tensor:
    """[D] in float64."""
    return x * (x.square().mean() + norm.epsilon).rsqrt() * norm.weight.double()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["fp32", "bf16", "int4"])
def test_a_whole_layer_at_every_level(level: str, dtype: torch.dtype, name: str) -> None:
    """Its first half and all of it, against float64 with the weights that the formats hold."""
    width, head, heads, groups, neurons, experts, length = 70, 16, 4, 2, 130, 5, 9
    fmt, tolerance = MATRIX_FORMATS[name], {torch.float32: 1e-3, torch.float16: 8e-3}.get(dtype, 6e-2)
    sizes = [(heads * head, width), (groups * head, width), (groups * head, width), (width, heads * head)]
    q, k, v, o = (pack_matrix(fmt, torch.randn(size) / 8) for size in sizes)
    before, after = (Norm(torch.rand(width) + 0.5, 0.0, 1e-6) for _ in range(2))
    gate = (torch.randn(experts, width) / 8).to(dtype)
    shape = ExpertShape(width, neurons)
    math = ExpertMath(shape, FORMATS[name], lambda g, u: silu(g) * u)
    packed = [torch.empty(math.format.expert_bytes(shape), dtype=torch.uint8) for _ in range(experts)]
    for each in packed:
        math.format.pack(each, shape, {part: torch.randn(size) / 8 for part, size in shape.parts.items()})
    x = torch.randn(1, 1, width).to(dtype)
    cosine, sine = (part(torch.rand(head // 2) * 6).repeat(2).to(dtype) for part in (torch.cos, torch.sin))
    past = torch.randn(2, 1, groups, length, head).to(dtype)

    normed = _normed(x.double().flatten(), before)
    query, key, value = (linear(normed, m.unpack(torch.float64)).view(-1, head) for m in (q, k, v))
    query, key = (_rotate(part, cosine, sine) for part in (query, key))
    keys, values = past[0, 0].double(), past[1, 0].double()  # [G, S, d]
    keys[:, -1], values[:, -1] = key, value
    share = (query.view(groups, -1, head) @ keys.transpose(1, 2) * 0.25).softmax(-1)  # [G, H / G, S]
    half = x.double().flatten() + linear((share @ values).flatten(), o.unpack(torch.float64))
    normed = _normed(half, after)
    whole = half.clone()
    for each, score in zip(packed, linear(normed, gate.double()).softmax(-1), strict=True):
        expert = math.format.unpack(each, shape, range(neurons), torch.float64)
        assert expert.gate is not None
        whole += score * linear(silu(linear(normed, expert.gate)) * linear(normed, expert.up), expert.down)

    outs = []
    for threads in (1, 3):
        attention = StepAttention(
            (q, k, v), (None, None), head=head, scaling=0.25, dtype=dtype, threads=threads, level=level
        )
        first = StepFirstHalf(attention, o, before, after)
        # All experts: with fewer, 16 bits may choose others than float64.
        router = StepRouter(
            gate, top_k=experts, normalized=False, score_dtype=torch.float32, threads=threads, level=level
        )
        layer = StepLayer(first, router, CpuExperts(threads).kernel_shape(math), packed)
        alone, three = StepLayers([layer]), StepLayers([layer] * 3)
        cache = past.clone()
        cache[:, :, :, -1] = torch.nan  # where the token's own go
        got, ready = first.run(x, cosine, sine, *cache)
        for ours, exact in [(got, half), (ready, normed), (cache[0, 0, :, -1], key), (cache[1, 0, :, -1], value)]:
            assert (ours.double().view(exact.shape) - exact).norm() <= tolerance * exact.norm()
        cache[:, :, :, -1] = torch.nan
        out, *counts = alone.run(x, cosine, sine, [(cache[0], cache[1])])
        assert counts == [experts, experts]
        assert out.shape == x.shape
        assert (out.double().flatten() - whole).norm() <= tolerance * whole.norm()
        caches = [(each[0], each[1]) for each in (past.clone() for _ in range(3))]
        outs.append(three.run(x, cosine, sine, caches)[0])
        for _ in range(2):
            out = alone.run(out, cosine, sine, [(cache[0], cache[1])])[0]
        assert torch.equal(out, outs[-1])
    assert torch.equal(*outs)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sequences", "new"), [(1, 1), (5, 1), (1, 6), (3, 4)])
def test_attention_of_several_tokens(level: str, dtype: torch.dtype, sequences: int, new: int) -> None:
    """Sequences that begin at some token, which what stands before it, NaN, may not reach; outputs start as NaN."""
    columns, head, heads, groups, length, tokens = 70, 32, 6, 2, 700, sequences * new
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3}.get(dtype, 3e-2)
    matrices = [
        pack_matrix(MATRIX_FORMATS["fp32"], torch.randn(size * head, columns) / 8) for size in (heads, groups, groups)
    ]
    kernel = StepAttention(
        (matrices[0], matrices[1], matrices[2]),
        (None, None),
        head=head,
        scaling=0.2,
        dtype=dtype,
        threads=2,
        level=level,
    )
    x = torch.randn(tokens, columns).to(dtype)
    angles = torch.rand(tokens, head // 2) * 6
    cosine, sine = (part(angles).repeat(1, 2).to(dtype) for part in (torch.cos, torch.sin))
    q, k, v = (torch.full((tokens, size * head), torch.nan, dtype=dtype) for size in (heads, groups, groups))
    kernel.project(x, cosine, sine, q, k, v)
    for t in range(tokens):
        exact = [linear(x[t].double(), m.unpack(torch.float64)).view(-1, head) for m in matrices]
        exact[:2] = (_rotate(part, cosine[t], sine[t]) for part in exact[:2])
        for got, part in zip((q, k, v), exact, strict=True):
            assert (got[t].double() - part.flatten()).norm() <= tolerance * part.norm()
    room = torch.randn(2, sequences, groups, length + 5, head).to(dtype)
    firsts = torch.randint(0, length - new, (sequences,))
    firsts[0] = 0
    for sequence, first in enumerate(firsts):
        room[:, sequence, :, :first] = torch.nan
    keys, values = room[0, :, :, :length], room[1, :, :, :length]
    ends = torch.arange(length - new + 1, length + 1).repeat(sequences)
    seen = torch.stack((firsts.repeat_interleave(new), ends), 1)
    got = kernel.attend(q, keys, values, seen)
    for t, (first, end) in enumerate(seen.tolist()):
        ours, theirs = (part[t // new, :, first:end].double() for part in (keys, values))
        query = q[t].double().view(groups, -1, head)
        exact = ((query @ ours.transpose(1, 2) * 0.2).softmax(-1) @ theirs).flatten()
        assert (got[t].double() - exact).norm() <= tolerance * exact.norm()
        # The same bits as alone, whatever the neighbours are.
        alone = kernel.attend(
            q[t : t + 1], keys[t // new : t // new + 1], values[t // new : t // new + 1], seen[t : t + 1].clone()
        )
        assert torch.equal(alone[0], got[t])
