"""Small operations as one call each: norms, one-token attention and its cache, against what they replace."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import DynamicCache

from families import EXPERTS, save_model
from moestro import load
from moestro.compute.cpu import levels, rms_norm
from moestro.decode.cpu import fuse
from moestro.decode.cpu.attention import fuse_attention
from moestro.decode.cpu.cache import CacheKind, append
from moestro.decode.cpu.decoder_layer import fuse_decoder_layer
from moestro.decode.cpu.norm import norm_of
from moestro.decode.cpu.rotary import fuse_rotary
from moestro.decode.cpu.router import fuse_router
from moestro.errors import ModelError

# Four query heads on two key heads of 16.
HEADS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
ON_CPU: dict[str, Any] = {"device": "cpu", "threads": 1, "dtype": "float32"}
LEVELS = [name for name, usable in levels().items() if usable]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
needs_kernels = pytest.mark.skipif(not levels(), reason="built without the kernels: no compiler was there")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm_kernel_at_every_level(level: str, dtype: torch.dtype, offset: float) -> None:
    for width in (1, 15, 16, 70, 2049):
        x, weight = (torch.randn(3, width) * 5).to(dtype), torch.randn(width)
        y = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        expected = y * (1 + weight) if offset else y.to(dtype).double() * weight
        got = rms_norm(x, weight, offset, 1e-5, threads=2, level=level)
        assert got.dtype == dtype
        # Rounded twice where the family does so, each to half a place.
        step = max(torch.finfo(dtype).eps, 1e-6)
        assert ((got.double() - expected).abs() <= 1.5 * step * expected.abs() + 1e-7).all(), (width, level)


class _Norm(nn.Module):
    """A norm as families write it, with one thing that may differ."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.kind = nn.Parameter(torch.randn(70)), 1e-5, kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        if self.kind == "centred":
            y = y - y.mean(-1, keepdim=True)
        epsilon = 0.1 if self.kind == "other epsilon" else self.variance_epsilon
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + epsilon)
        if self.kind == "one plus":
            return (y * (1 + self.weight.float())).to(x.dtype)
        return y.to(x.dtype) * (self.weight.abs() if self.kind == "absolute" else self.weight)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "one plus", "centred", "other epsilon", "absolute"])
@torch.no_grad()
def test_norms_are_known_by_what_they_compute(kind: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(_Norm(kind)).to(dtype)
    before, weight = model[0], model[0].weight.clone()
    fuse(model, threads=2)
    assert torch.equal(before.weight, weight)  # trying it left no trace
    assert (norm_of(model[0]) is not None) == (kind in ("plain", "one plus"))
    for shape in [(1, 1, 70), (2, 600, 70)]:
        x = torch.randn(shape).to(dtype)
        torch.testing.assert_close(model(x), before(x), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("bits", [16, 4])
def test_tokens_are_equal_with_and_without_fusing(bits: int, tmp_path: Path) -> None:
    save_model("olmoe", tmp_path)
    ids = torch.randint(3, 100, (1, 12))
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    texts = []
    for on in (True, False):
        model = load(str(tmp_path), bits=bits, fuse=on, **ON_CPU)
        assert any(norm_of(m) is not None for m in model.modules()) == on
        texts.append(model.generate(ids, **options))
    assert torch.equal(*texts)


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])  # without norms, over all heads, over each head
@torch.no_grad()
def test_one_token_attention(family: str, dtype: str, tmp_path: Path) -> None:
    """Each step's logits with and without fusing, over a cache that grows, and a mask in between."""
    # Every token to every expert: in 16 bits, a tie between two routes may fall either way.
    save_model(family, tmp_path, HEADS | {"num_experts_per_tok": EXPERTS})
    fused, plain = (load(str(tmp_path), fuse=on, **ON_CPU | {"dtype": dtype}) for on in (True, False))
    assert all(type(layer.self_attn.forward).__name__ == "FusedAttention" for layer in fused.model.layers)
    assert all(type(layer.forward).__name__ == "FusedLayer" for layer in fused.model.layers)
    assert any(stretch_of(layer) is not None for layer in fused.model.layers)
    caches = [DynamicCache(), DynamicCache()]
    tolerance = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 6e-2}[dtype]
    for step, count in enumerate([7, 1, 1, 3, 1, 1]):
        ids = torch.randint(3, 100, (1, count))
        a, b = (m(ids, past_key_values=c).logits.float() for m, c in zip((fused, plain), caches, strict=True))
        assert (a - b).norm() <= tolerance * b.norm(), f"step {step}"
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 14


