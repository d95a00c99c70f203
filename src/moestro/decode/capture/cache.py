"""The KV cache under a captured step: a static one, whose tensors keep their places.

Decides which caches can be under a capture and what a capture depends on. A full-attention layer keeps its length
in a tensor, which a replay advances. A sliding-window layer also counts in Python and treats a full window otherwise
than one that fills: `advance` counts after a replay, and the two are different captures.

    >>> cache = StepCache(model.config, 500)
    >>> cache.grow(600)
    >>> cache.tokens
    768
"""

from __future__ import annotations

from sys import getrefcount
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from ..rows import Reordering, Shared, carry_out

ROUND = 256  # tokens: requests of about one length share a size, and with it a capture
_SHAPES = ("dtype", "device", "batch_size", "num_heads", "k_head_dim", "v_head_dim")  # what a layer learns first


class StepCache(StaticCache):  # type: ignore[misc]  # transformers is not typed
    """A static cache that can drop its last tokens, as assisted decoding does, and be made longer between turns.

    Args:
        tokens: room for so many, or a few more.
        most: how many there is memory for; None where that is not known.
    """

    def __init__(self, config: Any, tokens: int, most: int | None = None) -> None:
        rounded = -(-tokens // ROUND) * ROUND
        self._config, self.tokens = config, rounded if most is None else max(tokens, min(rounded, most))
        super().__init__(config=config, max_cache_len=self.tokens)
        sized: list[Any] = self.layers
        self.layers: list[Any] = [
            _Window.of(layer) if type(layer) is StaticSlidingWindowLayer else layer for layer in sized
        ]
        self._shared: Shared | None = None  # what rows have alike since the last reordering, and where they were
        self._places: list[int] = []

    def can_reorder(self, rows: int) -> bool:
        """Whether it holds so many rows, in layers that `reorder` knows."""
        return all(
            type(layer) in (StaticLayer, _Window) and layer.is_initialized and layer.keys.shape[0] == rows
            for layer in self.layers
        )

    def reorder(self, reordering: Reordering) -> int:
        """Make each row its parent's, in place; returns the bytes that were written."""
        length, written = int(self.get_seq_length()), 0
        places = [layer.keys.data_ptr() for layer in self.layers]
        if places != self._places:
            self._shared, self._places = None, places
        copies = reordering.copies(self._shared, length)
        for layer in self.layers:
            kept = min(length, layer.max_cache_len)
            for part in (layer.keys, layer.values):
                written += carry_out(part, copies, kept, skipped=length - kept)
        self._shared = reordering.shared_after(self._shared, length)
        return written

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As Transformers' own, which replaces all tensors."""
        super().reorder_cache(beam_idx)
        self._shared = None

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self._shared = None

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens; the argument is negative, as in Transformers' other caches.

        Raises:
            ValueError: it is positive, or a window has let go of what it would need again.
        """
        if tokens_to_remove > 0:
            raise ValueError("crop takes the negative number of tokens to remove")
        self._shared = None
        layers = [layer for layer in self.layers if layer.is_initialized] if tokens_to_remove else []
        if any(layer.is_sliding and layer.cumulative_length_int > layer.max_cache_len for layer in layers):
            raise ValueError("a full sliding window cannot go back")
        for layer in layers:
            layer.cumulative_length.add_(tokens_to_remove)
            if layer.is_sliding:
                layer.cumulative_length_int += tokens_to_remove

    def grow(self, tokens: int, most: int | None = None) -> None:
        """Make room for so many tokens in all, with what is there."""
        if tokens <= self.tokens:
            return
        wanted = self.tokens * 3 // 2 if most is None else min(self.tokens * 3 // 2, most)
        larger = StepCache(self._config, max(tokens, wanted), most)
        for index, new in enumerate(larger.layers):  # layer by layer, so that two caches are never there at once
            old = self.layers[index]
            if new.max_cache_len == old.max_cache_len:  # a window that has its whole size
                continue
            if old.is_initialized:
                new.lazy_initialization(old.keys, old.values)
                new.keys[:, :, : old.max_cache_len] = old.keys
                new.values[:, :, : old.max_cache_len] = old.values
                new.cumulative_length.copy_(old.cumulative_length)
                if new.is_sliding:
                    new.cumulative_length_int = old.cumulative_length_int
            self.layers[index] = new
            del old
        self.tokens = larger.tokens


class _Window(StaticSlidingWindowLayer):  # type: ignore[misc]  # transformers is not typed
    """Transformers' own makes a tensor on the host for each token in a full window, which CUDA does not capture."""

    _layer_type = None  # it is no model's default

    @classmethod
    def of(cls, layer: StaticSlidingWindowLayer) -> _Window:
        """A window of the same size as a layer of Transformers'."""
        return cls(max_cache_len=layer.max_cache_len, sliding_window=layer.max_cache_len)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, H, T, D]; returns all that the step may look at."""
        if not self.is_initialized or key_states.shape[2] > 1 or self.cumulative_length_int < self.max_cache_len:
            both: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return both
        self.cumulative_length_int += 1
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            stored.copy_(torch.cat((stored[:, :, 1:], new), dim=2))
        return self.keys, self.values


_TENSORS = ("keys", "values", "cumulative_length")
_LAYERS = (StaticLayer, StaticSlidingWindowLayer, _Window)


def why_not(cache: Any) -> str | None:
    """Why a cache cannot be under a capture; None if it can."""
    if type(cache) not in (StaticCache, StepCache):
        return f"its cache is a {type(cache).__name__}"
    if cache.offloading:
        return "its cache is kept off the device"
    kinds = {type(layer) for layer in cache.layers} - {*_LAYERS}
    return f"its cache has a {min(kind.__name__ for kind in kinds)}" if kinds else None


def stage(cache: Any, tokens: int) -> tuple[bool, ...] | None:
    """Which of the sliding windows are full, for a step of so many tokens; None where one becomes full in it."""
    full = []
    for layer in cache.layers:
        if layer.is_sliding:
            count, size = layer.cumulative_length_int, layer.max_cache_len
            if (count >= size and tokens > 1) or count < size < count + tokens:
                return None
            full.append(count >= size)
    return tuple(full)


class CacheTensors:
    """The tensors of one cache, which captures write to.

    When that cache is gone, the next of its size is given its tensors; when it replaces them (a beam search does so in
    each step), what they hold is brought back. Both write to tensors that the cache no longer has, so neither is done
    where anything else still holds one of them.
    """

    def __init__(self, cache: Any) -> None:
        self._owner = ref(cache)
        self._layers = [(layer.keys, layer.values, layer.cumulative_length) for layer in cache.layers]
        self._shapes = [{name: getattr(layer, name) for name in _SHAPES} for layer in cache.layers]
        self._sizes = [(type(layer), layer.max_cache_len) for layer in cache.layers]

    def holders(self) -> list[int]:
        """How many references to each tensor and to its memory there are, the bound's own included."""
        return _holders(self._layers)

    def _is_held_elsewhere(self, cache: Any, by_captures: list[int]) -> bool:
        """Whether anything but the cache, these notes and the captures holds one of the tensors."""
        layers = [] if cache is None else cache.layers
        by_cache = [
            int(layer.keys is keys) + int(layer.values is values) + int(layer.cumulative_length is length)
            for layer, (keys, values, length) in zip(layers, self._layers, strict=False)
        ] or [0] * len(self._layers)
        return any(
            found > alone + cached + captured
            for found, alone, cached, captured in zip(
                self.holders(), [_ALONE] * len(self._layers), by_cache, by_captures, strict=True
            )
        )

    def of(self, cache: Any) -> bool:
        """Whether these are the tensors of that cache."""
        return self._owner() is cache

    def is_free(self) -> bool:
        """Whether that cache is gone."""
        return self._owner() is None

    def adopt(self, cache: Any, rows: int, by_captures: list[int]) -> bool:
        """Give its tensors to a cache that has none yet, for so many sequences; False where they do not fit.

        Args:
            by_captures: of each layer, how many of its `holders` are captures.
        """
        sizes = [(type(layer), layer.max_cache_len) for layer in cache.layers]
        if sizes != self._sizes or any(shape["batch_size"] != rows for shape in self._shapes):
            return False
        if self._is_held_elsewhere(None, by_captures):
            return False
        for layer, tensors, shape in zip(cache.layers, self._layers, self._shapes, strict=True):
            for tensor in tensors:
                tensor.zero_()
            layer.keys, layer.values, layer.cumulative_length = tensors
            for name, value in shape.items():
                setattr(layer, name, value)
            layer.is_initialized = True
        self._owner = ref(cache)
        return True

    def restore(self, cache: Any, by_captures: list[int]) -> bool:
        """Make the cache use its tensors again, with what it holds; False where its sizes are others now."""
        replaced = [
            (layer, tensors)
            for layer, tensors in zip(cache.layers, self._layers, strict=True)
            if not all(getattr(layer, name) is tensor for name, tensor in zip(_TENSORS, tensors, strict=True))
        ]
        if replaced and self._is_held_elsewhere(cache, by_captures):
            return False
        for layer, tensors in replaced:
            pairs = [(tensor, getattr(layer, name)) for name, tensor in zip(_TENSORS, tensors, strict=True)]
            if any((old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device) for old, new in pairs):
                return False
            for old, new in pairs:
                if old is not new:
                    old.copy_(new)
            layer.keys, layer.values, layer.cumulative_length = tensors
        return True


