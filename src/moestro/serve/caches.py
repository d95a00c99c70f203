"""Caches of one sequence, and of which kind a model's are: whether they can be cut, copied and joined to a batch.

Found by the cache that the model fills in a step of one token, not by its family's name.

Legend: G key heads, d their width, S tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)

from ..decode.cpu.cache import RoomLayer
from ..engine.chunks import can_be_chunked, follows_length

_KINDS = (DynamicLayer, RoomLayer)


class Forward:
    """Calls a model for the logits of the last token of each row."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._takes = {"use_cache": True} | ({"logits_to_keep": 1} if model._supports_logits_to_keep() else {})

    @torch.no_grad()
    def __call__(self, ids: Tensor, cache: Any, positions: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """Tokens [B, N] at positions [B, N], with a mask [B, S] -> float32 [B, V] on the CPU, and the cache."""
        device = self._model.device
        given = {} if mask is None else {"attention_mask": mask.to(device)}
        output = self._model(
            input_ids=ids.to(device), past_key_values=cache, position_ids=positions.to(device), **given, **self._takes
        )
        return output.logits[:, -1].float().cpu(), output.past_key_values


class Caches:
    """Makes and copies caches of one sequence of a model.

    why_alone: why rows cannot share a cache, so that requests run one at a time; None where they can. is_whole: a
    cache cannot be cut to fewer tokens. is_reused: a cache can be read on behind. token_bytes: of keys and values of a
    token. Made by a step of one token.
    """

    def __init__(self, model: Any, forward: Forward) -> None:
        self._model = model
        self._is_default = model._supports_default_dynamic_cache()
        self.is_reused = can_be_chunked(model)
        _, cache = forward(torch.zeros(1, 1, dtype=torch.int64), self.fresh(), torch.zeros(1, 1, dtype=torch.int64))
        layers = getattr(cache, "layers", None)
        self.why_alone = self._find_why(cache)
        self.is_whole = self.why_alone is not None
        self._parts: list[tuple[Tensor, Tensor] | None] = [
            (layer.keys, layer.values)
            if type(layer) in _KINDS and layer.is_initialized and layer.keys.numel()
            else None
            for layer in layers or ()
        ]
        self.token_bytes = sum(part.nbytes for pair in self._parts if pair for part in pair)

    def fresh(self) -> Any:
        """An empty cache as the model's config wants it; None where the model makes it."""
        return DynamicCache(config=self._model.config.get_text_config(decoder=True)) if self._is_default else None

    def _find_why(self, cache: Any) -> str | None:
        if follows_length(self._model.config):
            return "its rotary embedding changes with the length of the text"
        if not self._is_default or type(cache) is not DynamicCache:
            return f"its cache is a {type(cache).__name__}"
        others = {type(layer).__name__ for layer in cache.layers if type(layer) not in (*_KINDS, DummyLayer)}
        return f"its cache has layers of the kind {', '.join(sorted(others))}" if others else None

    def rooms(self, rows: int, tokens: int) -> list[tuple[Tensor, Tensor] | None]:
        """Room for keys and values of so many tokens of so many rows, [rows, G, tokens, d], for each layer; zeros."""
        return [
            None if pair is None else (_room(pair[0], rows, tokens), _room(pair[1], rows, tokens))
            for pair in self._parts
        ]

    def new(self, tokens: int) -> Any:
        """An empty cache for so many tokens; None where the model makes it."""
        cache = self.fresh()
        if self.why_alone is None:
            self.place(cache, self.rooms(1, tokens), 0)
        return cache

    @staticmethod
    def place(cache: DynamicCache, rooms: list[tuple[Tensor, Tensor] | None], tokens: int) -> None:
        """Let the layers of a cache be the first tokens of such room."""
        for index, pair in enumerate(rooms):
            if pair is not None:
                cache.layers[index] = RoomLayer.in_room(*pair, tokens)

    def copied(self, cache: Any, tokens: int, room: int) -> Any:
        """A cache with the first tokens of another one, which shares no memory with it, and room for more."""
        if self.is_whole:
            return copy.deepcopy(cache)
        made, rooms = self.fresh(), self.rooms(1, max(room, tokens))
        for pair, layer in zip(rooms, cache.layers, strict=True):
            if pair is not None:
                pair[0][:, :, :tokens], pair[1][:, :, :tokens] = layer.keys[:, :, :tokens], layer.values[:, :, :tokens]
        self.place(made, rooms, tokens)
        return made


def bytes_of(cache: Any) -> int:
    """Memory that a cache holds, room included."""
    found, seen, left = dict[int, int](), set[int](), [cache]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping):
            left.extend(value.values())
        elif isinstance(value, (list, tuple)):
            left.extend(value)
        elif isinstance(value, (Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin)):
            left.extend(vars(value).values())
    return sum(found.values())


def _room(part: Tensor, rows: int, tokens: int) -> Tensor:
    """Zeros: a masked token's numbers must be finite. On a CPU, memory that is not touched is not taken yet."""
    shape = (rows, part.shape[1], tokens, part.shape[3])
    if part.device.type != "cpu":
        return torch.zeros(shape, dtype=part.dtype, device=part.device)
    n_bytes = int(np.prod(shape)) * part.element_size()
    return torch.from_numpy(np.zeros(n_bytes, np.uint8)).view(part.dtype).view(shape)
