"""Fewer operations in a decode step: what is swapped in a loaded model whose dense part is on the CPU.

At one token a layer's small operations cost more host time than its kernels wait for memory. Norms and routers become
one call each, single-token attention two, all that stands before a layer's experts one, and layers that follow one
another, where nothing is left to decide about their experts, one together; rotary tables are kept. What is not
recognized stays as it is, and what was changed since it was recognized (engine/watch.py) goes the original way. Tokens
are the same either way.
"""

from __future__ import annotations

import torch
from torch import nn

from ...compute.cpu import levels
from ...engine.families import expert_modules
from ...engine.gates import find_router
from .attention import fuse_attention
from .decoder_layer import fuse_decoder_layer
from .experts import DirectExperts
from .norm import fuse_norm
from .rotary import fuse_rotary
from .router import fuse_router
from .stretch import fuse_stretches


@torch.no_grad()
def fuse(model: nn.Module, threads: int) -> None:
    """Swap what can be fused in a loaded model on the CPU."""
    if not levels():
        return
    training = model.training
    model.eval()
    for module in model.modules():
        fuse_norm(module, threads)
    for name, experts in expert_modules(model).items():
        experts.forward = DirectExperts(experts)
        router = find_router(model, name)
        if router is not None:
            fuse_router(router, threads)
    for module in model.modules():
        fuse_rotary(module)
        fuse_attention(module, threads)
    for module in model.modules():
        fuse_decoder_layer(module)
    fuse_stretches(model)
    model.train(training)