def _holders(layers: list[tuple[Tensor, Tensor, Tensor]]) -> list[int]:
    """For each layer, the references to its tensors and, from views of them, to their memory."""
    return [sum(getrefcount(tensor) + _users(tensor) for tensor in tensors) for tensors in layers]


def _users(tensor: Tensor) -> int:
    """How many tensors share a tensor's memory."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


# Of tensors that nothing but a list like a bound's holds: three of them.
_ALONE = _holders([(torch.zeros(1), torch.zeros(1), torch.zeros(1))])[0]


def advance(cache: Any, tokens: int) -> None:
    """Count tokens where a replay does not."""
    for layer in cache.layers:
        if layer.is_sliding:
            layer.cumulative_length_int += tokens


class Kept:
    """How a cache was before a step that may fail. What a full-attention layer writes beyond its length is not read."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._lengths = [layer.cumulative_length.clone() for layer in cache.layers]
        self._windows: dict[int, tuple[int, Tensor, Tensor]] = {
            index: (layer.cumulative_length_int, layer.keys.clone(), layer.values.clone())
            for index, layer in enumerate(cache.layers)
            if layer.is_sliding
        }

    @torch.no_grad()
    def put_back(self) -> None:
        """Bring the cache back to how it was."""
        for layer, length in zip(self._cache.layers, self._lengths, strict=True):
            layer.cumulative_length.copy_(length)
        for index, (count, keys, values) in self._windows.items():
            layer = self._cache.layers[index]
            layer.cumulative_length_int = count
            layer.keys.copy_(keys)
            layer.values.copy_(values)
