"""One token's attention in two calls instead of some thirty operations: swapped in where it computes the same.

Before the cache: the three projections in one go, norms and the rotary embedding. Behind it: the query against
all keys and values. The cache stays Transformers' own, and so does every step that is not one token of one
sequence without a mask. Which layers are plain enough is found by trying them on numbers.

Legend: D model width, H query heads, G key heads, d their width, S tokens in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .compute.cpu import OneTokenAttention
from .dense import PackedLinear
from .fused_norm import FusedRmsNorm

_ROOM = 128  # tokens, at least, for which a cache grows at once
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")
_LARGEST_SCORE = 25.0  # of the second trial: far enough for a soft cap to show
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def fuse_attention(module: nn.Module, threads: int) -> bool:
    """Give an attention layer a forward for single tokens, if it is one that we know; says whether it is."""
    if not _looks_known(module):
        return False
    fused = _FusedForward(module, threads)
    if not fused.agrees():
        return False
    module.forward = fused
    return True


class _FusedForward:
    """The forward of a recognized attention layer."""

    def __init__(self, module: Any, threads: int) -> None:
        self._original = module.forward
        self._layer, self._output = module.layer_idx, module.o_proj
        norms = [getattr(module, name, None) for name in _NORMS]
        q, k, v = (getattr(module, name) for name in _PROJECTIONS[:3])
        self._dtype, self._head = module.o_proj.weight_dtype, module.head_dim
        self._columns, self._scaling = q.in_features, module.scaling
        self._sizes = (q.out_features, k.out_features, v.out_features)
        self._kernel = OneTokenAttention(
            [(m.packed, m.fmt, m.out_features, m.in_features, m.float_bias) for m in (q, k, v)],
            [None if n is None else (n.float_weight, n.offset, n.epsilon) for n in norms],
            head=module.head_dim,
            scaling=module.scaling,
            dtype=self._dtype,
            threads=threads,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x, cache, rotary = (kwargs.get(name) for name in ("hidden_states", "past_key_values", "position_embeddings"))
        if (
            args
            or x is None
            or x.shape[:2] != (1, 1)
            or x.dtype != self._dtype
            or kwargs.get("attention_mask") is not None
            or rotary is None
            or rotary[0].dtype != self._dtype
            or rotary[0].numel() != self._head
            or not self._grows(cache)
            or (x.requires_grad and torch.is_grad_enabled())
        ):
            return self._original(*args, **kwargs)
        return self._run(x, rotary, cache), None

    def _run(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: Any) -> Tensor:
        q, k, v = self._project(x, rotary)
        keys, values = append(cache, self._layer, k, v)
        out: Tensor = self._output(self._kernel.attend(q, keys, values).view(1, 1, -1))
        return out

    def _project(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """[1, 1, D] -> [H * d], [1, G, 1, d], [1, G, 1, d]."""
        q, k, v = (torch.empty(size, dtype=self._dtype) for size in self._sizes)
        self._kernel.project(x, *rotary, q, k, v)
        return q, k.view(1, -1, 1, self._head), v.view(1, -1, 1, self._head)

    def _grows(self, cache: Any) -> bool:
        """Whether it is the plain cache, which returns all keys and values in one piece."""
        if not isinstance(cache, DynamicCache):
            return False
        return self._layer >= len(cache.layers) or type(cache.layers[self._layer]) is DynamicLayer

    def agrees(self) -> bool:
        """Whether it computes what the layer did, tried with small and with large scores."""
        random = torch.Generator().manual_seed(0)
        scale = 1.0
        for _ in range(2):
            x = torch.randn(1, 1, self._columns, generator=random).mul_(scale).to(self._dtype)
            angles = torch.rand(1, 1, self._head // 2, generator=random).mul_(6).repeat(1, 1, 2)
            rotary = (angles.cos().to(self._dtype), angles.sin().to(self._dtype))
            sizes = [(1, size // self._head, 6, self._head) for size in self._sizes[1:]]
            past = [torch.randn(size, generator=random).mul_(scale) for size in sizes]
            caches = [DynamicCache(), DynamicCache()]
            for cache in caches:
                cache.update(*(part.to(self._dtype) for part in past), self._layer)
            given = {"hidden_states": x, "position_embeddings": rotary, "attention_mask": None}
            try:
                wanted = self._original(**given, past_key_values=caches[0])
            except Exception:  # it wants other arguments
                return False
            if not (isinstance(wanted, tuple) and len(wanted) == 2 and isinstance(wanted[0], Tensor)):
                return False
            got = self._run(x, rotary, caches[1])
            mine, theirs = caches[1].layers[self._layer], caches[0].layers[self._layer]
            pairs = [(got, wanted[0]), (mine.keys, theirs.keys), (mine.values, theirs.values)]
            if not all(a.shape == b.shape and _near(a, b, _TOLERANCE[self._dtype]) for a, b in pairs):
                return False
            scale = (_LARGEST_SCORE / max(self._largest_score(x, rotary, mine.keys), 1e-6)) ** 0.5
        return True

    def _largest_score(self, x: Tensor, rotary: tuple[Tensor, Tensor], keys: Tensor) -> float:
        """Of this token's queries against keys [1, G, S, d]."""
        query = self._project(x, rotary)[0].float().view(keys.shape[1], -1, self._head)  # [G, H / G, d]
        largest = (query @ keys[0].float().transpose(1, 2)).abs().max()
        return float(largest) * float(self._scaling)


