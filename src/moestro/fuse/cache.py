"""Transformers' plain cache, made longer in place.

Legend: G key heads, d their width, S tokens in the cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_ROOM = 128  # tokens, at least, for which a cache grows at once


class CacheKind(NamedTuple):
    """What the kernels take a layer's keys and values for: [1, heads, S, width] of a dtype, on the CPU."""

    dtype: torch.dtype
    heads: int
    width: int


class _Storage(NamedTuple):
    """Room for a layer's keys and values, and the views of it that the cache was given last.

    owner: the id of the cache's layer, since a shallow copy has the attribute too.
    """

    owner: int
    key_room: Tensor
    value_room: Tensor
    keys: Tensor
    values: Tensor


def is_plain(cache: Any, index: int) -> bool:
    """Whether it is the plain cache, which returns all keys and values of a layer in one piece."""
    if type(cache) is not DynamicCache or cache.offloading:
        return False
    return index >= len(cache.layers) or type(cache.layers[index]) is DynamicLayer


def append(cache: Any, index: int, k: Tensor, v: Tensor, kind: CacheKind) -> tuple[Tensor, Tensor]:
    """Add one token's key and value [1, G, 1, d] to a plain cache and return all of them, [1, G, S, d]."""
    if not can_grow(cache, index, kind):
        keys, values = cache.update(k, v, index)
        return keys.contiguous(), values.contiguous()
    keys, values = grow(cache, index)
    keys[:, :, -1:], values[:, :, -1:] = k, v
    return keys, values


def can_grow(cache: Any, index: int, kind: CacheKind) -> bool:
    """Whether a layer's cache is the plain one and holds tokens as the kernels expect them."""
    if not is_plain(cache, index) or index >= len(cache.layers):
        return False
    layer = cache.layers[index]
    storage: _Storage | None = getattr(layer, "_moestro_storage", None)
    if storage is not None and layer.keys is storage.keys and layer.values is storage.values:
        return True  # seen before
    if not layer.is_initialized or layer.keys.numel() == 0 or layer.keys.shape != layer.values.shape:
        return False
    batch, heads, _, width = layer.keys.shape
    one_kind = layer.keys.dtype == layer.values.dtype == kind.dtype
    on_cpu = layer.keys.device.type == layer.values.device.type == "cpu"
    return one_kind and on_cpu and (batch, heads, width) == (1, kind.heads, kind.width)


def grow(cache: Any, index: int) -> tuple[Tensor, Tensor]:
    """Make a cache that can grow one token longer, which the caller writes, and return all of it, [1, G, S, d].

    In place, in storage with room for more: Transformers' own update copies the whole cache for each token. What the
    cache holds stays a tensor like any other; where somebody replaced or copied it, new storage is made. After a
    crop, new tokens overwrite those that were cropped, also in views of them that somebody kept: clone such views.
    """
    layer = cache.layers[index]
    keys, values = layer.keys, layer.values
    length = keys.shape[2]
    storage: _Storage | None = getattr(layer, "_moestro_storage", None)
    if storage is not None and _has_room(storage, layer, keys, values):
        key_room, value_room = storage.key_room, storage.value_room
    else:
        key_room, value_room = _with_room(keys), _with_room(values)
    keys, values = key_room.narrow(2, 0, length + 1), value_room.narrow(2, 0, length + 1)
    layer.keys, layer.values = keys, values
    layer._moestro_storage = _Storage(id(layer), key_room, value_room, keys, values)
    return keys, values


def shrink(cache: Any, index: int) -> None:
    """Take back the token that `grow` made room for and nobody wrote."""
    layer = cache.layers[index]
    layer.keys, layer.values = layer.keys[:, :, :-1], layer.values[:, :, :-1]


def _has_room(storage: _Storage, layer: Any, keys: Tensor, values: Tensor) -> bool:
    """Whether the layer holds the beginning of our storage, and there is room behind it."""
    if storage.owner != id(layer) or storage.key_room.shape[2] <= keys.shape[2]:
        return False
    if keys is storage.keys and values is storage.values:
        return True
    same = keys.data_ptr() == storage.key_room.data_ptr() and values.data_ptr() == storage.value_room.data_ptr()
    return same and keys.shape[:2] == storage.keys.shape[:2] and keys.stride() == storage.keys.stride()


def _with_room(part: Tensor) -> Tensor:
    length = part.shape[-2]
    storage = part.new_empty((*part.shape[:2], length + max(_ROOM, length // 2), part.shape[3]))
    storage[:, :, :length] = part
    return storage
