"""Which steps of a model are captured, and from which captured step a step is replayed."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from inspect import signature
from time import perf_counter
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...devices.graphs import CannotCaptureError, Graphs
from ...engine.conductor import Conductor
from ...engine.watch import Watch
from ...planning.text_shape import MOST_CAPTURED
from ..hooks import HookWatch, forward_of
from .arguments import Put, collect, copied
from .cache import CacheTensors, Kept, StepCache, advance, stage, why_not
from .capture import Capture, CapturedStep, CaptureFigures, resume

logger = logging.getLogger("moestro")

_STEPS = 16  # of one cache: assisted decoding asks for steps of 1 to 16 tokens in turns
_CACHES = 4  # with captured steps
_SEEN = 64  # kinds of steps that are remembered
_CHANGES = 8  # of a model, one after another without a replay, after which nothing is captured any more


class _StepsOfCache:
    """A cache's tensors and the steps that were captured with them."""

    def __init__(self, cache: Any) -> None:
        self.bound = CacheTensors(cache)
        self.steps: OrderedDict[Any, CapturedStep] = OrderedDict()

    def references(self) -> list[int]:
        """Of each layer, how many holders of its tensors the steps are."""
        layers = self.bound.holders()
        return [sum(step.references[i] for step in self.steps.values()) for i in range(len(layers))]


def _has_static_cache(model: Any) -> bool:
    return bool(getattr(model, "_can_compile_fullgraph", False) and model._supports_default_dynamic_cache())


def can_capture(model: Any) -> bool:
    """Whether there is a cache for the model with which its steps can be captured, as far as can be seen untried."""
    return _has_static_cache(model) and why_not(StepCache(model.config, 1)) is None


