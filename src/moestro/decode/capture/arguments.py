"""What a step is given and returns: which of it a capture depends on, and copies of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from ...devices.graphs import CannotCaptureError

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


def collect(value: Any, tensors: list[Tensor], rest: list[Any]) -> None:
    """Split the arguments of a step into tensors and what the others are.

    Raises:
        CannotCaptureError: something that is neither.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        rest.append((value.shape, value.dtype, value.device))
    elif isinstance(value, dict):
        rest.append(tuple(value))
        for item in value.values():
            collect(item, tensors, rest)
    elif isinstance(value, tuple | list):
        rest.append(len(value))
        for item in value:
            collect(item, tensors, rest)
    elif isinstance(value, _PLAIN):
        rest.append((type(value), value))
    elif not isinstance(value, Cache | PreTrainedTokenizerBase):  # generation gives its tokenizer, which no model reads
        raise CannotCaptureError(f"it is given a {type(value).__name__}")


class Put:
    """The arguments of a step with buffers in the places of their tensors."""

    def __init__(self, buffers: list[Tensor]) -> None:
        self._buffers = iter(buffers)

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return next(self._buffers)
        if isinstance(value, dict):
            return {name: self(item) for name, item in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(self(item) for item in value)
        return value


class _TheCache:
    """Stands for the step's cache in a captured output, which would keep that alive."""


def without_cache(output: Any) -> Any:
    """What a model returned, without its cache, for a captured step to hold."""
    return _mapped(output, lambda tensor: tensor, _TheCache())


def copied(output: Any, cache: Any) -> Any:
    """What a model returned, in memory of its own and with this cache."""
    return _mapped(output, torch.clone, cache)


def _mapped(output: Any, change: Callable[[Tensor], Tensor], cache: Any) -> Any:
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, Cache | _TheCache):
        return cache
    if isinstance(output, ModelOutput):
        return type(output)(**{name: _mapped(item, change, cache) for name, item in output.items()})
    if isinstance(output, dict):
        return {name: _mapped(item, change, cache) for name, item in output.items()}
    if isinstance(output, tuple | list):
        return type(output)(_mapped(item, change, cache) for item in output)
    return output