@needs_kernels
@torch.no_grad()
def test_attention_that_differs_is_left_alone(tmp_path: Path) -> None:
    save_model("mixtral", tmp_path, HEADS)
    model = load(str(tmp_path), fuse=False, **ON_CPU)
    attention = model.model.layers[0].self_attn
    original, scaling = attention.forward, attention.scaling
    for wrong in ("scaling", "values"):
        if wrong == "scaling":
            attention.forward = lambda **given: _with(attention, "scaling", scaling * 1.1, original, given)
        else:
            attention.forward = lambda **given: (2 * original(**given)[0], None)
        assert not fuse_attention(attention, 1), wrong
    attention.forward = original
    assert fuse_attention(attention, 1)


@needs_kernels
@torch.no_grad()
def test_decoder_layers_are_known_by_what_they_compute(tmp_path: Path) -> None:
    save_model("mixtral", tmp_path, HEADS)
    model = load(str(tmp_path), fuse=False, **ON_CPU)
    layer = model.model.layers[0]
    fuse_attention(layer.self_attn, 1)
    assert not fuse_decoder_layer(layer)  # its norms are not fused
    fuse(model, 1)
    assert all(type(layer.forward).__name__ == "FusedLayer" for layer in model.model.layers)
    assert all(type(layer.mlp.gate.forward).__name__ == "FusedRouter" for layer in model.model.layers)
    del layer.forward
    original = layer.forward
    layer.forward = lambda x, **given: original(x, **given) + 0.1 * x  # another residual sum
    assert not fuse_decoder_layer(layer)
    del layer.forward
    assert fuse_decoder_layer(layer)


