"""A router's choice for few tokens in one call: swapped in where it computes the same.

Known are softmax over all experts and then the best of them, with or without scores that sum to 1 (Mixtral, OLMoE,
Qwen); which of them a router is, is found by trying it on numbers. Any other is left alone.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from ...compute.eager import outside_of_graphs
from ...compute.few_tokens import StepRouter
from ...memory.formats import FLOAT_FORMATS
from ..hooks import Fused, put_in_place
from .masks import MOST_TOKENS

_TRIALS = 8


def fuse_router(router: Any, threads: int) -> bool:
    """Give a router a forward for few tokens; says whether it is one that we know."""
    known = _recognize(router, threads)
    if known is not None:
        put_in_place(router, FusedRouter(router, known), *router.modules())
    return known is not None


class FusedRouter(Fused):
    """The forward of a recognized router."""

    def __init__(self, router: Any, kernel: StepRouter) -> None:
        super().__init__(router)
        self.kernel = kernel

    @outside_of_graphs
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or not self._fits(args[0]):
            return self._original(*args, **kwargs)
        return self.kernel.run(args[0])

    def _fits(self, x: Any) -> bool:
        """Whether these are few tokens of the weight's dtype on the CPU, and the router is what it was."""
        return (
            isinstance(x, Tensor)
            and x.shape[-1:] == (self.kernel.width,)
            and self.kernel.width <= x.numel() <= MOST_TOKENS * self.kernel.width
            and x.dtype == self.kernel.dtype
            and x.device.type == "cpu"
            and not x.requires_grad
            and self.watch is not None
            and self.watch.holds()
        )


def _recognize(router: Any, threads: int) -> StepRouter | None:
    parameters, top_k = list(router.parameters()), getattr(router, "top_k", None)
    weight = getattr(router, "weight", None)
    if len(parameters) != 1 or weight is not parameters[0] or list(router.buffers()) or not isinstance(top_k, int):
        return None
    if weight.dim() != 2 or weight.dtype not in FLOAT_FORMATS or weight.device.type != "cpu":
        return None
    if not weight.is_contiguous():  # the kernel would read a copy, which no later edit reaches
        return None
    random = torch.Generator().manual_seed(0)
    # Random vectors alone would leave the logits of small weights as good as equal.
    scale = 2.0 / max(float(weight.detach().float().norm(dim=1).mean()), 1e-6)
    trials = [
        torch.randn(1 + n % 3, weight.shape[1], generator=random).mul_(scale).to(weight.dtype) for n in range(_TRIALS)
    ]
    try:
        wanted = [router(x) for x in trials]
        if any(len(parts) != 3 or parts[2].dtype != torch.int64 for parts in wanted):
            return None
        for normalized, dtype in product((True, False), {weight.dtype, torch.float32}):
            known = StepRouter(weight, top_k=top_k, normalized=normalized, score_dtype=dtype, threads=threads)
            if all(_same(known.run(x), parts) for x, parts in zip(trials, wanted, strict=True)):
                return known
    except Exception:  # it wants or returns something else
        return None
    return None


def _same(got: tuple[Tensor, Tensor, Tensor], wanted: Any) -> bool:
    """Logits and scores up to a few of their last places, and experts whose logits are those of the wanted ones."""
    logits, scores, index = wanted
    step = 4 * max(torch.finfo(part.dtype).eps for part in (logits, scores)) + 1e-6
    pairs = [*zip(got[:2], wanted[:2], strict=True), (logits.gather(1, got[2]), logits.gather(1, index))]
    return got[2].shape == index.shape and all(
        ours.shape == theirs.shape
        and ours.dtype == theirs.dtype
        and bool((ours.float() - theirs.float()).norm() <= step * theirs.float().norm())
        for ours, theirs in pairs
    )
