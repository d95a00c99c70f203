"""The layers that layer_workers.py times: all experts in our kernels, or single experts in torch's own linears.

Both read huge pages, as the store does. All experts have equal weights, each in memory of its own.

    OurLayer(2048, 1024, 64, 8, "int4", 2).layer_s(tokens=1, seed=0)

Legend: T tokens, K top-k, D model width, F expert neurons.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from moestro.bench.kernels import hidden_dtype, swiglu
from moestro.compute.cpu import CpuExperts, best_level
from moestro.compute.experts import ExpertMath, ExpertWork
from moestro.engine.routing import group_by_expert
from moestro.machine.kernel_rates import plausible_weights
from moestro.memory.formats import FORMATS, ExpertShape
from moestro.memory.store import ExpertStore, map_memory

from .steps import FORWARDS, Draw, draw_steps, median_s


class OurLayer:
    """One layer, whose experts are computed in one call of the kernels."""

    def __init__(self, hidden: int, neurons: int, experts: int, top_k: int, format_name: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.math = ExpertMath(ExpertShape(hidden, neurons), FORMATS[format_name], swiglu)
        size = self.math.format.expert_bytes(self.math.shape)
        self.store = ExpertStore([[size] * experts])
        packed = plausible_weights(size).view(torch.uint8)
        for expert in range(experts):
            self.store[0, expert].copy_(packed)
        self._experts, self._top_k = experts, top_k
        self._type = hidden_dtype(format_name)  # of hidden states
        self._cpu = CpuExperts(threads)
        assert self._cpu.kernel(self.math) is not None
        self._next, self._all = 0, range(self.math.shape.neurons)

    def layer_s(self, tokens: int, seed: int) -> float:
        draws = draw_steps(tokens, self.math.shape.hidden, self._experts, self._top_k, seed)
        return median_s([partial(self.step, *self.tensors(draw)) for draw in draws])

    def expert_s(self, tokens: int) -> float:
        x, rows = torch.randn(tokens, self.math.shape.hidden).to(self._type), torch.arange(tokens)
        forwards = []
        for _ in range(1 + FORWARDS):
            work = ExpertWork(self.store[0, self._next], self._all, rows, torch.ones(tokens))
            forwards.append(partial(self._run, x, [work]))
            self._next = (self._next + 1) % self._experts
        return median_s(forwards)

    def tensors(self, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states bfloat16 [T, D], the router's choice int64 [T, K] and its weights float32 [T, K]."""
        x = torch.from_numpy(draw.hidden.view(np.int16)).view(torch.bfloat16)
        return x, torch.from_numpy(draw.routes), torch.full(draw.routes.shape, 1 / self._top_k)

    def step(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Compute a step as the conductor does: group the choices, compute, round. Returns [T, D] in the dtype of x."""
        routed = group_by_expert(index, weights, self._experts)
        return self._run(x, [routed.work(expert, self.store[0, expert], self._all) for expert in routed.tokens])

    def _run(self, x: Tensor, work: list[ExpertWork]) -> Tensor:
        out = torch.zeros(x.shape, dtype=torch.float32)
        self._cpu.run(self.math, x, work, out)
        return out.to(x.dtype)

    def card(self) -> dict[str, Any]:
        """The instruction set of the kernels."""
        return {"backend": best_level()}


class TorchExperts:
    """The three products of an expert as torch's linears, without the gate between them."""

    def __init__(self, hidden: int, neurons: int, experts: int, format_name: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._hidden, self._neurons, self._type = hidden, neurons, hidden_dtype(format_name)
        one = plausible_weights(3 * hidden * neurons * self._type.itemsize).view(self._type)
        memory = map_memory(experts * one.nbytes).view(self._type)
        self._weights = memory.view(experts, 3, hidden * neurons)
        self._weights.copy_(one.view(3, -1).expand_as(self._weights))
        self._next = 0

    @torch.no_grad()
    def expert_s(self, tokens: int) -> float:
        x = torch.randn(tokens, self._hidden).to(self._type)  # [T, D]
        h = torch.randn(tokens, self._neurons).to(self._type)  # [T, F]
        forwards = []
        for _ in range(1 + FORWARDS):
            forwards.append(partial(self._products, x, h, self._weights[self._next]))
            self._next = (self._next + 1) % len(self._weights)
        return median_s(forwards)

    def _products(self, x: Tensor, h: Tensor, weights: Tensor) -> None:
        gate, up, down = weights
        linear(x, gate.view(self._neurons, self._hidden))
        linear(x, up.view(self._neurons, self._hidden))
        linear(h, down.view(self._hidden, self._neurons))

    def card(self) -> dict[str, Any]:
        """The version of torch."""
        return {"backend": f"torch {torch.__version__}"}
