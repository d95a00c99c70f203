"""Transformers' plain cache, made longer and reordered in place.

Legend: B sequences, N new tokens of each, G key heads, d their width, S tokens in the cache.
"""

from __future__ import annotations

from sys import getrefcount
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..rows import Reordering, Shared, carry_out

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
    shared: what rows have alike, of those that were reordered here; None where that is not known.
    """

    __slots__ = ("_versions", "key_room", "shared", "value_room", "written")

    def __init__(self, key_room: Tensor, value_room: Tensor, written: int) -> None:
        self.key_room, self.value_room, self.written = key_room, value_room, written
        self.shared: Shared | None = None
        self.note()

    @classmethod
    def copied(cls, keys: Tensor, values: Tensor, tokens: int, parents: Tensor | None = None) -> _Storage:
        """A copy of keys and values, their rows those of their parents, with room for so many more tokens."""
        return cls(_with_room(keys, tokens, parents), _with_room(values, tokens, parents), keys.shape[2])

    def is_free_behind(self, keys: Tensor, values: Tensor, tokens: int) -> bool:
        """Whether a cache that holds these may write its next tokens into this room."""
        return self.written <= self.key_room.shape[2] - tokens and self._is_all(keys, values)

    def take(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Make keys and values so many tokens longer; what is there is for the caller to write."""
        self.written += tokens
        return self.all()

    def all(self) -> tuple[Tensor, Tensor]:
        """All keys and values."""
        return self.key_room.narrow(2, 0, self.written), self.value_room.narrow(2, 0, self.written)

    def note(self) -> None:
        """Note that we have written here."""
        self._versions = version_of(self.key_room), version_of(self.value_room)

    def knows(self, layer: Any) -> bool:
        """Whether a layer holds all that is here, and nothing was written here but what `note` was told of."""
        return self._is_all(layer.keys, layer.values) and self._versions == (
            version_of(self.key_room),
            version_of(self.value_room),
        )

    def _is_all(self, keys: Tensor, values: Tensor) -> bool:
        if not keys.shape[2] == values.shape[2] == self.written:
            return False
        pairs = ((keys, self.key_room), (values, self.value_room))
        return all(part.data_ptr() == room.data_ptr() and _alike(part, room) for part, room in pairs)


class RoomLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """A plain layer that grows in place, and of which a reordering copies only what changes.

    It takes the place of Transformers' own in a beam search, since that copies the whole cache for each token.
    """

    _layer_type = None  # it is no model's default
    keys: Tensor
    values: Tensor
    _moestro_storage: _Storage

    @classmethod
    def of(cls, layer: DynamicLayer) -> RoomLayer:
        """A layer that holds what a plain one does."""
        made = cls()
        made.__dict__.update(vars(layer))
        return made

    @classmethod
    def in_room(cls, key_room: Tensor, value_room: Tensor, tokens: int) -> RoomLayer:
        """A layer that holds the first tokens of a caller's [B, G, room, d], and writes the next ones behind them."""
        made = cls()
        made.lazy_initialization(key_room, value_room)
        made._moestro_storage = _Storage(key_room, value_room, tokens)
        made.keys, made.values = made._moestro_storage.all()
        return made

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values, [B, G, N, d]; returns all."""
        pairs = ((key_states, getattr(self, "keys", None)), (value_states, getattr(self, "values", None)))
        if not all(_fits_behind(new, part) for new, part in pairs):
            both: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return both
        return _append(self, key_states, value_states)

    def reorder(self, reordering: Reordering) -> int:
        """Make each row its parent's; returns the bytes that were written."""
        storage: _Storage | None = getattr(self, "_moestro_storage", None)
        length = self.keys.shape[2]
        shared = storage.shared if storage is not None and storage.knows(self) else None
        if storage is not None and storage.knows(self) and is_held_alone(self, storage):
            copies = reordering.copies(shared, length)
            written = sum(carry_out(part, copies, length) for part in (self.keys, self.values))
        else:
            parents = torch.tensor(reordering.parents)
            storage = self._moestro_storage = _Storage.copied(self.keys, self.values, 1, parents)
            self.keys, self.values = storage.all()
            written = sum(part.numel() * part.element_size() for part in (self.keys, self.values))
        storage.shared = reordering.shared_after(shared, length)
        storage.note()
        return written

    def share(self, shared: Shared) -> None:
        """Take it that rows have this alike, and make room for what follows."""
        storage = self._moestro_storage = _Storage.copied(self.keys, self.values, 1)
        self.keys, self.values = storage.all()
        storage.shared = shared


