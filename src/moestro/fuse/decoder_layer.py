"""One token through a decoder layer in few calls: all that stands before its experts as one, then its experts.

Known is a layer that adds attention(norm(x)) to x and experts(norm(x)) to that, as most do; which are such layers is
found by trying them on numbers. The experts' block itself is called as it is.

Legend: D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ..compute.one_token import OneTokenFirstHalf
from ..dense import PackedLinear
from .attention import FusedAttention, near
from .cache import grow
from .norm import FusedRmsNorm
from .original import forward_of, has_hooks

_ATTENTION, _BEFORE, _AFTER = "self_attn", "input_layernorm", "post_attention_layernorm"
_SCALES = (0.3, 3.0)


def fuse_decoder_layer(module: nn.Module) -> bool:
    """Give a decoder layer whose attention is fused a forward for single tokens, if it is one that we know."""
    children = dict(module.named_children())
    rest = set(children) - {_ATTENTION, _BEFORE, _AFTER}
    if len(rest) != 1 or not all(isinstance(children.get(name), FusedRmsNorm) for name in (_BEFORE, _AFTER)):
        return False
    if not isinstance(getattr(children.get(_ATTENTION), "forward", None), FusedAttention):
        return False
    if not isinstance(children[_ATTENTION].o_proj, PackedLinear):
        return False
    fused = _FusedLayer(module, rest.pop())
    if not fused.agrees():
        return False
    module.forward = fused
    return True


class _FusedLayer:
    """The forward of a recognized decoder layer."""

    def __init__(self, module: Any, rest: str) -> None:
        self._original, self._module, self._rest = forward_of(module), ref(module), rest
        self._attention: FusedAttention = getattr(module, _ATTENTION).forward
        self._skipped = [getattr(module, name) for name in (_ATTENTION, _BEFORE, _AFTER)]
        before, after = (getattr(module, name).norm for name in (_BEFORE, _AFTER))
        self._kernel = OneTokenFirstHalf(self._attention.kernel, self._attention.output.matrix, before, after)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        x = hidden_states
        if args or not self._attention.fits(x, kwargs) or has_hooks(self._skipped):
            return self._original(x, *args, **kwargs)
        grown = grow(kwargs["past_key_values"], self._attention.layer)
        if grown is None:
            return self._original(x, *args, **kwargs)
        cosine, sine = kwargs["position_embeddings"]
        module: Any = self._module()
        hidden, normed = self._kernel.run(x, cosine, sine, *grown)
        return hidden.add_(getattr(module, self._rest)(normed))

    def agrees(self) -> bool:
        """Whether it computes what the layer did, with something plain in the place of its experts."""
        module: Any = self._module()
        experts = getattr(module, self._rest)
        setattr(module, self._rest, _Halved())
        try:
            return all(self._agrees(scale) for scale in _SCALES)
        except Exception:  # it wants or returns something else
            return False
        finally:
            setattr(module, self._rest, experts)

    def _agrees(self, scale: float) -> bool:
        attention, random = self._attention, torch.Generator().manual_seed(0)
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