def append(cache: Any, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Add one token's key and value [1, G, 1, d] to a plain cache and return all of them, [1, G, S, d].

    In place, in storage with room for more: Transformers' own update copies the whole cache for each token. What the
    cache holds stays a tensor like any other; where somebody replaced or copied it, new storage is made. After a
    crop, new tokens overwrite those that were cropped, also in views of them that somebody kept: clone such views.
    """
    layer = cache.layers[index] if index < len(cache.layers) else None
    if layer is None or not layer.is_initialized or layer.keys.numel() == 0:
        keys, values = cache.update(k, v, index)
        return keys.contiguous(), values.contiguous()
    length = layer.keys.shape[-2]
    owner, key_store, value_store = getattr(layer, "_moestro_storage", (0, layer.keys, layer.values))
    ours = (
        owner == id(layer)  # a shallow copy has the attribute too
        and key_store.shape[-2] > length
        and key_store.data_ptr() == layer.keys.data_ptr()
        and value_store.data_ptr() == layer.values.data_ptr()
    )
    if not ours:
        key_store, value_store = _with_room(layer.keys), _with_room(layer.values)
        layer._moestro_storage = (id(layer), key_store, value_store)
    key_store[:, :, length : length + 1] = k
    value_store[:, :, length : length + 1] = v
    layer.keys, layer.values = key_store[:, :, : length + 1], value_store[:, :, : length + 1]
    return layer.keys, layer.values


def _with_room(part: Tensor) -> Tensor:
    length = part.shape[-2]
    storage = part.new_empty((*part.shape[:2], length + max(_ROOM, length // 2), part.shape[3]))
    storage[:, :, :length] = part
    return storage


def _looks_known(module: Any) -> bool:
    children = dict(module.named_children())
    if not all(isinstance(children.get(name), PackedLinear) for name in _PROJECTIONS):
        return False
    norms = [children.get(name) for name in _NORMS]
    if not all(norm is None or isinstance(norm, FusedRmsNorm) for norm in norms) or (norms[0] is None) != (
        norms[1] is None
    ):
        return False
    if set(children) - {*_PROJECTIONS, *_NORMS, "rotary_emb"} or list(module.parameters(recurse=False)):
        return False
    if not all(hasattr(module, name) for name in ("head_dim", "scaling", "layer_idx")) or module.head_dim % 16:
        return False
    limits = (getattr(module.config, name, None) for name in ("clip_qkv", "attn_logit_softcapping", "logits_soft_cap"))
    return module.o_proj.weight_dtype in _TOLERANCE and not any(limits)


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a.float() - b.float()).norm() <= tolerance * b.float().norm())