class CapturedSteps:
    """A model's forward that replays decode steps. The model holds it, so it holds no model."""

    def __init__(self, model: Any, graphs: Graphs) -> None:
        self.figures = CaptureFigures()
        self._forward, self._model, self._graphs = forward_of(model), ref(model), graphs
        self._conductor: Conductor = model.moestro
        self._of_caches: list[_StepsOfCache] = []  # latest last
        self._seen: OrderedDict[Any, bool] = OrderedDict()  # kind of step -> whether it can be captured
        self._longest = 0  # tokens, of the caches that were made here
        self._watch: Watch | None = None  # of the model as it was captured
        self._changes = 0
        self._said = False
        self._hooks = HookWatch()
        self._lock = threading.Lock()
        self.__signature__ = signature(model.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        # Another thread may be in a step: then this one goes the long way.
        if isinstance(cache, StaticCache) and not torch.compiler.is_compiling() and self._lock.acquire(blocking=False):
            start_s, replays = perf_counter(), self.figures.replays
            try:
                self._conductor.device.follow()  # the stream of a step before, which may write to the cache's tensors
                output = self._step(cache, args, kwargs)
                if self.figures.replays > replays:
                    self.figures.replay_s += perf_counter() - start_s
            finally:
                self._lock.release()
            if output is not None:
                return output
        return self._forward(*args, **kwargs)

    def forget(self) -> None:
        """Forget what was captured, and ask the model for its conductor anew."""
        model: Any = self._model()
        self._conductor, self._of_caches, self._watch = model.moestro, [], None
        self._seen.clear()

    def forget_cache(self, cache: Any) -> None:
        """Forget what was captured with a cache."""
        self._of_caches = [kept for kept in self._of_caches if not kept.bound.of(cache)]

    def new_cache(self, tokens: int, most: int | None) -> StepCache | None:
        """A cache for so many tokens with which steps can be captured; None where the model has none."""
        model: Any = self._model()
        if not _has_static_cache(model):
            self._say(CannotCaptureError("Transformers has no static cache for it"))
            return None
        cache = StepCache(model.config, tokens, most)
        if cache.tokens < self._longest <= 2 * cache.tokens:  # a size that was captured, if not much is read in vain
            cache = StepCache(model.config, self._longest, most)
        reason = why_not(cache)
        if reason is not None:
            self._say(CannotCaptureError(reason))
            return None
        self._longest = max(self._longest, cache.tokens)
        return cache

    def _step(self, cache: Any, args: Any, kwargs: Any) -> Any:
        """What the model returns, if the step is captured; None where it is to go the long way."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        if not isinstance(ids, Tensor) or ids.dim() < 2 or self._is_disturbed():
            return None
        model: Any = self._model()
        if model.moestro is not self._conductor:  # another policy has taken over
            self.forget()
        rows, tokens = ids.shape[:2]
        if why_not(cache) is None and not all(layer.is_initialized for layer in cache.layers):
            self._prepare(cache, rows)
            return None
        if rows * tokens > MOST_CAPTURED:
            return None
        given: list[Tensor] = []
        try:
            kind = self._kind(cache, tokens, args, kwargs, given)
        except CannotCaptureError as error:
            self._say(error)
            kind = None
        if kind is None or not self._seen.get(kind, True):
            return None
        if kind not in self._seen:  # what a step allocates the first time, it allocates now
            self._remember(kind, True)
            return None
        if not self._is_as_captured():
            return None
        with torch.no_grad():
            return self._replayed(cache, kind, tokens, args, kwargs, given)

    def _is_as_captured(self) -> bool:
        """Whether nothing in the model was changed since its steps were captured; forgets them otherwise."""
        if self._changes > _CHANGES:
            return False
        if self._watch is None:
            model: Any = self._model()
            self._watch = Watch(*model.modules())
        if self._watch.holds():
            return True
        self._changes += 1
        if self._changes > _CHANGES:
            self._say(CannotCaptureError("something in the model changes all the time"))
        self.forget()
        return False

    def _replayed(self, cache: Any, kind: Any, tokens: int, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        """What the model returns, by replaying a captured step, which may have to be captured first."""
        kept = self._steps_of(cache)
        captured = kept.steps.get(kind)
        if captured is None:
            return self._capture(kept, cache, kind, args, kwargs, given)
        kept.steps.move_to_end(kind)
        try:
            captured.replay(self._conductor, given, self.figures)
        except BaseException:  # how far it came is not known; the cache is as after an eager step that failed
            self._of_caches.remove(kept)
            raise
        advance(cache, tokens)
        self._changes = 0
        return copied(captured.output, cache)

    def _capture(self, kept: _StepsOfCache, cache: Any, kind: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        start_s, before, holders = perf_counter(), Kept(cache), kept.bound.holders()
        capture = Capture(self._graphs, self._conductor)
        capture.captured.inputs = [tensor.clone() for tensor in given]
        put = Put(capture.captured.inputs)
        try:
            capture.run(self._forward, put(args), put(kwargs))
        except BaseException as error:
            before.put_back()
            if capture.experts_failed or not isinstance(error, Exception):
                raise
            if not isinstance(error, torch.OutOfMemoryError):  # another time there may be room
                self._remember(kind, False)
            self._say(error)
            return resume(capture.done, self._forward, args, kwargs)
        after = kept.bound.holders()
        capture.captured.references = [now - then for now, then in zip(after, holders, strict=True)]
        kept.steps[kind] = capture.captured
        if len(kept.steps) > _STEPS:
            kept.steps.popitem(last=False)
        self.figures.captures += 1
        self.figures.graphs = len(capture.captured.parts) - capture.captured.cuts
        self.figures.capture_s += perf_counter() - start_s
        return copied(capture.captured.output, cache)

    def _kind(self, cache: Any, tokens: int, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        """All that a capture of this step depends on but values of tensors, which go into `given`; None: not now.

        Raises:
            CannotCaptureError: no such step can be captured.
        """
        reason = why_not(cache)
        if reason is not None:
            raise CannotCaptureError(reason)
        windows = stage(cache, tokens)
        if windows is None:
            return None
        rest: list[Any] = []
        collect((args, kwargs), given, rest)
        mask = kwargs.get("attention_mask")
        masks = list(mask.values()) if isinstance(mask, dict) else [mask]
        if windows and not (
            isinstance(kwargs.get("position_ids"), Tensor)
            and all(isinstance(each, Tensor) and each.dim() == 4 for each in masks)
        ):
            raise CannotCaptureError("a sliding window counts in Python, and no masks and positions are given")
        model: Any = self._model()
        heard = self._conductor.must_see_layers
        guesses = self._conductor.guesses_wanted
        attention = ALL_ATTENTION_FUNCTIONS.get(getattr(model.config, "_attn_implementation", None))
        return windows, torch.is_inference_mode_enabled(), heard, guesses, attention, tuple(rest)

    def _is_disturbed(self) -> bool:
        """Whether a module inside has hooks, or the model is being trained."""
        model: Any = self._model()
        if model.training or torch.is_autocast_enabled(self._conductor.device.torch_device.type):
            return True
        return self._hooks.found_in(lambda: (module for module in model.modules() if module is not model))

    def _prepare(self, cache: Any, rows: int) -> None:
        """Before a cache's first step: give it the tensors of one that is gone, or give those back."""
        adopted = False
        for kept in [kept for kept in self._of_caches if kept.bound.is_free()]:
            adopted = not adopted and kept.bound.adopt(cache, rows, kept.references())
            if not adopted:
                self._of_caches.remove(kept)

    def _steps_of(self, cache: Any) -> _StepsOfCache:
        for kept in self._of_caches:
            if kept.bound.of(cache):
                self._of_caches.remove(kept)
                if kept.bound.restore(cache, kept.references()):
                    self._of_caches.append(kept)
                    return kept
                break
        self._of_caches = [kept for kept in self._of_caches if not kept.bound.is_free()][1 - _CACHES :]
        self._of_caches.append(_StepsOfCache(cache))
        return self._of_caches[-1]

    def _remember(self, kind: Any, capturable: bool) -> None:
        self._seen[kind] = capturable
        if len(self._seen) > _SEEN:
            self._seen.popitem(last=False)

    def _say(self, error: Exception) -> None:
        if not self._said:
            self._said = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            logger.warning("%s cannot be captured: %s; it runs eagerly", type(self._model()).__name__, reason)
