"""Few tokens through a stretch of decoder layers in one call: where there is nothing to decide about their experts.

In decode the weights that stream by drive the interpreter and torch's small operations out of the caches, so that what
Python does between two layers costs as much as a fifth of their kernels. Where each layer's second half is a router
and experts, no more, and these are all in RAM with no slots to move them to, the first layer of a stretch computes all
of it, and the others pass on what they are given.

Nothing may happen between the layers: that is found by calling the model's loop with layers that only note what they
are given. Where a module inside has a hook, or anything in a layer was changed, replaced or left out, all go layer by
layer as before; a layer that is called by itself gives its own result.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import pairwise
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ...compute.few_tokens import StepLayer, StepLayers, StepRouter
from ...engine.conductor import Conductor
from ...engine.watch import Watch
from ...errors import ModelError
from ..hooks import Fused, HookWatch, put_in_place
from .attention import FusedAttention, rotary_of
from .cache import can_grow, grow, length_of, shrink
from .decoder_layer import SCALES, FusedLayer
from .router import FusedRouter

_MARKS = ("sliding_window", "is_sliding", "attention_type", "layer_type")  # by which families tell layers apart


def fuse_stretches(model: nn.Module) -> None:
    """Join consecutive decoder layers that are fused already."""
    for decoder in model.modules():
        for layers in decoder.children():
            if isinstance(layers, nn.ModuleList) and any(isinstance(layer.forward, FusedLayer) for layer in layers):
                _join(decoder, layers)


class _Loop(Fused):
    """A decoder's own forward, in which alone its stretches run: a layer that is called by itself gives its own result.

    Held by the decoder, so it holds neither that nor its layers.
    """

    def __init__(self, decoder: Any) -> None:
        super().__init__(decoder)
        self._of_thread = threading.local()
        self.__signature__ = signature(decoder.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or self.watch is None or not self.watch.holds():
            return self._original(*args, **kwargs)
        self._of_thread.runs = True
        try:
            return self._original(*args, **kwargs)
        finally:
            self._of_thread.runs = False

    def runs(self) -> bool:
        """Whether this thread is in it, and it goes through the layers that it went through at first."""
        return getattr(self._of_thread, "runs", False)


class Stretch:
    """Some consecutive layers of a decoder. Its layers hold it, so it holds none of them."""

    def __init__(self, layers: Sequence[_WholeLayer], loop: _Loop) -> None:
        self._attentions = [layer.attention for layer in layers]
        self._conductor, self._last, self._loop = layers[0].conductor, len(layers) - 1, loop
        self._kernel = StepLayers([layer.kernel for layer in layers])
        self._parts = [part for layer in layers for part in layer.parts]
        self._layers = [ref(layer.module) for layer in layers]
        self.watch: Watch | None = None  # of all layers, when they are in their places
        self._hooks = HookWatch()

    def note(self) -> None:
        """Note what the layers are now."""
        self.watch = Watch(*self._modules())

    def _modules(self) -> list[nn.Module]:
        """The layers and what they pass by inside."""
        return [*(layer for find in self._layers if (layer := find()) is not None), *self._parts]

    def run(self, place: int, x: Tensor, given: Mapping[str, Any]) -> Tensor | None:
        """What a layer returns, if the stretch is computed at once: all layers' result at the first; None if not.

        Args:
            place: which layer of the stretch is called.

        Raises:
            ModelError: the model treats a later layer otherwise than the first one.
        """
        if not self._loop.runs():
            return None
        if place:
            return self._pass_on(place, x, given)
        if not self._attentions[0].takes(x, given) or self.watch is None or not self.watch.holds():
            return None
        if self._hooks.found_in(self._modules):
            return None
        if self._conductor.must_see_layers or self._conductor.accounts.wants_shown(self._attentions[0].layer):
            return None
        cache, (sequences, new) = given["past_key_values"], x.shape[:2]
        if not all(can_grow(cache, one.layer, one.cache_kind, sequences) for one in self._attentions):
            return None
        if len({length_of(cache, one.layer) for one in self._attentions}) > 1:
            return None
        if (seen := self._attentions[0].seen(x, given)) is None:
            return None
        grown: list[tuple[Tensor, Tensor]] = []
        try:
            for attention in self._attentions:
                grown.append(grow(cache, attention.layer, new))
            rotary = rotary_of(x, given["position_embeddings"])
            hidden, experts, chosen = self._kernel.run(x, *rotary, grown, seen)
        except BaseException:  # an interrupt: no cache may keep tokens that were never written
            for attention, _ in zip(self._attentions, grown, strict=False):
                shrink(cache, attention.layer, new)
            raise
        self._conductor.count_only_choice(len(grown), experts, chosen, sequences * new)
        if self._last:
            done = self, given.get("attention_mask")
            hidden._moestro_done = done  # type: ignore[attr-defined]  # on the tensor, since other threads may generate
        return hidden

    def _pass_on(self, place: int, x: Tensor, given: Mapping[str, Any]) -> Tensor | None:
        stretch, mask = getattr(x, "_moestro_done", (None, None))
        if stretch is not self:
            return None
        if given.get("attention_mask") is not mask:
            raise ModelError("layers were given different masks, which is not known here; load with fuse=False")
        if place == self._last:
            del x._moestro_done  # type: ignore[attr-defined]
        return x


@dataclass(frozen=True, slots=True)
class _WholeLayer:
    """A decoder layer whose second half is a router and experts, no more, about which there is nothing to decide.

    parts: the modules inside that it passes by. kind: what its family says of it.
    """

    module: nn.Module
    kernel: StepLayer
    attention: FusedAttention
    conductor: Conductor
    parts: list[nn.Module]
    kind: list[Any]

    @classmethod
    def of(cls, module: Any) -> _WholeLayer | None:
        """The layer, if its second half is a router and experts alone; else None."""
        fused = module.forward
        if not isinstance(fused, FusedLayer):
            return None
        block = fused.block
        children = list(block.children())
        routers: list[Any] = [child for child in children if isinstance(child.forward, FusedRouter)]
        experts: list[Any] = [child for child in children if hasattr(child, "_moestro")]
        if not len(children) - 1 == len(routers) == len(experts) == 1:
            return None
        router: StepRouter = routers[0].forward.kernel
        conductor, index = experts[0]._moestro.conductor, experts[0]._moestro.index
        choice = conductor.only_choice(index)
        if choice is None or router.dtype != fused.attention.dtype or not _only_routes(block, experts[0], router):
            return None
        try:
            kernel = StepLayer(fused.kernel, router, *choice)
        except ValueError:  # its parts do not fit each other
            return None
        parts = [*fused.skipped, *fused.attention.parts, *block.modules()]
        kind = [getattr(part, mark, None) for part in (module, fused.skipped[0]) for mark in _MARKS]
        return cls(module, kernel, fused.attention, conductor, parts, kind)

    def like(self, other: _WholeLayer) -> bool:
        """Whether a step that one of two layers can compute, the other can too."""
        a, b = self.attention, other.attention
        ours, theirs = ((one.dtype, one.head, one.width, one.most_tokens) for one in (a, b))
        return (ours, self.kind) == (theirs, other.kind)


def _only_routes(block: Any, experts: Any, router: StepRouter) -> bool:
    """Whether a block gives its experts what it was given and the router's choice, and returns what they return."""
    seen: list[Tensor] = []
    original, random = experts.forward, torch.Generator().manual_seed(0)

    def stand_in(x: Tensor, index: Tensor, scores: Tensor) -> Tensor:
        seen.extend((x, index, scores))
        return x * 0.37 + scores.sum().to(x.dtype)

    experts.forward = stand_in
    try:
        for scale in SCALES:
            seen.clear()
            shape = (1, 1) if scale == SCALES[0] else (2, 3)
            x = torch.randn(*shape, router.width, generator=random).mul_(scale).to(router.dtype)
            _, scores, index = router.run(x)
            flat = x.view(-1, router.width)
            got, wanted = block(x), stand_in(flat, index, scores).view_as(x)
            pairs = zip((got, *seen[:3]), (wanted, flat, index, scores), strict=True)
            if not all(isinstance(a, Tensor) and torch.equal(a, b) for a, b in pairs):
                return False
    except Exception:  # it wants or returns something else
        return False
    finally:
        experts.forward = original
    return True