@needs_kernels
@torch.no_grad()
def test_a_router_that_chooses_otherwise_is_left_alone(tmp_path: Path) -> None:
    save_model("mixtral", tmp_path)
    gate = load(str(tmp_path), fuse=False, **ON_CPU).model.layers[0].mlp.gate
    original, random = gate.forward, torch.Generator().manual_seed(1)

    def in_groups(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best of each half of the experts."""
        logits = linear(x, gate.weight)
        halves = logits.softmax(-1).unflatten(1, (2, -1)).max(-1)
        index = halves.indices + torch.tensor([0, logits.shape[1] // 2])
        return logits, halves.values / halves.values.sum(-1, keepdim=True), index

    def scaled(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, scores, index = original(x)
        return logits, 2 * scores, index

    with torch.no_grad():
        gate.weight.normal_(generator=random)
    for other in (in_groups, scaled, lambda x: original(x)[1:]):
        gate.forward = other
        assert not fuse_router(gate, 1)
        assert gate.forward is other
    gate.forward = original
    assert fuse_router(gate, 1)


@needs_kernels
@torch.no_grad()
def test_who_listens_to_a_part_is_told(tmp_path: Path) -> None:
    """A hook on a module that fused layers pass by, and hidden states and router logits that were asked for."""
    save_model("olmoe", tmp_path, HEADS)
    model, plain = (load(str(tmp_path), fuse=on, **ON_CPU) for on in (True, False))
    ids, heard = torch.randint(3, 100, (1, 5)), []
    caches = [DynamicCache(), DynamicCache()]
    for each, cache in zip((model, plain), caches, strict=True):
        each(ids, past_key_values=cache)
    first, last = model.model.layers[0], model.model.layers[-1]
    attention = first.self_attn
    parts = [attention, attention.q_proj, first.input_layernorm, last, last.mlp, last.mlp.gate, last.mlp.experts]
    for part in parts:
        hook = part.register_forward_hook(lambda *_: heard.append(1))
        model(ids[:, :1], past_key_values=caches[0])
        hook.remove()
        assert heard.pop()
        assert not heard
    caches[0].crop(-len(parts))
    kernel, calls = stretch_of(first)._kernel, []
    run = kernel.run
    kernel.run = lambda *given: calls.append(1) or run(*given)
    asked = {"output_router_logits": True, "output_hidden_states": True}
    for _ in range(2):
        steps = [m(ids[:, :1], past_key_values=c, **asked) for m, c in zip((model, plain), caches, strict=True)]
        for kind in ("router_logits", "hidden_states"):
            ours, theirs = (step[kind] for step in steps)
            assert len(ours) == len(theirs)
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        for each, cache in zip((model, plain), caches, strict=True):
            each(ids[:, :1], past_key_values=cache)  # and nobody asks
        assert len(calls) == 1
        calls.clear()


@needs_kernels
@torch.no_grad()
def test_layers_that_follow_one_another_go_together(tmp_path: Path) -> None:
    """Which layers do, that their steps are counted, and that fewer layers are fewer."""
    save_model("olmoe", tmp_path, HEADS | {"num_hidden_layers": 4})
    model, plain = (load(str(tmp_path), fuse=on, **ON_CPU) for on in (True, False))
    ids, calls = torch.randint(3, 100, (1, 5)), []
    stretch = stretch_of(model.model.layers[0])
    run = stretch._kernel.run
    stretch._kernel.run = lambda *given: calls.append(1) or run(*given)
    for depth in (4, 2):
        results = []
        for each in (model, plain):
            each.config.num_hidden_layers = depth  # as generation does that leaves a model early
            cache = DynamicCache()
            each(ids, past_key_values=cache)
            before = dataclasses.replace(each.moestro.counters)
            results.append(each(ids[:, :1], past_key_values=cache).logits)
            after = each.moestro.counters
            assert after.layer_steps - before.layer_steps == depth
            assert after.misses - before.misses == depth * model.config.num_experts_per_tok
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
        assert len(calls) == 1
    model.config.num_hidden_layers = 4
    stretch._loop._of_thread.runs = True
    with pytest.raises(ModelError, match="layers were given different masks"):
        stretch.run(1, _marked(stretch), {"attention_mask": ids})


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("change", ["pruned", "swapped", "replaced block", "patched block", "patched loop", "own loop"])
def test_who_changes_the_layers_gets_what_he_made(change: str, tmp_path: Path) -> None:
    save_model("olmoe", tmp_path, HEADS | {"num_hidden_layers": 4})
    ids, results = torch.randint(3, 100, (1, 5)), []
    for on in (True, False):
        model = load(str(tmp_path), fuse=on, **ON_CPU)
        decoder, cache = model.model, DynamicCache()
        model(ids, past_key_values=cache)
        layers = decoder.layers
        given: dict[str, Any] = {"attention_mask": None, "past_key_values": cache}
        if change == "pruned":
            decoder.layers = layers[:2]
        elif change == "swapped":
            layers[1], layers[2] = layers[2], layers[1]
        elif change == "replaced block":
            layers[1].mlp = nn.Identity()
        elif change == "patched block":
            layers[1].mlp.forward = lambda x: 2 * x
        if change not in ("patched loop", "own loop"):
            results.append([model(ids[:, :1], past_key_values=cache).logits])
            continue
        x = decoder.embed_tokens(ids[:, :1])
        given["position_embeddings"] = decoder.rotary_emb(x, position_ids=torch.tensor([[5]]))
        states = []
        for layer in layers[:2] if change == "patched loop" else layers:
            x = layer(x, **given)
            states.append(x.clone())
            x = x + 0.01
        results.append(states)
        lengths = [cache.get_seq_length(index) for index in range(4)]
        assert lengths == ([6, 6, 5, 5] if change == "patched loop" else [6] * 4)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@needs_kernels
@torch.no_grad()
def test_a_cache_of_another_kind_is_left_to_transformers(tmp_path: Path) -> None:
    class Counting(DynamicCache):
        updates = 0

        def update(self, *given: Any, **options: Any) -> Any:
            self.updates += 1
            return super().update(*given, **options)

    save_model("olmoe", tmp_path, HEADS | {"num_hidden_layers": 2})
    model, plain = (load(str(tmp_path), fuse=on, **ON_CPU) for on in (True, False))
    ids, caches = torch.randint(3, 100, (1, 5)), [DynamicCache(), DynamicCache()]
    for each, cache in zip((model, plain), caches, strict=True):
        each(ids, past_key_values=cache)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.half(), layer.values.half()  # as a prompt may be kept
    a, b = (m(ids[:, :1], past_key_values=c).logits for m, c in zip((model, plain), caches, strict=True))
    assert (a - b).norm() <= 1e-3 * b.norm()  # a key may fall to either side of where two numbers of 16 bits meet
    counting = Counting()
    for part in ids.split([4, 1], 1):
        model(part, past_key_values=counting)
    assert counting.updates == 4


@needs_kernels
@torch.no_grad()
def test_an_interrupted_step_leaves_the_cache_as_it_was(tmp_path: Path) -> None:
    save_model("olmoe", tmp_path, HEADS)
    model, ids, cache = load(str(tmp_path), **ON_CPU), torch.randint(3, 100, (1, 5)), DynamicCache()
    model(ids, past_key_values=cache)
    wanted = model(ids[:, :1], past_key_values=cache).logits
    cache.crop(-1)
    kernel = stretch_of(model.model.layers[0])._kernel
    run = kernel.run

    def interrupt(*given: Any) -> Any:
        raise KeyboardInterrupt

    kernel.run = interrupt
    with pytest.raises(KeyboardInterrupt):
        model(ids[:, :1], past_key_values=cache)
    assert cache.get_seq_length() == 5
    kernel.run = run
    assert torch.equal(model(ids[:, :1], past_key_values=cache).logits, wanted)


def stretch_of(layer: Any) -> Any:
    """The stretch that a fused decoder layer is part of, or None."""
    together = layer.forward._together
    return None if together is None else together.func.__self__


def _marked(stretch: Any) -> Tensor:
    x = torch.zeros(1, 1, HEADS["hidden_size"])
    x._moestro_done = stretch, None  # type: ignore[attr-defined]
    return x


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("change", ["block", "loop", "nothing"])
def test_layers_between_which_something_happens_stay_apart(change: str, tmp_path: Path) -> None:
    save_model("olmoe", tmp_path, HEADS | {"num_hidden_layers": 3})
    model = load(str(tmp_path), fuse=False, **ON_CPU)
    decoder, layers = model.model, model.model.layers

    def loop(input_ids: Tensor, past_key_values: Any, use_cache: bool) -> Tensor:
        x, last = decoder.embed_tokens(input_ids), past_key_values.get_seq_length()
        given = {"position_embeddings": decoder.rotary_emb(x, position_ids=torch.tensor([[last]]))}
        for index, layer in enumerate(layers):
            x = layer(x + 1 if index == 1 else x, attention_mask=None, past_key_values=past_key_values, **given)
        return x

    if change == "block":  # which returns more than its experts do
        block = layers[1].mlp
        original = block.forward
        block.forward = lambda x: original(x) + x
    elif change == "loop":
        decoder.forward = loop
    fuse(model, 1)
    stretches = [stretch_of(layer) for layer in layers]
    if change == "nothing":
        assert stretches[0] is stretches[1] is stretches[2] is not None
    elif change == "block":
        assert stretches[1] is None
        assert stretches[0] is not stretches[2]
    else:
        assert stretches[0] is not stretches[1]
        assert stretches[1] is stretches[2] is not None


@needs_kernels
@torch.no_grad()
def test_a_rotary_embedding_is_looked_up(tmp_path: Path) -> None:
    save_model("olmoe", tmp_path, HEADS)
    ours, plain = (load(str(tmp_path), fuse=on, **ON_CPU).model.rotary_emb for on in (True, False))
    assert type(ours.forward).__name__ == "_RotaryTable"
    for dtype in DTYPES:
        x = torch.zeros(1, 1, 64, dtype=dtype)
        for position in (0, 1, 127, 128, 129, 3, 100_000):
            ids = torch.tensor([[position]])
            for a, b in zip(ours(x, ids), plain(x, ids), strict=True):
                assert a.shape == b.shape
                assert torch.equal(a, b)
    ids = torch.tensor([[5, 6]])
    assert all(torch.equal(a, b) for a, b in zip(ours(x, ids), plain(x, ids), strict=True))
    for module in (ours, plain):
        module.inv_freq = module.inv_freq * 2
    assert torch.equal(ours(x, ids[:, :1])[0], plain(x, ids[:, :1])[0])
    plain.rope_type = "dynamic"
    assert not fuse_rotary(plain)


def _with(module: Any, name: str, value: Any, function: Any, given: dict[str, Any]) -> Any:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        return function(**given)
    finally:
        setattr(module, name, before)


def test_a_cache_that_grows_in_place_stays_a_cache() -> None:
    """Appending, cropping, copying and replacing, against Transformers' own update."""
    ours, theirs = DynamicCache(), DynamicCache()
    for cache in (ours, theirs):
        torch.manual_seed(1)
        cache.update(torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16), 0)
    copies: list[Any] = []
    kind = CacheKind(torch.float32, 2, 16)
    for step in range(300):
        k, v = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16)
        got, wanted = append(ours, 0, k, v, kind), theirs.update(k, v, 0)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        if step % 50 == 10:
            copies.append((copy.deepcopy(ours), copy.copy(ours.layers[0]), theirs.layers[0].keys.clone()))
        if step % 70 == 20:
            for cache in (ours, theirs):
                cache.crop(-3)
        if step % 90 == 30:
            for cache in (ours, theirs):
                cache.reorder_cache(torch.tensor([0]))
    for deep, shallow, keys in copies:
        assert torch.equal(deep.layers[0].keys, keys)
        held = DynamicCache()
        held.layers = [shallow]
        length = shallow.keys.shape[-2]
        append(held, 0, torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), kind)  # a copy's token does not reach ours
        assert shallow.keys.shape[-2] == length + 1
    assert torch.equal(ours.layers[0].keys, theirs.layers[0].keys)


