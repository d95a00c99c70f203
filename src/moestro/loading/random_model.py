"""Build models of real shapes with random weights straight into the store, to measure speed; their text is noise.

There is no state dict and no checkpoint: the dense part is initialized where it will run, and a few random experts
are packed and then copied with changes into all layers. Their bits are the nearest whole numbers: noise needs no fit.

Routing is skewed as measured on Mixtral (Fiddler's published popularity profiles: the most popular expert has 1.35 x
the mean, the least popular 0.25 x). A purely random router would not do, since its choice would follow the direction
that random hidden states happen to share. So each token's embedding is the sum of one shared direction and a part of
its own, and each router row has a component along the shared direction, solved so that the top-k of bias + noise has
the wanted frequencies.

    >>> build_random_model("tiny", MoestroConfig(), dtype=torch.bfloat16, seed=0).moestro.spec.layers[0].experts
    8
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ..compute.experts import ExpertMath
from ..decode.dense import StoredWeight
from ..devices import make_device
from ..engine.conductor import Conductor
from ..engine.families import expert_modules
from ..engine.gates import find_router
from ..memory.formats import MatrixFormat
from ..memory.random_bytes import random_experts, random_panels
from ..planning.options import METHOD
from ..planning.shapes import shape_named
from ..progress import counted
from .build import StoredFormats, attach, home, pack_rest
from .checkpoint import give_attention
from .config import MoestroConfig
from .random_stored import stored_formats

# Popularity against rank, both as fractions: the densities of the cumulative figures of Fiddler's
# profiles (10 % of the experts take 12.4 % of the tokens, 25 % 28.8 %, 75 % 78.9 %), extremes 1.35, 0.25.
_RANKS = (0.0, 0.05, 0.16, 0.37, 0.62, 0.75, 0.85, 0.96, 1.0)
_POPULARITY = (1.35, 1.22, 1.11, 1.043, 0.97, 0.945, 0.90, 0.83, 0.25)
_SHARED = 0.5  # part of a normalized hidden state along the shared direction
_LOGIT_STD = 1.5  # of router logits, over tokens
_FEW = 8  # experts that are drawn
_INITIALIZER_STD = 0.003  # small, so that a token's own embedding outlives the layers: see docs/log.md


def build_random_model(
    name: str,
    config: MoestroConfig,
    *,
    dtype: Any,
    seed: int,
    layers: int | None = None,
    form: str | None = None,
    attention: str | None = None,
) -> PreTrainedModel:
    """A random model of a real shape, its experts in the store.

    Args:
        name: of the shape.
        dtype: a torch dtype, or "auto" for bfloat16.
        seed: of all weights.
        layers: the depth to cut the model to; None for all layers.
        form: that of a checkpoint, as `stored_formats` takes it; None for the config's bits.
        attention: what computes it, by its name in Transformers; None for what Transformers takes.

    Raises:
        RequestError: no such shape or form. BudgetError: it does not fit.
    """
    values = shape_named(name) | ({} if layers is None else {"num_hidden_layers": layers})
    return build_random(values, config, dtype=dtype, seed=seed, form=form, attention=attention)


def build_random(
    values: Mapping[str, Any],
    config: MoestroConfig,
    *,
    dtype: Any,
    seed: int,
    form: str | None = None,
    attention: str | None = None,
) -> PreTrainedModel:
    """As `build_random_model`, of a config.json's values."""
    shape = _config_of(values)
    shape.initializer_range = _INITIALIZER_STD
    shape.eos_token_id = shape.bos_token_id = shape.pad_token_id = None
    give_attention(shape, AutoModelForCausalLM._model_mapping[type(shape)], attention)
    device = make_device(config.device, config.link_gbps)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16 if dtype == "auto" else dtype)
        model.set_experts_implementation(METHOD)
    stored = None if form is None else stored_formats(model, form)
    conductor = attach(model, config, device, stored)
    modules = expert_modules(model)
    for module in modules.values():
        for part in module._moestro.layout.parameters:
            del module._parameters[part]
    model.to_empty(device=device.torch_device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.get_input_embeddings()._is_hf_initialized = True  # `_route` draws it
        model.initialize_weights()
        model.tie_weights()
        _fill_experts(conductor)
        _route(model, skewed=True)
        pack_rest(model, config, device, fast=True, stored=stored, weights=_random_weights(model, stored))
    return model.requires_grad_(False).eval()


def shape_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer for a shape: the first 256 tokens are bytes, the others are written as <id>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = shape_config(name).vocab_size
    vocab = {char: i for i, char in enumerate(alphabet)} | {f"<{i}>": i for i in range(len(alphabet), size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def shape_config(name: str, layers: int | None = None) -> Any:
    """Transformers' config of a shape, cut to so many layers; None for all.

    Raises:
        RequestError: no such shape.
    """
    values = shape_named(name) | ({} if layers is None else {"num_hidden_layers": layers})
    return _config_of(values)


def _config_of(values: Mapping[str, Any]) -> Any:
    return AutoConfig.for_model(**values, tie_word_embeddings=False)


def _random_weights(model: Any, stored: StoredFormats | None) -> dict[str, StoredWeight]:
    """Random bytes for the weights outside the experts that are in a checkpoint's form."""

    def write(packed: Tensor, fmt: MatrixFormat, rows: int, columns: int) -> None:
        packed.copy_(random_panels(fmt, rows, columns, _INITIALIZER_STD * 3**0.5))

    kept = {} if stored is None else stored.dense
    return {
        name: StoredWeight(partial(write, fmt=fmt, rows=size[0], columns=size[1]))
        for name, fmt in kept.items()
        if (size := model.get_parameter(name).shape)
    }


def _fill_experts(conductor: Conductor) -> None:
    """Pack a few random experts; expert e of layer l is the one at e + l in turn, its blocks rotated by e / few + l.

    Rotating blocks reorders neurons, which changes the bytes but no result. The bytes repeat after as many layers as an
    expert has blocks. There are such experts for each format.
    """
    bases: dict[str, list[Tensor]] = {}
    for layer in counted(range(len(conductor.spec.layers)), "making experts", "layers"):
        math, count = conductor.math[layer], conductor.spec.layers[layer].experts
        fmt, shape = math.format, math.shape
        if fmt.name not in bases:
            bases[fmt.name] = _random_experts(math, min(count, _FEW))
        base = bases[fmt.name]
        head = fmt.head_bytes(shape)
        end = fmt.byte_range(shape, range(shape.neurons // fmt.block * fmt.block)).stop
        for expert in range(count):
            source, target = base[(expert + layer) % len(base)], home(conductor, layer, expert)
            turn = head + (expert // len(base) + layer) % fmt.blocks(shape) * fmt.block_bytes(shape)
            if shape.neurons % fmt.block or turn == head:
                target.copy_(source)
                continue
            target[:head].copy_(source[:head])
            target[head : head + end - turn].copy_(source[turn:end])
            target[head + end - turn : end].copy_(source[head:turn])
            target[end:].copy_(source[end:])


def _random_experts(math: ExpertMath, count: int) -> list[Tensor]:
    """The packed bytes of experts with uniform weights of the initializer's spread."""
    bound = _INITIALIZER_STD * 3**0.5
    if all(matrix.is_packable for matrix in math.format.matrices.values()):
        return [_packed_expert(math, bound) for _ in range(count)]
    make = random_experts(math.format, math.shape, bound)
    return [make() for _ in range(count)]


def _packed_expert(math: ExpertMath, bound: float) -> Tensor:
    packed = torch.empty(math.format.expert_bytes(math.shape), dtype=torch.uint8)
    parts = {name: torch.empty(size).uniform_(-bound, bound) for name, size in math.shape.parts.items()}
    math.format.pack(packed, math.shape, parts, fast=True)
    return packed


def set_routing(model: PreTrainedModel, *, skewed: bool, seed: int = 0) -> None:
    """Draw the embedding and routers of a random model on an accelerator anew; on the CPU they are packed.

    Args:
        skewed: whether experts are as unevenly popular as in a real model; else all are equally popular.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _route(model, skewed=skewed)


@torch.no_grad()
def _route(model: PreTrainedModel, *, skewed: bool) -> None:
    embedding: Tensor = model.get_input_embeddings().weight
    d = model.config.hidden_size
    shared = torch.nn.functional.normalize(torch.randn(d, device=embedding.device), dim=0)
    own = torch.randn_like(embedding, dtype=torch.float32) * (1 - _SHARED**2) ** 0.5
    embedding.copy_(own.add_(shared * (_SHARED * d**0.5)))

    routers = [_router_weight(model, name) for name in expert_modules(model)]
    experts, top_k = routers[0].shape[0], model.config.num_experts_per_tok
    popularity = _popularity(len(routers), experts) if skewed else torch.ones(len(routers), experts)  # [L, E]
    noise = torch.randn(4096, experts)
    for weight, wanted in zip(routers, popularity, strict=True):
        bias = _solve_bias(wanted, noise, top_k).to(weight.device)
        along = shared * (_LOGIT_STD / (_SHARED * d**0.5))
        across = torch.randn(experts, d, device=weight.device)
        across -= (across @ shared)[:, None] * shared
        across *= _LOGIT_STD / (d * (1 - _SHARED**2)) ** 0.5
        weight.copy_(bias[:, None] * along + across)


def _router_weight(model: nn.Module, experts_name: str) -> Tensor:
    router = find_router(model, experts_name)
    assert router is not None, "every shape's family has a router that is found"
    weight: Tensor = router.get_parameter("weight")
    return weight


def _popularity(layers: int, experts: int) -> Tensor:
    """Wanted popularity [L, E], mean 1 in each layer, the ranks of all layers' experts shuffled."""
    ranks = (torch.arange(layers * experts) + 0.5) / (layers * experts)
    knots, values = torch.tensor(_RANKS), torch.tensor(_POPULARITY)
    right = torch.searchsorted(knots, ranks).clamp(1, len(_RANKS) - 1)
    part = (ranks - knots[right - 1]) / (knots[right] - knots[right - 1])
    popularity = torch.lerp(values[right - 1], values[right], part)
    popularity = popularity[torch.randperm(layers * experts)].view(layers, experts)
    return popularity / popularity.mean(1, keepdim=True)


def _solve_bias(wanted: Tensor, noise: Tensor, top_k: int) -> Tensor:
    """Biases [E] such that expert e is in the top k of bias + noise `wanted[e]` times as often as the mean."""
    experts = len(wanted)
    bias = torch.zeros(experts)
    for _ in range(12):
        chosen = torch.topk(noise + bias, top_k, dim=1).indices
        counts = torch.bincount(chosen.flatten(), minlength=experts).float()
        bias += 0.6 * torch.log(wanted / (counts / counts.mean()).clamp(min=0.02))
    return bias - bias.mean()
