"""Transformers' plain cache, made longer in place.

Legend: B sequences, N new tokens of each, G key heads, d their width, S tokens in the cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_ROOM = 128  # tokens, at least, for which a cache grows at once


class CacheKind(NamedTuple):
    """What the kernels take a layer's keys and values for: [B, heads, S, width] of a dtype, on the CPU."""

    dtype: torch.dtype
    heads: int
    width: int


class _Storage:
    """Room for a layer's keys and values.

    written: tokens that have ever been there. Only behind them may more be written: a caller may hold views of all of
    them, also where the cache was cropped since, or a copy of it went on. Copies of a cache share this object.
    """

    __slots__ = ("key_room", "value_room", "written")

    def __init__(self, keys: Tensor, values: Tensor, tokens: int) -> None:
        self.key_room, self.value_room = _with_room(keys, tokens), _with_room(values, tokens)
        self.written = keys.shape[2]

    def is_free_behind(self, keys: Tensor, values: Tensor, tokens: int) -> bool:
        """Whether a cache that holds these may write its next tokens into this room."""
        if not keys.shape[2] == values.shape[2] == self.written <= self.key_room.shape[2] - tokens:
            return False
        pairs = ((keys, self.key_room), (values, self.value_room))
        return all(part.data_ptr() == room.data_ptr() and _alike(part, room) for part, room in pairs)

    def take(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Make keys and values so many tokens longer; what is there is for the caller to write."""
        self.written += tokens
        return self.key_room.narrow(2, 0, self.written), self.value_room.narrow(2, 0, self.written)


def is_plain(cache: Any, index: int) -> bool:
    """Whether it is the plain cache, which returns all keys and values of a layer in one piece.

    One whose `update` was replaced, to see or to change what it is given, is not.
    """
    if type(cache) is not DynamicCache or cache.offloading or "update" in vars(cache):
        return False
    if index >= len(cache.layers):
        return True
    return type(cache.layers[index]) is DynamicLayer and "update" not in vars(cache.layers[index])


def append(cache: Any, index: int, k: Tensor, v: Tensor, kind: CacheKind) -> tuple[Tensor, Tensor]:
    """Add new tokens' keys and values [B, G, N, d] to a plain cache and return all of them, [B, G, S, d]."""
    sequences, new = k.shape[0], k.shape[2]
    if not can_grow(cache, index, kind, sequences):
        keys, values = cache.update(k, v, index)
        return keys.contiguous(), values.contiguous()
    keys, values = grow(cache, index, new)
    keys[:, :, -new:], values[:, :, -new:] = k, v
    return keys, values


def length_of(cache: Any, index: int) -> int:
    """Tokens that a plain cache holds of a layer."""
    if index >= len(cache.layers) or not cache.layers[index].is_initialized or cache.layers[index].keys.numel() == 0:
        return 0
    return int(cache.layers[index].keys.shape[2])


def can_grow(cache: Any, index: int, kind: CacheKind, sequences: int) -> bool:
    """Whether a layer's cache is the plain one and holds tokens as the kernels expect them."""
    if not is_plain(cache, index) or index >= len(cache.layers):
        return False
    layer = cache.layers[index]
    if not layer.is_initialized or layer.keys.numel() == 0 or layer.keys.shape != layer.values.shape:
        return False
    batch, heads, _, width = layer.keys.shape
    one_kind = layer.keys.dtype == layer.values.dtype == kind.dtype
    on_cpu = layer.keys.device.type == layer.values.device.type == "cpu"
    return one_kind and on_cpu and (batch, heads, width) == (sequences, kind.heads, kind.width)


def grow(cache: Any, index: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Make a cache that can grow so many tokens longer, which the caller writes, and return all of it, [B, G, S, d].

    In place, in storage with room for more: Transformers' own update copies the whole cache for each token. What the
    cache holds stays a tensor like any other, and what it ever held keeps its contents: after a crop, or where keys and
    values were replaced or copied, new storage is made.
    """
    layer = cache.layers[index]
    storage: _Storage | None = getattr(layer, "_moestro_storage", None)
    if storage is None or not storage.is_free_behind(layer.keys, layer.values, tokens):
        storage = layer._moestro_storage = _Storage(layer.keys, layer.values, tokens)
    layer.keys, layer.values = storage.take(tokens)
    return layer.keys, layer.values


def shrink(cache: Any, index: int, tokens: int) -> None:
    """Take back the tokens that `grow` made room for and that were never written."""
    layer = cache.layers[index]
    layer.keys, layer.values = layer.keys[:, :, :-tokens], layer.values[:, :, :-tokens]


def _alike(part: Tensor, room: Tensor) -> bool:
    return part.shape[:2] == room.shape[:2] and part.shape[3] == room.shape[3] and part.stride() == room.stride()


def _with_room(part: Tensor, tokens: int) -> Tensor:
    """A larger tensor that begins with part's contents and has room for so many more tokens at least."""
    length = part.shape[-2]
    storage = part.new_empty((*part.shape[:2], length + max(_ROOM, length // 2, tokens), part.shape[3]))
    storage[:, :, :length] = part
    return storage