def _join(decoder: Any, modules: Any) -> None:
    """Give the layers of a decoder the stretches that they are part of."""
    whole = [_WholeLayer.of(module) for module in modules]
    known = next((layer for layer in whole if layer is not None), None)
    if known is None:
        return
    joined = _nothing_between(decoder, modules, known.attention)
    loop, first = _Loop(decoder), 0
    for index, layer in enumerate(whole):
        after = whole[index + 1] if index + 1 < len(whole) else None
        if layer is None:
            first = index + 1
        elif after is None or not joined[index] or not layer.like(after):
            members = [member for member in whole[first : index + 1] if member is not None]
            stretch = Stretch(members, loop)
            for place in range(len(members)):
                modules[first + place].forward.join(partial(stretch.run, place))
            stretch.note()
            first = index + 1
    put_in_place(decoder, loop, decoder, modules)


def _nothing_between(decoder: Any, modules: Any, attention: FusedAttention) -> list[bool]:
    """Of each layer but the last: whether the next one is given what it returned, and all else the same."""
    calls: list[tuple[int, Tensor, dict[str, Any], Tensor]] = []
    forwards = [vars(module).get("forward") for module in modules]
    none = [False] * (len(modules) - 1)

    def note(index: int, hidden_states: Tensor, **given: Any) -> Tensor:
        calls.append((index, hidden_states, given, hidden_states + 1))
        return calls[-1][3]

    random, cache = torch.Generator().manual_seed(0), DynamicCache()
    for index, module in enumerate(modules):
        cache.update(*attention.past(1.0, random), index)
        module.forward = partial(note, index)
    try:
        decoder(input_ids=torch.zeros(1, 1, dtype=torch.int64), past_key_values=cache, use_cache=True)
    except Exception:  # it wants something else
        return none
    finally:
        for module, forward in zip(modules, forwards, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward
    if [index for index, *_ in calls] != list(range(len(modules))):
        return none
    return [
        after[1] is before[3]
        and after[2].keys() == before[2].keys()
        and all(after[2][name] is value for name, value in before[2].items())
        for before, after in pairwise(calls)
    ]
