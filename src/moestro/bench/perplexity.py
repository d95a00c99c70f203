"""Perplexity of a model over windows of a text.

The tokens are cut into windows that follow each other and do not overlap; what does not fill the last one is left out.
In each window every token but the first is predicted from those before it in that window, so each prediction is counted
once. Perplexity is e to the mean of their losses. `scripts/train_demo.py --evaluate` does the same.

Legend: W windows, C tokens of a window, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, RequestError

_MOST_LOGITS = 2**26  # of a forward pass, 256 MiB in float32
_MOST_WINDOWS = 16  # of a forward pass


def cut_windows(ids: Tensor, window: int, tokens: int, what: str) -> Tensor:
    """The first tokens of a text as windows, int64 [W, C].

    Args:
        ids: int64 [tokens of the text].
        window: C, at least 2. tokens: the most to take; 0 for all.
        what: the text's name, for the error.

    Raises:
        RequestError: the text does not fill one window.
    """
    count = min(len(ids), tokens or len(ids)) // window
    if not count:
        found = f"{what} has {len(ids):,} tokens" if len(ids) < window else f"--tokens {tokens}"
        raise RequestError(f"{found}, but a window has {window}; give more, or a smaller --window")
    return ids[: count * window].view(count, window)


@torch.no_grad()
def window_losses(model: Any, windows: Tensor, on_windows: Callable[[int], None] = lambda count: None) -> Tensor:
    """The sum of the losses of each window's predictions in nats, float64 [W].

    Args:
        model: a Transformers model in eval mode. windows: int64 [W, C].
        on_windows: called with the number of windows that are done since it was called last.

    Raises:
        CheckpointError: a loss is not a finite number.
    """
    vocabulary = model.config.get_text_config().vocab_size
    at_once = max(1, min(_MOST_WINDOWS, _MOST_LOGITS // (windows.shape[1] * vocabulary)))
    losses = []
    for batch in windows.to(model.device).split(at_once):
        logits = model(batch, use_cache=False).logits[:, :-1].float()  # [w, C - 1, V]
        of_tokens = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        losses.append(of_tokens.double().view(len(batch), -1).sum(1).cpu())
        on_windows(len(batch))
    found = torch.cat(losses)
    if not found.isfinite().all():
        raise CheckpointError("the model's output is not a finite number: its weights are damaged; download it again")
    return found


def perplexity(losses: Tensor, window: int) -> float:
    """Perplexity of all windows together. losses: float64 [W], as `window_losses` gives them. window: C."""
    return math.exp(float(losses.sum()) / (len(losses) * (window - 1)))


def standard_errors_apart(first: Tensor, second: Tensor) -> float:
    """By how many standard errors the mean of `first` is above that of `second`: losses of the same windows, [W].

    The windows are taken for independent; infinite for a single one, or where all differences are the same and not 0.
    """
    differences = first - second
    mean = float(differences.mean())
    error = float(differences.std()) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    return mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
