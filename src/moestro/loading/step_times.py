"""Measures what a decode step takes beside its kernels here: Python, torch's small operations, threads that wake.

Random models so small that their weights take no time decode tokens, with few layers and with many: the difference is
what a layer takes, the rest is the step's. Before each step memory is read that drives code and tables out of the
caches, as the weights of a real model do. Prompts are read by models whose hidden states are as wide as a real one's
and all else is small: what is left is norms, sums and routing, which take time by token and column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..compute.cpu import read_gbps
from ..machine.kernel_rates import torch_threads
from ..progress import quiet
from . import plug  # noqa: F401  # registers the experts function
from .config import MoestroConfig
from .random_model import build_random

FEW, MANY = 1, 9  # layers
_STEPS, _WARM = 16, 4
_PROMPT_TOKENS, _PROMPTS, _MANY_WIDE = 256, 5, 5  # prompts read, and layers of the larger model that reads them
_SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 131072,
}
_WIDE: dict[str, Any] = {**_SMALL, "hidden_size": 2048}
# A family whose decoder layers run in one call, and one whose attention and router are Transformers' own.
_FUSED, _PLAIN = "mixtral", "gpt_oss"


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Microseconds of a step and of each of its layers; of a plain layer, where attention is Transformers' own.

    prompt_ns: nanoseconds of each token, layer and column of the hidden states of a prompt.
    """

    step_us: float
    layer_us: float
    plain_layer_us: float
    prompt_ns: float


def measure_step_times(
    threads: int, flushed: Tensor, on_progress: Callable[[float], None] = lambda share: None
) -> StepTimes:
    """Measure them with models of two families.

    Args:
        flushed: memory to read before each step, float32; larger than the caches.
    """
    with torch_threads(threads):
        kinds = [(family, layers) for family in (_FUSED, _PLAIN) for layers in (FEW, MANY)]
        with quiet():
            steps = [_Steps(family, layers, threads, flushed) for family, layers in kinds]
            prompts = [_Steps(_FUSED, layers, threads, flushed, _WIDE) for layers in (FEW, _MANY_WIDE)]
        found: list[list[float]] = [[] for _ in steps]
        for turn in range(_WARM + _STEPS):
            for one, seconds in zip(steps, found, strict=True):
                seconds.append(one.take())
            on_progress((turn + 1) / (_WARM + _STEPS + _PROMPTS))
        read: list[list[float]] = [[] for _ in prompts]
        for turn in range(_PROMPTS):
            for one, seconds in zip(prompts, read, strict=True):
                seconds.append(one.read(_PROMPT_TOKENS))
            on_progress((_WARM + _STEPS + turn + 1) / (_WARM + _STEPS + _PROMPTS))
    few, many, plain_few, plain_many = (1e6 * median(seconds[_WARM:]) for seconds in found)
    layer_us, plain_us = (max(0.0, b - a) / (MANY - FEW) for a, b in ((few, many), (plain_few, plain_many)))
    least_s, most_s = (median(seconds[1:]) for seconds in read)
    columns = (_MANY_WIDE - FEW) * _PROMPT_TOKENS * _WIDE["hidden_size"]
    return StepTimes(
        max(0.0, few - FEW * layer_us), layer_us, plain_us, prompt_ns=1e9 * max(0.0, most_s - least_s) / columns
    )


class _Steps:
    """A small model that decodes and reads prompts."""

    def __init__(
        self, family: str, layers: int, threads: int, flushed: Tensor, sizes: Mapping[str, Any] = _SMALL
    ) -> None:
        config = MoestroConfig(device="cpu", threads=threads, bits=8)
        values = {**sizes, "model_type": family, "num_hidden_layers": layers}
        self._model: Any = build_random(values, config, dtype=torch.bfloat16, seed=0)
        self._threads, self._flushed = threads, flushed
        self._cache = DynamicCache(config=self._model.config)
        self._forward(16)

    def read(self, tokens: int) -> float:
        """Seconds of a prompt."""
        self._cache = DynamicCache(config=self._model.config)
        read_gbps(self._flushed, self._threads, 0)
        return self._forward(tokens)

    def take(self) -> float:
        """Seconds of a step."""
        read_gbps(self._flushed, self._threads, 0)
        return self._forward(1)

    def _forward(self, tokens: int) -> float:
        ids = torch.randint(0, _SMALL["vocab_size"], (1, tokens))
        start_s = perf_counter()
        with torch.no_grad():
            self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return perf_counter() - start_s
