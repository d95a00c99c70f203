"""Root-mean-square norms as one call each, instead of eight operations: swapped in where they compute the same.

Which modules are such norms is found by trying them on numbers, not by a table of families.
"""

from __future__ import annotations

from inspect import signature

import torch
from torch import Tensor, nn

from ..compute.cpu import rms_norm
from ..compute.one_token import Norm
from ..errors import refuse_gradients
from ..memory.formats import FLOAT_FORMATS

_EPSILONS = ("variance_epsilon", "eps", "epsilon")  # what families call it
_OFFSETS = (0.0, 1.0)  # norm(x) * w, and norm(x) * (1 + w)


class FusedRmsNorm(nn.Module):
    """norm(x) * weight, or norm(x) * (1 + weight), in one pass over x."""

    def __init__(self, weight: nn.Parameter, offset: float, epsilon: float, threads: int) -> None:
        super().__init__()
        self.weight, self.threads = weight, threads
        self.norm = Norm(weight.detach().float(), offset, epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        refuse_gradients(x)
        return rms_norm(x.contiguous(), *self.norm, threads=self.threads)


@torch.no_grad()
def as_rms_norm(module: nn.Module, threads: int) -> FusedRmsNorm | None:
    """The fused norm that computes what a module does; None if none does."""
    parameters = list(module.parameters())
    epsilons = [value for key in _EPSILONS if isinstance(value := getattr(module, key, None), float)]
    if len(parameters) != 1 or parameters[0].dim() != 1 or len(epsilons) != 1 or list(module.children()):
        return None
    if len(signature(module.forward).parameters) != 1:  # some take a gate besides
        return None
    weight = parameters[0]
    if weight is not getattr(module, "weight", None) or weight.dtype not in FLOAT_FORMATS:
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
