"""Prompts that are read in one forward: which, and how.

An expert that several of them need is read from memory once. Padded on the left to the longest, as rows of a batch that
end at the same column.

Legend: B prompts, N tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..decode.cpu.masks import MOST_TOKENS
from .caches import Caches, Forward
from .prefixes import shared_tokens

_PADDING = 1 / 4  # of the longest prompt, at most
_ALIKE = 1 / 8  # of a prompt; what shares more with another one is better read behind it


def readable_together(prompts: Sequence[Tensor], tokens: int, known: Callable[[Tensor], int]) -> int:
    """How many prompts, from the first one on, are worth a forward together; at least 1.

    A prompt of up to `MOST_TOKENS` tokens is read alone: by itself it is a step, whose products a prompt's are not.

    Args:
        prompts: each int64 [tokens]. tokens: of the forward, at most, with padding.
        known: of how many of a prompt's first tokens keys and values are kept.
    """
    taken: list[Tensor] = []
    for prompt in prompts:
        sizes = [len(one) for one in (*taken, prompt)]
        is_small = max(sizes) * len(sizes) <= tokens and min(sizes) >= max(sizes) * (1 - _PADDING)
        if not is_small or len(prompt) <= MOST_TOKENS:
            break
        most = max(known(prompt), *(shared_tokens(prompt, one) for one in taken), 0)
        if most > len(prompt) * _ALIKE:
            break
        taken.append(prompt)
    return max(1, len(taken))


def read_together(forward: Forward, caches: Caches, prompts: Sequence[Tensor]) -> tuple[Tensor, list[Any]]:
    """Read prompts whole: the logits behind each, float32 [B, V], and a cache of each one.

    Args:
        prompts: each int64 [tokens].
    """
    longest, sizes = max(map(len, prompts)), torch.tensor([len(one) for one in prompts])
    ids = torch.stack([torch.nn.functional.pad(one, (longest - len(one), 0)) for one in prompts])
    positions = torch.arange(longest) - (longest - sizes[:, None])  # [B, N]
    mask = (positions >= 0).long() if int(sizes.min()) < longest else None
    rooms, whole = caches.rooms(len(prompts), longest), caches.fresh()
    caches.place(whole, rooms, 0)
    logits, read = forward(ids, whole, positions.clamp(min=0), mask)
    return logits, [_row(caches, read, row, len(one)) for row, one in enumerate(prompts)]


def _row(caches: Caches, read: Any, row: int, tokens: int) -> Any:
    """A cache over the last tokens of a row."""
    one = caches.fresh()
    parts = [
        (layer.keys[row : row + 1, :, -tokens:], layer.values[row : row + 1, :, -tokens:])
        if getattr(layer, "keys", None) is not None and layer.keys.numel()
        else None
        for layer in read.layers
    ]
    caches.place(one, parts, tokens)
    return caches.copied(one, tokens, tokens)
