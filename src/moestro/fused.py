"""Small operations of a decode step as one call each: swapped in by module, where they compute the same.

At one token a layer's norms cost more host time than its kernels wait for memory. Which modules are plain
root-mean-square norms is found by trying them on numbers, not by a table of families; what is not recognized
stays as it is. Knows neither experts nor formats.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from .compute.cpu import levels, rms_norm
from .errors import ModelError
from .families import expert_modules
from .routers import find_router

_FEW_TOKENS = 4
_EPSILONS = ("variance_epsilon", "eps", "epsilon")  # what families call it
_OFFSETS = (0.0, 1.0)  # norm(x) * w, and norm(x) * (1 + w)


class FusedRmsNorm(nn.Module):
    """norm(x) * weight, or norm(x) * (1 + weight), in one pass over x."""

    def __init__(self, weight: nn.Parameter, offset: float, epsilon: float, threads: int) -> None:
        super().__init__()
        self.weight, self.offset, self.epsilon, self.threads = weight, offset, epsilon, threads
        self._weight = weight.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        if x.requires_grad and torch.is_grad_enabled():
            raise ModelError("Moestro is for inference: it gives no gradients; call the model under torch.no_grad()")
        return rms_norm(x.contiguous(), self._weight, self.offset, self.epsilon, threads=self.threads)


@torch.no_grad()
def fuse(model: nn.Module, threads: int) -> None:
    """Swap what can be fused in a loaded model on the CPU."""
    if not levels():
        return
    for name in expert_modules(model):
        router = find_router(model, name)
        if router is not None and next(router.parameters()).dtype != torch.float32:
            _spare_small_products(router)
    for name, module in list(model.named_modules()):
        norm = _as_rms_norm(module, threads)
        if norm is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, norm)


def _spare_small_products(router: nn.Module) -> None:
    """Have a router's few tokens multiplied by torch itself: oneDNN's 16-bit product costs 70 us before it starts."""
    forward = router.forward

    def spared(*args: Any, **kwargs: Any) -> Any:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None or x.numel() > _FEW_TOKENS * x.shape[-1]:
            return forward(*args, **kwargs)
        before = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            return forward(*args, **kwargs)
        finally:
            torch._C._set_mkldnn_enabled(before)

    router.forward = spared


def _as_rms_norm(module: nn.Module, threads: int) -> FusedRmsNorm | None:
    """The fused norm that computes what a module does; None if none does."""
    parameters = list(module.parameters())
    epsilons = [value for key in _EPSILONS if isinstance(value := getattr(module, key, None), float)]
    if len(parameters) != 1 or parameters[0].dim() != 1 or len(epsilons) != 1 or list(module.children()):
        return None
    if len(signature(module.forward).parameters) != 1:  # some take a gate besides
        return None
    weight = parameters[0]
    if weight is not getattr(module, "weight", None) or weight.dtype not in (
        torch.float32,
        torch.float16,
        torch.bfloat16,
    ):
        return None
    kept = weight.clone()
    weight.copy_(torch.linspace(-1.5, 2.0, len(weight)))  # not all ones, which would hide what is done with it
    try:
        # Of the weight's dtype: the sizes tell a missing epsilon and a mean that is subtracted.
        x = (torch.randn(4, len(weight)) * torch.tensor([[1e-3], [0.1], [1.0], [30.0]]) + 0.05).to(weight.dtype)
        wanted = module(x)
        for offset in _OFFSETS:
            found = FusedRmsNorm(weight, offset, epsilons[0], threads)
            got = found(x)
            if wanted.dtype == got.dtype and wanted.shape == got.shape and _near(got, wanted):
                break
        else:
            return None
    except Exception:  # a module that takes other arguments is no norm that we know
        return None
    finally:
        weight.copy_(kept)
    return FusedRmsNorm(weight, offset, epsilons[0], threads)


def _near(a: Tensor, b: Tensor) -> bool:
    """Equal up to the last place of the dtype."""
    step = torch.finfo(a.dtype).eps if a.dtype != torch.float32 else 1e-6
    return bool(((a.float() - b.float()).abs() <= 2 * step * b.float().abs() + 1e-7).all())