def is_plain(cache: Any, index: int) -> bool:
    """Whether it is the plain cache, which returns all keys and values of a layer in one piece.

    One whose `update` was replaced, to see or to change what it is given, is not.
    """
    if type(cache) is not DynamicCache or cache.offloading or "update" in vars(cache):
        return False
    if index >= len(cache.layers):
        return True
    return type(cache.layers[index]) in (DynamicLayer, RoomLayer) and "update" not in vars(cache.layers[index])


def append(cache: Any, index: int, k: Tensor, v: Tensor, kind: CacheKind) -> tuple[Tensor, Tensor]:
    """Add new tokens' keys and values [B, G, N, d] to a plain cache and return all of them, [B, G, S, d]."""
    if not can_grow(cache, index, kind, k.shape[0]):
        keys, values = cache.update(k, v, index)
        return keys.contiguous(), values.contiguous()
    return _append(cache.layers[index], k, v)


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
    layer.keys, layer.values = _storage_for(layer, tokens).take(tokens)
    return layer.keys, layer.values


def shrink(cache: Any, index: int, tokens: int) -> None:
    """Take back the tokens that `grow` made room for and that were never written."""
    layer = cache.layers[index]
    layer.keys, layer.values = layer.keys[:, :, :-tokens], layer.values[:, :, :-tokens]


def _append(layer: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Add keys and values [B, G, N, d] to a layer that holds some of that kind, and return all of them."""
    new = k.shape[2]
    storage = _storage_for(layer, new)
    knows = storage.knows(layer)
    layer.keys, layer.values = storage.take(new)
    layer.keys[:, :, -new:], layer.values[:, :, -new:] = k, v
    if knows:
        storage.note()
    return layer.keys, layer.values


def _storage_for(layer: Any, tokens: int) -> _Storage:
    """Storage that holds a layer's keys and values and has room for so many tokens behind them."""
    storage: _Storage | None = getattr(layer, "_moestro_storage", None)
    if storage is None or not storage.is_free_behind(layer.keys, layer.values, tokens):
        shared = storage.shared if storage is not None and storage.knows(layer) else None
        storage = layer._moestro_storage = _Storage.copied(layer.keys, layer.values, tokens)
        storage.shared = shared
    return storage


def _fits_behind(new: Tensor, part: Tensor | None) -> bool:
    """Whether new tokens are of the kind that a layer holds."""
    if part is None or part.dim() != 4 or new.dim() != 4:
        return False
    kinds = [(each.dtype, each.device, each.shape[:2], each.shape[3]) for each in (new, part)]
    return kinds[0] == kinds[1]


def _alike(part: Tensor, room: Tensor) -> bool:
    return part.shape[:2] == room.shape[:2] and part.shape[3] == room.shape[3] and part.stride() == room.stride()


def _with_room(part: Tensor, tokens: int, parents: Tensor | None = None) -> Tensor:
    """A copy of keys or values with room for so many more tokens, its rows those of their parents, int64 [B]."""
    length = part.shape[-2]
    storage = part.new_empty((*part.shape[:2], length + max(_ROOM, length // 2, tokens), part.shape[3]))
    if parents is None:
        storage[:, :, :length] = part
    else:
        for row, parent in enumerate(parents.tolist()):
            storage[row, :, :length] = part[parent]
    return storage


def version_of(tensor: Tensor) -> int | None:
    """Grows with each write to the tensor by torch; None where torch does not count."""
    return None if tensor.is_inference() else tensor._version


def _users(tensor: Tensor) -> int:
    """How many tensors share a tensor's memory."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def is_held_alone(layer: Any, storage: _Storage | None = None) -> bool:
    """Whether nothing but a layer holds its keys and values, as a copy of its cache or a view of them would.

    Args:
        storage: in which they are; None where each is a tensor of its own, or a view of one that nothing else holds.
    """
    rooms = (None, None) if storage is None else (storage.key_room, storage.value_room)
    return all(_is_alone(vars(layer), name, room) for name, room in zip(("keys", "values"), rooms, strict=True))


def _is_alone(owner: dict[str, Any], name: str, room: Tensor | None) -> bool:
    base = owner[name]._base  # the tensor that it is a view of, where torch notes that
    if base is not None and base is not room and (room is not None or getrefcount(base) > _BASE_REFERENCES):
        return False
    tensors = 1 if base is None and room is None else 2
    return getrefcount(owner[name]) <= _REFERENCES and _users(owner[name]) < tensors + _USERS


def _counts() -> tuple[int, int, int]:
    """Of a tensor that only a dict holds: references to it, to one that it is a view of, and users of its memory."""
    view, alone = {"part": torch.empty(2)[:1]}, {"part": torch.empty(1)}
    base = view["part"]._base
    return getrefcount(alone["part"]), getrefcount(base), _users(alone["part"])


_REFERENCES, _BASE_REFERENCES, _USERS = _counts()
