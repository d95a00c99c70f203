"""Which steps of a model are recorded, and which recording a step is replayed from."""

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

from ...devices.graphs import CannotRecordError, Graphs
from ...engine.conductor import Conductor
from ...engine.watch import Watch
from ..hooks import HookWatch, forward_of
from .arguments import Put, collect, copied
from .cache import Bound, Kept, StepCache, advance, stage, why_not
from .recording import Recording, Tape, TapeFigures, resume

logger = logging.getLogger("moestro")

MAX_TOKENS = 8  # of a step, over its sequences
_TAPES = 8  # of one cache: assisted decoding asks for steps of 2 to 8 tokens in turns
_CACHES = 4  # with tapes
_SEEN = 64  # kinds of steps that are remembered
_CHANGES = 8  # of a model, one after another without a replay, after which nothing is recorded any more


class _Taped:
    """A cache's tensors and the steps that were recorded with them."""

    def __init__(self, cache: Any) -> None:
        self.bound = Bound(cache)
        self.tapes: OrderedDict[Any, Tape] = OrderedDict()

    def references(self) -> list[int]:
        """Of each layer, how many holders of its tensors the tapes are."""
        layers = self.bound.holders()
        return [sum(tape.references[i] for tape in self.tapes.values()) for i in range(len(layers))]


