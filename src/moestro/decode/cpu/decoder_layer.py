"""Few tokens through a decoder layer in few calls: all that stands before its experts as one, then its experts.

Known is a layer that adds attention(norm(x)) to x and experts(norm(x)) to that, as most do; which are such layers is
found by trying them on numbers. The experts' block is called as it is, except in a stretch (stretch.py).

Legend: D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...compute.eager import outside_of_graphs
from ...compute.few_tokens import StepFirstHalf
from ..hooks import Fused, has_hooks, put_in_place
from .attention import TRIALS, FusedAttention, Trial, near, rotary_of
from .cache import can_grow, grow, shrink
from .norm import norm_of

_ATTENTION, _BEFORE, _AFTER = "self_attn", "input_layernorm", "post_attention_layernorm"
SCALES = (0.3, 3.0)  # of the numbers that a layer, or its second half, is tried on


def fuse_decoder_layer(module: nn.Module) -> bool:
    """Give a decoder layer whose attention is fused a forward for few tokens, if it is one that we know."""
    children = dict(module.named_children())
    rest = set(children) - {_ATTENTION, _BEFORE, _AFTER}
    if len(rest) != 1 or not all(norm_of(children.get(name)) for name in (_BEFORE, _AFTER)):
        return False
    if not isinstance(getattr(children.get(_ATTENTION), "forward", None), FusedAttention):
        return False
    try:
        fused = FusedLayer(module, rest.pop())
    except ValueError:  # its parts do not fit each other
        return False
    if not fused.agrees():
        return False
    put_in_place(module, fused, module, *fused.skipped, *fused.attention.parts)
    return True


class FusedLayer(Fused):
    """The forward of a recognized decoder layer."""

    def __init__(self, module: Any, rest: str) -> None:
        super().__init__(module)
        self._rest = rest
        self.attention: FusedAttention = getattr(module, _ATTENTION).forward
        self.skipped = [getattr(module, name) for name in (_ATTENTION, _BEFORE, _AFTER)]
        before, after = (getattr(module, name).forward.norm for name in (_BEFORE, _AFTER))
        self.kernel = StepFirstHalf(self.attention.kernel, self.attention.output.matrix, before, after)
        self._together: Callable[[Tensor, Mapping[str, Any]], Tensor | None] | None = None

    def join(self, together: Callable[[Tensor, Mapping[str, Any]], Tensor | None]) -> None:
        """Be one of several layers that are computed in one call where they can be.

        Args:
            together: takes the hidden states and the other arguments; returns what the layer is to return, or None
                where it has to be computed by itself.
        """
        self._together = together

    @property
    def block(self) -> nn.Module:
        """What stands behind the first half."""
        block: nn.Module = getattr(self._find(), self._rest)
        return block

    @outside_of_graphs
    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        x = hidden_states
        if self._together is not None and not args and (out := self._together(x, kwargs)) is not None:
            return out
        if args or not self._fits(x, kwargs) or (seen := self.attention.seen(x, kwargs)) is None:
            return self._original(x, *args, **kwargs)
        return self._run(x, kwargs["past_key_values"], kwargs["position_embeddings"], seen)

    def _fits(self, x: Tensor, given: Mapping[str, Any]) -> bool:
        """Whether the layer and its first half are what they were, without hooks, and the arguments were tried."""
        attention = self.attention
        return (
            attention.takes(x, given)
            and can_grow(given["past_key_values"], attention.layer, attention.cache_kind, x.shape[0])
            and not has_hooks((*self.skipped, *attention.parts))
            and self.watch is not None
            and self.watch.holds()
        )

    def _run(self, x: Tensor, cache: Any, rotary: tuple[Tensor, Tensor], seen: Tensor) -> Tensor:
        index, new = self.attention.layer, x.shape[1]
        grown = grow(cache, index, new)
        try:
            hidden, normed = self.kernel.run(x, *rotary_of(x, rotary), *grown, seen)
        except BaseException:  # an interrupt: the cache may not keep tokens that were never written
            shrink(cache, index, new)
            raise
        return hidden.add_(self.block(normed))

    def agrees(self) -> bool:
        """Whether it computes what the layer did, with something plain in the place of its experts."""
        module: Any = self._find()
        block = self.block
        setattr(module, self._rest, _Halved())
        try:
            of_one = all(self._agrees(turn, scale, Trial(1, 1)) for turn, scale in enumerate(SCALES))
            if of_one and not all(
                self._agrees(0, SCALES[0], trial) for trial in TRIALS if self.attention.most_tokens > 1
            ):
                self.attention.most_tokens = 1
            return of_one
        except Exception:  # it wants or returns something else
            return False
        finally:
            setattr(module, self._rest, block)

    def _agrees(self, turn: int, scale: float, of: Trial) -> bool:
        attention, random = self.attention, torch.Generator().manual_seed(0)
        x, rotary, (ours, theirs) = attention.trial(scale, random, of)
        given = {"attention_mask": attention.trial_mask(of), "position_embeddings": rotary} | attention.more(turn)
        seen = attention.seen(x, given | {"past_key_values": ours})
        assert seen is not None
        results = self._run(x, ours, rotary, seen), self._original(x, past_key_values=theirs, **given)
        layers = [cache.layers[attention.layer] for cache in (ours, theirs)]
        pairs = [results, [layer.keys for layer in layers], [layer.values for layer in layers]]
        return all(isinstance(b, Tensor) and near(a, b) for a, b in pairs)


class _Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5
