"""One recorded step: graphs, with the experts between them, and how one is made while the step runs."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

from torch import Tensor

from ..compute.devices.graphs import CannotRecordError, Graph, Graphs
from ..conductor import Conductor
from .arguments import without_cache


class Cut(NamedTuple):
    """Where the experts of a layer run between two graphs: what they are given, and where their result goes."""

    layer: int
    x: Tensor
    chosen: Tensor
    weights: Tensor
    out: Tensor


@dataclass(slots=True)
class TapeFigures:
    """What a model's recordings cost and save.

    graphs: of the latest recording. replay_s, experts_s: of all replays, on the host: the model's whole forward, and
    the part in which the conductor had the step, waiting for the device and the CPU's experts.
    """

    recordings: int = 0
    graphs: int = 0
    record_s: float = 0.0  # of all recordings, with the step itself
    replays: int = 0
    cuts: int = 0  # in all replays
    replay_s: float = 0.0
    experts_s: float = 0.0

    @property
    def host_us(self) -> float:
        """Of a layer in a replay: what the host spends outside the conductor. On CUDA that is launching graphs."""
        return (self.replay_s - self.experts_s) / self.cuts * 1e6 if self.cuts else 0.0

    @property
    def conductor_us(self) -> float:
        """Of a layer in a replay: what the conductor took, with its waits for the device and the CPU's experts."""
        return self.experts_s / self.cuts * 1e6 if self.cuts else 0.0

    def describe(self) -> str:
        """One line."""
        if not self.replays:
            return "no step was replayed"
        recorded = f"recorded in {self.record_s:.2f} s; " if self.recordings else ""
        if not self.cuts:
            return f"{self.replays} steps replayed from {self.graphs} graphs each; {recorded}no layer needs the host"
        return (
            f"{self.replays} steps replayed from {self.graphs} graphs each; {recorded}"
            f"a layer {self.host_us:.0f} us of the host beside the conductor's {self.conductor_us:.0f} us"
        )

    def to_json(self) -> dict[str, float]:
        """As `--json` prints them."""
        names = ("recordings", "graphs", "record_s", "replays", "host_us", "conductor_us")
        return {name: getattr(self, name) for name in names}

    def since(self, before: TapeFigures) -> TapeFigures:
        """What came after."""
        spent = {name: getattr(self, name) - getattr(before, name) for name in self.__slots__}
        return TapeFigures(**(spent | {"graphs": self.graphs if spent["recordings"] + spent["replays"] else 0}))


@dataclass(slots=True)
class Tape:
    """One recorded step. `output` is what the model returned, in memory that a replay writes."""

    graphs: list[Graph] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    held: list[int] = field(default_factory=list)  # experts chosen in each layer that is within a graph
    inputs: list[Tensor] = field(default_factory=list)
    output: Any = None

    def replay(self, conductor: Conductor, given: list[Tensor], figures: TapeFigures) -> None:
        """The step with other inputs, into `output`."""
        experts_s = 0.0
        for buffer, tensor in zip(self.inputs, given, strict=True):
            buffer.copy_(tensor)
        for graph, cut in zip(self.graphs, self.cuts, strict=False):
            graph.replay()
            entered_s = perf_counter()
            result = conductor.run_layer(cut.layer, cut.x, cut.chosen, cut.weights)
            experts_s += perf_counter() - entered_s
            cut.out.copy_(result)
        self.graphs[-1].replay()
        conductor.count_held(len(self.held), sum(self.held))
        figures.replays += 1
        figures.cuts += len(self.cuts)
        figures.experts_s += experts_s


class Recording:
    """A tape that is being made. The graphs so far have been replayed, so that the step goes on with real numbers."""

    def __init__(self, graphs: Graphs, conductor: Conductor) -> None:
        self.tape, self.experts_failed = Tape(), False
        self._graphs, self._conductor = graphs, conductor

    def run_layer(self, conductor: Conductor, layer: int, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """In the place of `Conductor.run_layer`: a cut, unless the layer can be recorded with what is around it."""
        if conductor is not self._conductor:
            raise CannotRecordError("it runs another model within")
        if (op := conductor.held_op(layer, x.dtype)) is not None:
            self.tape.held.append(index.numel())
            return op(x, index, weights)
        self._close()
        try:
            out = conductor.run_layer(layer, x, index, weights).clone()
        except BaseException:
            self.experts_failed = True
            raise
        self.tape.cuts.append(Cut(layer, x, index, weights, out))
        self._graphs.begin()
        return out

    def run(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Record a step. Raises what the step, its experts or the device raised."""
        self._graphs.begin()
        _OF_THREAD.recording = self
        try:
            self.tape.output = without_cache(forward(*args, **kwargs))
            self._close()
            self._conductor.count_held(len(self.tape.held), sum(self.tape.held))
        except BaseException:
            self._graphs.drop()
            raise
        finally:
            _OF_THREAD.recording = None

    def _close(self) -> None:
        graph = self._graphs.end()
        graph.replay()
        self.tape.graphs.append(graph)


class _Resumption:
    """A step that is done again from its beginning: layers whose experts have run give what they gave."""

    def __init__(self, done: list[Cut]) -> None:
        self._done = deque(done)

    def run_layer(self, conductor: Conductor, layer: int, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """In the place of `Conductor.run_layer`."""
        if self._done and self._done[0].layer == layer:
            return self._done.popleft().out
        self._done.clear()
        return conductor.run_layer(layer, x, index, weights)


class _OfThread(threading.local):
    recording: Recording | _Resumption | None = None


_OF_THREAD = _OfThread()


def current_recording() -> Recording | _Resumption | None:
    """What this thread's layers are to ask instead of the conductor, if anything."""
    return _OF_THREAD.recording


def resume(done: list[Cut], forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A step that could not be recorded, the long way; the conductor, and who listens to it, see each layer once."""
    _OF_THREAD.recording = _Resumption(done)
    try:
        return forward(*args, **kwargs)
    finally:
        _OF_THREAD.recording = None
