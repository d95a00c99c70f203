"""Root-mean-square norms as one call each, instead of eight operations: swapped in where they compute the same.

Which modules are such norms is found by trying them on numbers, not by a table of families. The module stays; its
forward is replaced, and reads the module's weight where it lies.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ...compute.cpu import rms_norm
from ...compute.eager import outside_of_graphs
from ...compute.few_tokens import Norm
from ...memory.formats import FLOAT_FORMATS
from ..hooks import Fused, put_in_place

_EPSILONS = ("variance_epsilon", "eps", "epsilon")  # what families call it
_OFFSETS = (0.0, 1.0)  # norm(x) * w, and norm(x) * (1 + w)


class FusedNorm(Fused):
    """The forward of a recognized norm: norm(x) * weight, or norm(x) * (1 + weight), in one pass over x."""

    def __init__(self, module: nn.Module, norm: Norm, threads: int) -> None:
        super().__init__(module)
        self.norm, self._threads = norm, threads

    @outside_of_graphs
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """[..., D] -> [..., D]."""
        if kwargs or len(args) != 1 or not self._fits(args[0]):
            return self._original(*args, **kwargs)
        return self.run(args[0])

    def run(self, x: Tensor) -> Tensor:
        """The norm of an x that fits."""
        return rms_norm(x.contiguous(), *self.norm, threads=self._threads)

    def _fits(self, x: Any) -> bool:
        """Whether it is what was tried: a tensor of the weight's dtype and width, on the CPU, without gradients."""
        weight = self.norm.weight
        return (
            isinstance(x, Tensor)
            and x.dtype == weight.dtype
            and x.shape[-1:] == weight.shape
            and x.device.type == "cpu"
            and not x.requires_grad
            and self.watch is not None
            and self.watch.holds()
        )


def norm_of(module: Any) -> FusedNorm | None:
    """The fused forward of a norm; None of other modules, and of none."""
    forward = getattr(module, "forward", None)
    return forward if isinstance(forward, FusedNorm) else None


@torch.no_grad()
def fuse_norm(module: nn.Module, threads: int) -> bool:
    """Give a norm a forward of one call, if it is one that we know; says whether it is."""
    norm = _recognize(module, threads)
    if norm is not None:
        put_in_place(module, FusedNorm(module, norm, threads), module)
    return norm is not None


def _recognize(module: nn.Module, threads: int) -> Norm | None:
    parameters = list(module.parameters())
    epsilons = [value for key in _EPSILONS if isinstance(value := getattr(module, key, None), float)]
    if len(parameters) != 1 or parameters[0].dim() != 1 or len(epsilons) != 1 or list(module.children()):
        return None
    if len(signature(module.forward).parameters) != 1:  # some take a gate besides
        return None
    weight = parameters[0]
    if weight is not getattr(module, "weight", None) or weight.dtype not in FLOAT_FORMATS or not len(weight):
        return None
    if weight.device.type != "cpu" or not weight.is_contiguous():
        return None
    kept = weight.clone()
    weight.copy_(torch.linspace(-1.5, 2.0, len(weight)))  # not all ones, which would hide what is done with it
    try:
        # Of the weight's dtype: the sizes tell a missing epsilon and a mean that is subtracted.
        x = (
            torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0))
            * torch.tensor([[1e-3], [0.1], [1.0], [30.0]])
            + 0.05
        ).to(weight.dtype)
        wanted = module(x)
        for offset in _OFFSETS:
            norm = Norm(weight.detach(), offset, epsilons[0])
            got = rms_norm(x, *norm, threads=threads)
            if wanted.dtype == got.dtype and wanted.shape == got.shape and _near(got, wanted):
                return norm
    except Exception:  # a module that takes other arguments is no norm that we know
        return None
    finally:
        weight.copy_(kept)
    return None


def _near(a: Tensor, b: Tensor) -> bool:
    """Equal up to the last place of the dtype."""
    step = torch.finfo(a.dtype).eps if a.dtype != torch.float32 else 1e-6
    return bool(((a.float() - b.float()).abs() <= 2 * step * b.float().abs() + 1e-7).all())
