"""One token through a decoder layer in few calls: all that stands before its experts as one, then its experts.

Known is a layer that adds attention(norm(x)) to x and experts(norm(x)) to that, as most do; which are such layers is
found by trying them on numbers. The experts' block is called as it is, except in a stretch (stretch.py).

Legend: D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn

from ..compute.eager import outside_of_graphs
from ..compute.one_token import OneTokenFirstHalf
from .attention import FusedAttention, near
from .cache import can_grow, grow
from .norm import FusedRmsNorm
from .original import forward_of, has_hooks

if TYPE_CHECKING:
    from .stretch import Stretch

_ATTENTION, _BEFORE, _AFTER = "self_attn", "input_layernorm", "post_attention_layernorm"
SCALES = (0.3, 3.0)  # of the numbers that a layer, or its second half, is tried on


def fuse_decoder_layer(module: nn.Module) -> bool:
    """Give a decoder layer whose attention is fused a forward for single tokens, if it is one that we know."""
    children = dict(module.named_children())
    rest = set(children) - {_ATTENTION, _BEFORE, _AFTER}
    if len(rest) != 1 or not all(isinstance(children.get(name), FusedRmsNorm) for name in (_BEFORE, _AFTER)):
        return False
    if not isinstance(getattr(children.get(_ATTENTION), "forward", None), FusedAttention):
        return False
    try:
        fused = FusedLayer(module, rest.pop())
    except ValueError:  # its parts do not fit each other
        return False
    if not fused.agrees():
        return False
    module.forward = fused
    return True


class FusedLayer:
    """The forward of a recognized decoder layer."""

    def __init__(self, module: Any, rest: str) -> None:
        self._original, self._module, self._rest = forward_of(module), ref(module), rest
        self.attention: FusedAttention = getattr(module, _ATTENTION).forward
        self.skipped = [getattr(module, name) for name in (_ATTENTION, _BEFORE, _AFTER)]
        before, after = (getattr(module, name).norm for name in (_BEFORE, _AFTER))
        self.kernel = OneTokenFirstHalf(self.attention.kernel, self.attention.output.matrix, before, after)
        self._stretch: Stretch | None = None
        self._place = 0  # in the stretch

    def join(self, stretch: Stretch, place: int) -> None:
        """Be one of the layers that go together where they can."""
        self._stretch, self._place = stretch, place

    @property
    def block(self) -> nn.Module:
        """What stands behind the first half."""
        block: nn.Module = getattr(self._module(), self._rest)
        return block

    @outside_of_graphs
    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        x = hidden_states
        if self._stretch is not None and not args:
            out = self._stretch.run(self._place, x, kwargs)
            if out is not None:
                return out
        cache, index = kwargs.get("past_key_values"), self.attention.layer
        if args or not self.attention.fits(x, kwargs) or has_hooks(self.skipped):
            return self._original(x, *args, **kwargs)
        if not can_grow(cache, index, self.attention.cache_kind):
            return self._original(x, *args, **kwargs)
        cosine, sine = kwargs["position_embeddings"]
        hidden, normed = self.kernel.run(x, cosine, sine, *grow(cache, index))
        return hidden.add_(self.block(normed))

    def agrees(self) -> bool:
        """Whether it computes what the layer did, with something plain in the place of its experts."""
        module: Any = self._module()
        block = self.block
        setattr(module, self._rest, _Halved())
        try:
            return all(self._agrees(scale) for scale in SCALES)
        except Exception:  # it wants or returns something else
            return False
        finally:
            setattr(module, self._rest, block)

    def _agrees(self, scale: float) -> bool:
        attention, random = self.attention, torch.Generator().manual_seed(0)
        x, rotary, caches = attention.trial(scale, random)
        forwards: tuple[Callable[..., Any], ...] = (self, self._original)
        results = [
            forward(x, attention_mask=None, past_key_values=cache, position_embeddings=rotary)
            for forward, cache in zip(forwards, caches, strict=True)
        ]
        layers = [cache.layers[attention.layer] for cache in caches]
        pairs = [results, [layer.keys for layer in layers], [layer.values for layer in layers]]
        return all(isinstance(b, Tensor) and near(a, b) for a, b in pairs)


class _Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5
