"""Transformers' plain cache, made longer in place.

Legend: G key heads, d their width, S tokens in the cache.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

_ROOM = 128  # tokens, at least, for which a cache grows at once


def append(cache: Any, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Add one token's key and value [1, G, 1, d] to a plain cache and return all of them, [1, G, S, d]."""
    if not can_grow(cache, index):
        keys, values = cache.update(k, v, index)
        return keys.contiguous(), values.contiguous()
    keys, values = grow(cache, index)
    keys[:, :, -1:], values[:, :, -1:] = k, v
    return keys, values


def can_grow(cache: Any, index: int) -> bool:
    """Whether a layer's cache is the plain one and holds tokens."""
    if index >= len(cache.layers) or type(cache.layers[index]) is not DynamicLayer:
        return False
    return bool(cache.layers[index].is_initialized and cache.layers[index].keys.numel())


def grow(cache: Any, index: int) -> tuple[Tensor, Tensor]:
    """Make a cache that can grow one token longer, which the caller writes, and return all of it, [1, G, S, d].

    In place, in storage with room for more: Transformers' own update copies the whole cache for each token. What the
    cache holds stays a tensor like any other; where somebody replaced or copied it, new storage is made. After a
    crop, new tokens overwrite those that were cropped, also in views of them that somebody kept: clone such views.
    """
    layer = cache.layers[index]
    keys, values = layer.keys, layer.values
    length = keys.shape[2]
    owner, key_store, value_store = getattr(layer, "_moestro_storage", (0, keys, values))
    ours = (
        owner == id(layer)  # a shallow copy has the attribute too
        and key_store.shape[2] > length
        and key_store.data_ptr() == keys.data_ptr()
        and value_store.data_ptr() == values.data_ptr()
    )
    if not ours:
        key_store, value_store = _with_room(keys), _with_room(values)
        layer._moestro_storage = (id(layer), key_store, value_store)
    keys, values = key_store.narrow(2, 0, length + 1), value_store.narrow(2, 0, length + 1)
    layer.keys, layer.values = keys, values
    return keys, values


def _with_room(part: Tensor) -> Tensor:
    length = part.shape[-2]
    storage = part.new_empty((*part.shape[:2], length + max(_ROOM, length // 2), part.shape[3]))
    storage[:, :, :length] = part
    return storage