class StepTape:
    """A model's forward that replays decode steps. The model holds it, so it holds no model."""

    def __init__(self, model: Any, graphs: Graphs) -> None:
        self.figures = TapeFigures()
        self._forward, self._model, self._graphs = forward_of(model), ref(model), graphs
        self._conductor: Conductor = model.moestro
        self._taped: list[_Taped] = []  # latest last
        self._seen: OrderedDict[Any, bool] = OrderedDict()  # kind of step -> whether it can be recorded
        self._longest = 0  # tokens, of the caches that were made here
        self._watch: Watch | None = None  # of the model as it was recorded
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
        """Forget what was recorded, and ask the model who conducts it now."""
        model: Any = self._model()
        self._conductor, self._taped, self._watch = model.moestro, [], None
        self._seen.clear()

    def forget_cache(self, cache: Any) -> None:
        """Forget what was recorded with a cache."""
        self._taped = [taped for taped in self._taped if not taped.bound.of(cache)]

    def new_cache(self, tokens: int, most: int | None) -> StepCache | None:
        """A cache for so many tokens with which steps can be recorded; None where the model has none."""
        model: Any = self._model()
        if not (getattr(model, "_can_compile_fullgraph", False) and model._supports_default_dynamic_cache()):
            self._say(CannotRecordError("Transformers has no static cache for it"))
            return None
        cache = StepCache(model.config, tokens, most)
        if cache.tokens < self._longest <= 2 * cache.tokens:  # a size that was recorded, if not much is read in vain
            cache = StepCache(model.config, self._longest, most)
        reason = why_not(cache)
        if reason is not None:
            self._say(CannotRecordError(reason))
            return None
        self._longest = max(self._longest, cache.tokens)
        return cache

    def _step(self, cache: Any, args: Any, kwargs: Any) -> Any:
        """What the model returns, if the step is recorded; None where it is to go the long way."""
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
        if rows * tokens > MAX_TOKENS:
            return None
        given: list[Tensor] = []
        try:
            kind = self._kind(cache, tokens, args, kwargs, given)
        except CannotRecordError as error:
            self._say(error)
            kind = None
        if kind is None or not self._seen.get(kind, True):
            return None
        if kind not in self._seen:  # what a step allocates the first time, it allocates now
            self._remember(kind, True)
            return None
        if not self._is_as_recorded():
            return None
        with torch.no_grad():
            return self._recorded(cache, kind, tokens, args, kwargs, given)

    def _is_as_recorded(self) -> bool:
        """Whether nothing in the model was changed since its steps were recorded; forgets them otherwise."""
        if self._changes > _CHANGES:
            return False
        if self._watch is None:
            model: Any = self._model()
            self._watch = Watch(*model.modules())
        if self._watch.holds():
            return True
        self._changes += 1
        if self._changes > _CHANGES:
            self._say(CannotRecordError("something in the model changes all the time"))
        self.forget()
        return False

    def _recorded(self, cache: Any, kind: Any, tokens: int, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        """The same from a tape, which may have to be made first."""
        taped = self._taped_of(cache)
        tape = taped.tapes.get(kind)
        if tape is None:
            return self._record(taped, cache, kind, args, kwargs, given)
        taped.tapes.move_to_end(kind)
        try:
            tape.replay(self._conductor, given, self.figures)
        except BaseException:  # nobody knows how far it came; the cache is as after an eager step that failed
            self._taped.remove(taped)
            raise
        advance(cache, tokens)
        self._changes = 0
        return copied(tape.output, cache)

    def _record(self, taped: _Taped, cache: Any, kind: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        start_s, before, holders = perf_counter(), Kept(cache), taped.bound.holders()
        recording = Recording(self._graphs, self._conductor)
        recording.tape.inputs = [tensor.clone() for tensor in given]
        put = Put(recording.tape.inputs)
        try:
            recording.run(self._forward, put(args), put(kwargs))
        except BaseException as error:
            before.put_back()
            if recording.experts_failed or not isinstance(error, Exception):
                raise
            if not isinstance(error, torch.OutOfMemoryError):  # another time there may be room
                self._remember(kind, False)
            self._say(error)
            return resume(recording.done, self._forward, args, kwargs)
        after = taped.bound.holders()
        recording.tape.references = [now - then for now, then in zip(after, holders, strict=True)]
        taped.tapes[kind] = recording.tape
        if len(taped.tapes) > _TAPES:
            taped.tapes.popitem(last=False)
        self.figures.recordings += 1
        self.figures.graphs = len(recording.tape.parts) - recording.tape.cuts
        self.figures.record_s += perf_counter() - start_s
        return copied(recording.tape.output, cache)

    def _kind(self, cache: Any, tokens: int, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        """All that a recording of this step depends on but values of tensors, which go into `given`; None: not now.

        Raises:
            CannotRecordError: no such step can be recorded.
        """
        reason = why_not(cache)
        if reason is not None:
            raise CannotRecordError(reason)
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
            raise CannotRecordError("a sliding window counts in Python, and no masks and positions are given")
        model: Any = self._model()
        heard = self._conductor.must_see_layers
        guesses = self._conductor.guesses_wanted
        attention = ALL_ATTENTION_FUNCTIONS.get(getattr(model.config, "_attn_implementation", None))
        return windows, torch.is_inference_mode_enabled(), heard, guesses, attention, tuple(rest)

    def _is_disturbed(self) -> bool:
        """Whether somebody listens to a module inside, or the model is being trained."""
        model: Any = self._model()
        if model.training or torch.is_autocast_enabled(self._conductor.device.torch_device.type):
            return True
        return self._hooks.found_in(lambda: (module for module in model.modules() if module is not model))

    def _prepare(self, cache: Any, rows: int) -> None:
        """Before a cache's first step: give it the tensors of one that is gone, or give those back."""
        adopted = False
        for taped in [taped for taped in self._taped if taped.bound.is_free()]:
            adopted = not adopted and taped.bound.adopt(cache, rows, taped.references())
            if not adopted:
                self._taped.remove(taped)

    def _taped_of(self, cache: Any) -> _Taped:
        for taped in self._taped:
            if taped.bound.of(cache):
                self._taped.remove(taped)
                if taped.bound.restore(cache, taped.references()):
                    self._taped.append(taped)
                    return taped
                break
        self._taped = [taped for taped in self._taped if not taped.bound.is_free()][1 - _CACHES :]
        self._taped.append(_Taped(cache))
        return self._taped[-1]

    def _remember(self, kind: Any, recordable: bool) -> None:
        self._seen[kind] = recordable
        if len(self._seen) > _SEEN:
            self._seen.popitem(last=False)

    def _say(self, error: Exception) -> None:
        if not self._said:
            self._said = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            logger.warning("%s cannot be recorded: %s; it runs eagerly", type(self._model()).__name__, reason)
