"""What each token of a step sees of its sequence's cache, read from the attention mask that Transformers made.

Known are masks in which a token sees all of the cache from some token on up to itself, as with padding on the left or
with several new tokens of a sequence. Steps with any other go Transformers' way.

Legend: B sequences, N new tokens of each, S tokens in the cache with these, T = B * N.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

MOST_TOKENS = 16  # T of a step that is fused; a step with more is a prompt
_KEPT = "_moestro_seen"  # on a mask, which all layers of a step share


def reads(mask: Any, sequences: int, new: int) -> bool:
    """Whether a mask, or None, may be one that is known: `seen_in` says whether it is."""
    if mask is None:
        return new == 1
    return isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[0] in (1, sequences)


def seen_in(mask: Tensor | None, sequences: int, new: int, length: int) -> Tensor | None:
    """The tokens of the cache that each token sees, int64 [T, 2]: first, and behind the last, which is itself.

    Args:
        mask: [1 or B, 1, N, S]: bool, or floats that are added to the scores, 0 and the lowest; None where one new
            token of each sequence sees all.
        length: S.

    Returns:
        None of a mask that says anything else.

    Raises:
        ValueError: several new tokens of a sequence without a mask.
    """
    if mask is None:
        if new > 1:
            raise ValueError(f"{new} new tokens of a sequence without a mask, which does not say what each sees")
        return _all_seen(sequences, length)
    version = None if mask.is_inference() else mask._version
    key, found = getattr(mask, _KEPT, (None, None))
    if key != (version, sequences, new, length):
        key, found = (version, sequences, new, length), _read(mask, new, length)
        found = None if found is None else found.expand(sequences, new, 2).reshape(-1, 2)
        setattr(mask, _KEPT, (key, found))
    return found


@lru_cache(maxsize=16)
def _all_seen(sequences: int, length: int) -> Tensor:
    """One new token of each sequence, which sees all. All layers of a step ask for it, and none changes it."""
    return torch.tensor([[0, length]]).repeat(sequences, 1)


def _read(mask: Tensor, new: int, length: int) -> Tensor | None:
    """int64 [1 or B, N, 2]."""
    if mask.device.type != "cpu" or mask.shape[1:] != (1, new, length):
        return None
    ends = torch.arange(length - new + 1, length + 1)
    if mask.dtype == torch.bool:
        seen = mask[:, 0]
    elif mask.is_floating_point():
        seen = mask[:, 0] == 0
        if not bool((seen | (mask[:, 0] <= torch.finfo(mask.dtype).min)).all()):
            return None
    else:
        return None
    whole = seen.to(torch.uint8)
    first, last = whole.argmax(-1), length - 1 - whole.flip(-1).argmax(-1)
    if not bool(((last + 1 == ends) & (whole.sum(-1) == ends - first)).all()):
        return None
    return torch.stack((first, ends.expand_as(first)), -1)


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
