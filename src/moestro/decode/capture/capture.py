"""One captured step: graphs, with the experts between them, and how one is made while the step runs."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...devices import LayerPort
from ...devices.graphs import CannotCaptureError, Graph, Graphs
from ...engine.conductor import Conductor
from ...engine.counters import new_counts
from ...engine.steps import size_of
from .arguments import without_cache


class Cut(NamedTuple):
    """Where the experts of a layer run between two graphs."""

    layer: int
    port: LayerPort


@dataclass(slots=True)
class CaptureFigures:
    """What a model's captures cost and save.

    graphs: of the latest capture. replay_s, cpu_s, waited_s: of all replays, on the host: the model's whole forward,
    of which the CPU computed experts, and waited for the device or the link.
    """

    captures: int = 0
    graphs: int = 0
    capture_s: float = 0.0  # of all captures, with the step itself
    replays: int = 0
    cuts: int = 0  # in all replays
    replay_s: float = 0.0
    cpu_s: float = 0.0
    waited_s: float = 0.0

    @property
    def host_us(self) -> float:
        """Of a layer in a replay: what the host takes to decide, launch and account, without `cpu_us` and `wait_us`."""
        return (self.replay_s - self.cpu_s - self.waited_s) / self.cuts * 1e6 if self.cuts else 0.0

    @property
    def cpu_us(self) -> float:
        """Of a layer in a replay: experts on the CPU, handing them to the kernels included."""
        return self.cpu_s / self.cuts * 1e6 if self.cuts else 0.0

    @property
    def wait_us(self) -> float:
        """Of a layer in a replay: the host waits for the device or the link."""
        return self.waited_s / self.cuts * 1e6 if self.cuts else 0.0

    def describe(self) -> str:
        """One line."""
        if not self.replays:
            return "no step was replayed"
        captured = f"captured in {self.capture_s:.2f} s; " if self.captures else ""
        if not self.cuts:
            return f"{self.replays} steps replayed from {self.graphs} graphs each; {captured}no layer needs the host"
        return (
            f"{self.replays} steps replayed from {self.graphs} graphs each; {captured}"
            f"a layer {self.host_us:.0f} us of the host, {self.cpu_us:.0f} us of experts on the CPU and "
            f"{self.wait_us:.0f} us of waiting"
        )

    def to_json(self) -> dict[str, float]:
        """As `--json` prints them."""
        names = ("captures", "graphs", "capture_s", "replays", "host_us", "cpu_us", "wait_us")
        return {name: getattr(self, name) for name in names}

    def since(self, before: CaptureFigures) -> CaptureFigures:
        """What came after."""
        spent = {name: getattr(self, name) - getattr(before, name) for name in self.__slots__}
        return CaptureFigures(**(spent | {"graphs": self.graphs if spent["captures"] + spent["replays"] else 0}))


@dataclass(slots=True)
class CapturedStep:
    """One captured step.

    output: what the model returned, in memory that a replay writes. references: of each layer of the cache, how many
    holders of its tensors the graphs are.
    """

    chosen: Tensor  # where layers that are within a graph count what they choose
    parts: list[Graph | Cut] = field(default_factory=list)
    held: int = 0  # how many these layers are
    tokens: int = 0  # over all sequences
    inputs: list[Tensor] = field(default_factory=list)
    output: Any = None
    references: list[int] = field(default_factory=list)

    @property
    def cuts(self) -> int:
        """Layers between graphs."""
        return sum(isinstance(part, Cut) for part in self.parts)

    def replay(self, conductor: Conductor, given: list[Tensor], figures: CaptureFigures) -> None:
        """Do the step with other inputs, into `output`."""
        conductor.begin_unless_announced(self.tokens)
        cpu_s, waited_s = conductor.host_s
        for buffer, tensor in zip(self.inputs, given, strict=True):
            buffer.copy_(tensor)
        for part in self.parts:
            if isinstance(part, Cut):
                conductor.run_port(part.layer, part.port)
            else:
                part.replay()
        self.count_held(conductor)
        now_cpu_s, now_waited_s = conductor.host_s
        figures.replays += 1
        figures.cuts += self.cuts
        figures.cpu_s += now_cpu_s - cpu_s
        figures.waited_s += now_waited_s - waited_s

    def count_held(self, conductor: Conductor) -> None:
        """Account for the layers within graphs, once these have run."""
        if self.held:
            conductor.count_held(self.held, self.chosen)


class Capture:
    """A step that is being captured. The graphs so far have been replayed, so that it goes on with real numbers."""

    def __init__(self, graphs: Graphs, conductor: Conductor) -> None:
        self.captured, self.experts_failed = CapturedStep(new_counts(conductor.device.torch_device)), False
        self.done: list[tuple[int, Tensor]] = []  # layers whose experts have run, and what these gave
        self._graphs, self._conductor = graphs, conductor
        device = conductor.device.accelerator
        assert device is not None  # it has the graphs
        self._device = device
        self._ports: dict[Any, LayerPort] = {}

    def run_layer(self, conductor: Conductor, layer: int, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Called in the place of `Conductor.run_layer`: a cut, unless the layer can be captured with its neighbours."""
        if conductor is not self._conductor:
            raise CannotCaptureError("it runs another model within")
        if (op := conductor.held_op(layer, x.dtype)) is not None:
            self.captured.held += 1
            return op(x, index, weights, self.captured.chosen)
        guesses = conductor.guess_next(layer, x, index.shape[1])
        port = self._port(x, index, guesses)
        port.leave(x, index, weights, guesses)
        self._close()
        self._device.capture_slots(port, conductor.math[layer])
        try:
            conductor.run_port(layer, port)
            self.done.append((layer, port.enter()))
        except BaseException:
            self.experts_failed = True
            raise
        self.captured.parts.append(Cut(layer, port))
        self._graphs.begin()
        return port.enter()

    def _port(self, x: Tensor, index: Tensor, guesses: Tensor | None) -> LayerPort:
        """The port of layers with these shapes; the last layers have fewer guesses, so another one.

        What a graph allocates is its own, so a port is made between two.
        """
        key = x.shape, x.dtype, index.shape, None if guesses is None else guesses.shape
        if key not in self._ports:
            self._close()
            with torch.inference_mode(False):  # other threads write to it as well
                conductor = self._conductor
                experts = max(layer.experts for layer in conductor.spec.layers)
                self._ports[key] = self._device.port(x, index, guesses, conductor.slots.memory, experts)
            self._graphs.begin()
        return self._ports[key]

    def run(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Capture a step. Raises what the step, its experts or the device raised."""
        sequences, tokens = size_of(args, kwargs)
        self.captured.tokens = sequences * tokens
        self._conductor.begin_unless_announced(self.captured.tokens)
        self._graphs.begin()
        _OF_THREAD.capture = self
        try:
            self.captured.output = without_cache(forward(*args, **kwargs))
            self._close()
            self.captured.count_held(self._conductor)
        except BaseException:
            self._graphs.drop()
            raise
        finally:
            _OF_THREAD.capture = None

    def _close(self) -> None:
        graph = self._graphs.end()
        graph.replay()
        self.captured.parts.append(graph)


class _Resumption:
    """A step that is done again from its beginning: layers whose experts have run give what they gave."""

    def __init__(self, done: list[tuple[int, Tensor]]) -> None:
        self._done = deque(done)

    def run_layer(self, conductor: Conductor, layer: int, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Called in the place of `Conductor.run_layer`."""
        if self._done and self._done[0][0] == layer:
            return self._done.popleft()[1]
        self._done.clear()
        return conductor.run_layer(layer, x, index, weights)


class _OfThread(threading.local):
    capture: Capture | _Resumption | None = None


_OF_THREAD = _OfThread()


def current_capture() -> Capture | _Resumption | None:
    """What this thread's layers are to ask instead of the conductor, if anything."""
    return _OF_THREAD.capture


def resume(done: list[tuple[int, Tensor]], forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run a step that could not be captured eagerly; the conductor and its listener see each layer once."""
    _OF_THREAD.capture = _Resumption(done)
    try:
        return forward(*args, **kwargs)
    finally:
        _OF_THREAD.capture = None
