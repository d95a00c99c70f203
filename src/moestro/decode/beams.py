"""Beam search moves no more of the KV cache than changes, and computes the prompt that its beams share once.

Transformers' search calls `model._reorder_cache` after each step where a model has one, else the cache's own, which
copies all rows of all layers. `ReorderCache` is put there. It copies into the rows whose parent is another one, and
where it is known what rows have alike, only what follows that. Layers that it does not know (recurrent states, indexed
and quantized ones) go Transformers' way, unless every row is its own parent.

    >>> model._reorder_cache = ReorderCache()
    >>> ids = model.generate(torch.tensor([[1, 2, 3]]), num_beams=4)
    >>> model._reorder_cache.moved_bytes < model._reorder_cache.whole_bytes
    True

Legend: B rows, of which each beam has one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DummyLayer, DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

from ..engine.chunks import chunk_for
from .capture import StepCache
from .cpu.cache import RoomLayer, is_held_alone, is_plain, version_of
from .rows import Reordering, Shared, all_shared, carry_out


class ReorderCache:
    """Takes the place of a model's reordering of its cache.

    moved_bytes: keys and values that were written so far. whole_bytes: what the layers held each time, which is what
    Transformers' own way writes. Neither counts layers that go that way because they are of another kind.
    """

    def __init__(self) -> None:
        self.moved_bytes = self.whole_bytes = 0

    @torch.no_grad()
    def __call__(self, cache: Any, beam_idx: Tensor) -> Any:
        """The cache, with each row its parent's.

        Args:
            beam_idx: int64 [B], of each row its parent.
        """
        reordering = Reordering(beam_idx.tolist())
        if type(cache) is StepCache and cache.can_reorder(len(reordering.parents)):
            self.whole_bytes += sum(_bytes(layer) for layer in cache.layers)
            self.moved_bytes += cache.reorder(reordering)
        elif type(cache) is DynamicCache and not cache.offloading:
            for index in range(len(cache.layers)):
                self._reorder_layer(cache, index, reordering, beam_idx)
        elif reordering.changed:
            cache.reorder_cache(beam_idx)
        return cache

    def _reorder_layer(self, cache: Any, index: int, reordering: Reordering, beam_idx: Tensor) -> None:
        layer = cache.layers[index]
        is_known = type(layer) in _KNOWN and not {"update", "reorder_cache"} & set(vars(layer))
        if not is_known or not _has_rows(layer, len(reordering.parents)):
            if reordering.changed:
                layer.reorder_cache(beam_idx)
            return
        self.whole_bytes += _bytes(layer)
        if layer.is_sliding:
            self.moved_bytes += _replaced(cache, index, WindowLayer).reorder(reordering)
        elif layer.keys.device.type == "cpu":
            self.moved_bytes += _replaced(cache, index, RoomLayer).reorder(reordering)
        else:  # GPU memory is planned for a cache without room
            self.moved_bytes += _reorder_in_place(layer, reordering, None)


class WindowLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]  # transformers is not typed
    """A sliding window of which a reordering copies only what changes."""

    _layer_type = None  # it is no model's default
    keys: Tensor
    values: Tensor
    _shared: Shared | None = None  # what rows have alike, while the layer is as `_mark` has it
    _mark: tuple[Any, ...] = ()

    @classmethod
    def of(cls, layer: DynamicSlidingWindowLayer) -> WindowLayer:
        """A layer that holds what one of Transformers' does."""
        made = cls(layer.sliding_window)
        made.__dict__.update(vars(layer))
        return made

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, G, N, d]; returns all that the step may look at."""
        if self._mark != self._state():
            self._shared = None
        both: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        self._mark = self._state()
        return both

    def reorder(self, reordering: Reordering) -> int:
        """Make each row its parent's; returns the bytes that were written."""
        shared = self._shared if self._mark == self._state() else None
        written = _reorder_in_place(self, reordering, shared)
        self.share(reordering.shared_after(shared, self.cumulative_length))
        return written

    def share(self, shared: Shared) -> None:
        """Take it that rows have this alike."""
        self._shared, self._mark = shared, self._state()

    def _state(self) -> tuple[Any, ...]:
        """Another one when anything but this class changes keys and values."""
        if not self.is_initialized:
            return ()
        parts = [(part.data_ptr(), part.shape, version_of(part)) for part in (self.keys, self.values)]
        return self.cumulative_length, *parts


# Whose `batch_repeat_interleave` repeats all that they hold. Recurrent ones have none, and families' own, derived from
# these, may hold more.
_REPEATABLE = {DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer, DummyLayer}
_KNOWN = (DynamicLayer, RoomLayer, DynamicSlidingWindowLayer, WindowLayer)


def _replaced(cache: DynamicCache, index: int, kind: type[RoomLayer | WindowLayer]) -> Any:
    """A layer of a plain cache as one of this kind, which it then is."""
    if type(cache.layers[index]) is not kind:
        cache.layers[index] = kind.of(cache.layers[index])
    return cache.layers[index]


def _reorder_in_place(layer: Any, reordering: Reordering, shared: Shared | None) -> int:
    """Make each row of a layer its parent's; returns the bytes that were written."""
    if not is_held_alone(layer):  # what others hold keeps its contents
        if reordering.changed:
            layer.reorder_cache(torch.tensor(reordering.parents))
        return _bytes(layer) if reordering.changed else 0
    kept, length = layer.keys.shape[2], layer.get_seq_length()
    copies = reordering.copies(shared, length)
    return sum(carry_out(part, copies, kept, skipped=length - kept) for part in (layer.keys, layer.values))


def _has_rows(layer: Any, rows: int) -> bool:
    """Whether a layer holds keys and values of so many rows."""
    if not layer.is_initialized or layer.keys.numel() == 0:
        return False
    return bool(layer.keys.shape[0] == layer.values.shape[0] == rows and layer.keys.shape[2] == layer.values.shape[2])


def _bytes(layer: Any) -> int:
    return sum(part.numel() * part.element_size() for part in (layer.keys, layer.values))


def read_once(model: Any, ids: Tensor, beams: int) -> DynamicCache | None:
    """A cache with all tokens of a prompt but the last, computed once, in a row for each beam.

    Args:
        ids: int64 [tokens], where the model is.

    Returns:
        None where there is nothing to share, or where the model's cache cannot repeat its rows.
    """
    if len(ids) < 2 or not model._supports_default_dynamic_cache():  # as `generate` asks before it makes such a cache
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if not {type(layer) for layer in cache.layers} <= _REPEATABLE:
        return None
    shared = ids[None, :-1]
    chunk = chunk_for(model, shared, {"past_key_values": cache}) or shared.shape[1]
    takes = {"use_cache": True} | ({"logits_to_keep": 1} if model._supports_logits_to_keep() else {})
    with torch.no_grad():
        for some in shared.split(chunk, dim=1):
            model(input_ids=some, past_key_values=cache, **takes)
    cache.batch_repeat_interleave(beams)
    for index, layer in enumerate(cache.layers):
        if is_plain(cache, index) and _has_rows(layer, beams) and layer.keys.device.type == "cpu":
            _replaced(cache, index, RoomLayer).share(all_shared(beams, layer.keys.shape[2]))
        elif type(layer) is DynamicSlidingWindowLayer:
            _replaced(cache, index, WindowLayer).share(all_shared(beams, layer.cumulative_length))
    return cache