# With torch 2.11, Transformers' own attention computes differently while it is traced: it is given a mask then, and
# the logits of a plain model differ by 1e-6. 8-bit layers round what they are given to 1/127 of its largest, which
# makes 1e-4 of that. Its "eager" attention has a mask always, so there all is equal.
COMPILED = [
    (True, "eager", 8, "eager", 0.0),
    pytest.param(True, "aot_eager", None, "sdpa", 1e-5, marks=pytest.mark.long),
    (True, "aot_eager", 8, "sdpa", 2e-3),
    pytest.param(False, "aot_eager", 8, "eager", 0.0, marks=pytest.mark.long),
]


@pytest.mark.sample(1)
@needs_kernels
@pytest.mark.parametrize(("on", "backend", "bits", "attention", "tolerance"), COMPILED)
@torch.no_grad()
def test_a_compiled_model_computes_the_same(
    on: bool, backend: str, bits: int | None, attention: str, tolerance: float, tmp_path: Path
) -> None:
    """torch.compile leaves our calls outside of its graphs, for a prompt and for decoded tokens."""
    save_model("olmoe", tmp_path, HEADS)
    model, ids = load(str(tmp_path), bits=bits, fuse=on, **ON_CPU), torch.randint(3, 100, (1, 8))
    model.set_attn_implementation(attention)
    torch.compiler.reset()
    logits = []
    for run in (model, torch.compile(model, backend=backend)):
        cache = DynamicCache()
        steps = [run(part, past_key_values=cache, use_cache=True).logits for part in ids.split([6, 1, 1], 1)]
        logits.append(torch.cat(steps, 1))
    torch.testing.assert_close(logits[1], logits[0], rtol=tolerance, atol=tolerance)
