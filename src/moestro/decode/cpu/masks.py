"""What each token of a step or a prompt sees of its sequence's cache, read from the mask that Transformers made.

Known are masks in which a token sees all of the cache from some token on up to itself, as with padding on the left or
with several new tokens of a sequence. What has any other goes Transformers' way.

Legend: B sequences, N new tokens of each, S tokens in the cache with these, T = B * N.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

MOST_TOKENS = 64  # T of a step that is fused and whose rows do not depend on each other; a step with more is a prompt
_AT_ONCE = 2**24  # numbers of a mask that are read at once, since a prompt's may be large
_KEPT = "_moestro_seen"  # on a mask, which all layers of a step share


def reads(mask: Any, sequences: int, new: int, past: int | None = None) -> bool:
    """Whether a mask, or None, may be one that is known: `seen_in` says whether it is.

    Args:
        past: tokens in the cache before these, for a layer that without a mask reads a prompt from its beginning.
    """
    if mask is None:
        return new == 1 or past == 0
    return isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[0] in (1, sequences)


def seen_in(mask: Tensor | None, sequences: int, new: int, length: int, *, padded: bool = False) -> Tensor | None:
    """The tokens of the cache that each token sees, int64 [T, 2]: first, and behind the last, which is itself.

    Args:
        mask: [1 or B, 1, N, S]: bool, or floats that are added to the scores, 0 and the lowest; None where one new
            token of each sequence sees all, or a prompt, which is all there is, each token all up to itself.
        length: S.
        padded: whether tokens may be padding, for which a mask of bools has nothing: they see [0, 0).

    Returns:
        None of a mask that says anything else.

    Raises:
        ValueError: several new tokens of a sequence that has more, without a mask.
    """
    if mask is None:
        if new not in (1, length):
            raise ValueError(f"{new} new tokens of a sequence without a mask, which does not say what each sees")
        return _all_seen(sequences, new, length)
    version = None if mask.is_inference() else mask._version
    key, found, has_padding = getattr(mask, _KEPT, (None, None, False))
    if key != (version, sequences, new, length):
        key, found = (version, sequences, new, length), _read(mask, new, length)
        found = None if found is None else found.expand(sequences, new, 2).reshape(-1, 2)
        has_padding = found is not None and bool((found[:, 0] == found[:, 1]).any())
        setattr(mask, _KEPT, (key, found, has_padding))
    return found if padded or not has_padding else None


@lru_cache(maxsize=16)
def _all_seen(sequences: int, new: int, length: int) -> Tensor:
    """Each token sees all up to itself. All layers of a step ask for it, and none changes it."""
    ends = torch.arange(length - new + 1, length + 1)
    return torch.stack((torch.zeros_like(ends), ends), -1).repeat(sequences, 1)


def _read(mask: Tensor, new: int, length: int) -> Tensor | None:
    """int64 [1 or B, N, 2]."""
    if mask.device.type != "cpu" or mask.shape[1:] != (1, new, length):
        return None
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return None
    ends = torch.arange(length - new + 1, length + 1)
    rows = max(1, _AT_ONCE // (mask.shape[0] * length))
    parts = [_read_rows(part, end) for part, end in zip(mask[:, 0].split(rows, 1), ends.split(rows), strict=True)]
    known = [part for part in parts if part is not None]
    return torch.cat(known, 1) if len(known) == len(parts) else None


def _read_rows(mask: Tensor, ends: Tensor) -> Tensor | None:
    """Of some of the new tokens, mask [1 or B, n, S] and where each ends [n]: int64 [1 or B, n, 2]."""
    if mask.dtype == torch.bool:
        seen = mask
    else:
        seen = mask == 0
        if not bool((seen | (mask <= torch.finfo(mask.dtype).min)).all()):
            return None
    whole = seen.to(torch.uint8)
    first, last = whole.argmax(-1), mask.shape[-1] - 1 - whole.flip(-1).argmax(-1)
    counts = whole.sum(-1)
    plain = (last + 1 == ends) & (counts == ends - first)
    nothing = counts == 0 if mask.dtype == torch.bool else torch.zeros_like(plain)  # floats weigh all alike then
    if not bool((plain | nothing).all()):
        return None
    return torch.stack((first, ends.expand_as(first)), -1) * ~nothing[..., None]


def trial_mask(implementation: str, dtype: torch.dtype, firsts: list[int], new: int, length: int) -> Tensor | None:
    """A mask as an attention implementation of Transformers takes it, for sequences that begin at these tokens.

    Returns:
        [B, 1, N, S]; None where it is not known what it takes.
    """
    places, ends = torch.arange(length), torch.arange(length - new + 1, length + 1)
    seen = torch.stack([(places >= first) & (places < ends[:, None]) for first in firsts])[:, None]
    if implementation == "sdpa":
        return seen
    if implementation == "eager":
        return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    return None
