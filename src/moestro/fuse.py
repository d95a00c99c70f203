"""Fewer operations in a decode step: what is swapped in a loaded model whose dense part is on the CPU.

At one token a layer's small operations cost more host time than its kernels wait for memory. Norms become one call
each and single-token attention two; what is not recognized stays as it is. Tokens are the same either way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .attention import fuse_attention
from .compute.cpu import levels
from .families import expert_modules
from .fused_norm import as_rms_norm
from .routers import find_router

_FEW_TOKENS = 4


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
        norm = as_rms_norm(module, threads)
        if norm is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, norm)
    for module in model.modules():
        fuse_attention(module, threads)


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
