"""Work of a device that is captured once and then done again by one call: CUDA graphs, and pretended ones.

A capture notes what a thread asks of the device and does none of it. Then each `replay` does it all, in the same
order, from and to the memory that was used at the capture; values that the host computed meanwhile are not computed
anew. So a captured call must take inputs from buffers that stay, and may not read a tensor on the host.

    >>> graphs, x = PretendedGraphs(), torch.ones(2)
    >>> graphs.begin()
    >>> y = x + 1
    >>> graph = graphs.end()
    >>> x = x.fill_(5)
    >>> graph.replay()
    >>> y
    tensor([6., 6.])
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA: Any = torch.cuda  # parts of it are untyped, which mypy --strict refuses to call
_ONE_AT_A_TIME = threading.Lock()  # torch captures in one thread of a process at a time


class CannotCaptureError(RuntimeError):
    """Something that a graph cannot do again; the message completes "cannot be captured: "."""


class Graph(Protocol):
    """What was captured."""

    def replay(self) -> None:
        """Do it, behind what was asked of the device before."""


class Graphs(Protocol):
    """Captures one thread's work at a time.

    What it captures shares memory: graphs run one at a time, and in the order in which they were captured, unless
    nothing that one makes is needed after another.
    """

    def begin(self) -> None:
        """Capture from now on."""

    def end(self) -> Graph:
        """Up to here; raises what the capture found wrong."""

    def drop(self) -> None:
        """Forget what is being captured, if anything is."""


def captured(graphs: Graphs, work: Callable[[], None]) -> Graph:
    """Some work, which is not done."""
    graphs.begin()
    try:
        work()
    except BaseException:
        graphs.drop()
        raise
    return graphs.end()


class CudaGraphs:
    """Graphs of a CUDA device, with one pool of memory.

    Not `torch.cuda.graph`, which empties torch's cache before each: a step is cut into one for each layer.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream, self._pool = device, CUDA.Stream(device), CUDA.graph_pool_handle()
        self._anchor: Graph | None = None  # an empty graph: a pool cannot be used again when its last one has gone
        self._graph: Any = None
        self._outer: Any = None  # the stream on which the thread was
        self._failed: list[Any] = []  # graphs that torch's allocators may still know

    def begin(self) -> None:
        if self._anchor is None:
            CUDA.empty_cache()  # what a prompt left is not given to graphs while they are captured
            self._begin()
            with warnings.catch_warnings():  # that it is empty
                warnings.simplefilter("ignore")
                self._anchor = self.end()
        self._begin()

    def _begin(self) -> None:
        _ONE_AT_A_TIME.acquire()
        self._outer = CUDA.current_stream()
        try:
            self._stream.wait_stream(self._outer)
            graph = CUDA.CUDAGraph()
            CUDA.set_stream(self._stream)
            # Of this thread only: others may copy meanwhile.
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
        except BaseException:
            self._leave()
            raise
        self._graph = graph

    def end(self) -> Graph:
        graph, self._graph = self._graph, None
        try:
            graph.capture_end()
        except BaseException:
            self._give_up(graph)
            raise
        finally:
            self._leave()
        captured: Graph = graph
        return captured

    def drop(self) -> None:
        if self._graph is not None:
            try:
                self.end()
            except RuntimeError:  # what made it useless is being told already
                return

    def _give_up(self, graph: Any) -> None:
        """torch 2.13 does not tell its allocator that a capture ended that failed: the pool can have no other one."""
        self._failed.append(graph)
        end_allocation = getattr(torch._C, "_cuda_endAllocateToPool", None)
        if end_allocation is not None:
            with contextlib.suppress(RuntimeError):  # it knew
                end_allocation(self._device.index, self._pool)
        self._pool, self._anchor = CUDA.graph_pool_handle(), None

    def _leave(self) -> None:
        CUDA.set_stream(self._outer)
        _ONE_AT_A_TIME.release()


class _Call(NamedTuple):
    """One call of a torch operation: `made` are the places among its outputs of those that share no input's memory."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: list[tuple[int, Tensor]]


class _PretendedGraph:
    def __init__(self, calls: list[_Call]) -> None:
        self._calls = calls

    def replay(self) -> None:
        for function, args, kwargs, made in self._calls:
            outputs = tree_leaves(function(*args, **kwargs))
            for place, captured in made:
                captured.copy_(outputs[place])


class PretendedGraphs:
    """Captures on the CPU, for the emulated device and for tests: torch's operations are noted and called again.

    A capture leaves nothing behind, as with CUDA: what it changed is put back, and what it made is filled with
    nonsense. So a test that uses its values without a replay, or a Python value of an earlier step, fails.
    """

    def __init__(self) -> None:
        self._mode: _Notes | None = None

    def begin(self) -> None:
        mode = _Notes()
        mode.__enter__()  # type: ignore[no-untyped-call]
        self._mode = mode

    def end(self) -> Graph:
        mode, self._mode = self._mode, None
        assert mode is not None
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        mode.undo()
        return _PretendedGraph(mode.calls)

    def drop(self) -> None:
        if self._mode is not None:
            self.end()


class _Notes(TorchDispatchMode):
    """Notes what torch is asked to do. It has to do it as well, since the host may need shapes and views of it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[_Call] = []
        self._made: dict[int, UntypedStorage] = {}
        self._before: dict[int, tuple[UntypedStorage, UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _refuse(func, args)
        if func._schema.is_mutable:
            for tensor in _written(func, args, kwargs):
                self._keep(tensor.untyped_storage())
        known = {leaf.untyped_storage()._cdata for leaf in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        made = []
        for place, leaf in enumerate(tree_leaves(out)):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in known:
                made.append((place, leaf))
                self._made[storage._cdata] = storage
        if made or func._schema.is_mutable:  # else it is a view, which stays one
            self.calls.append(_Call(func, args, kwargs, made))
        return out

    def undo(self) -> None:
        """Put back all memory that the captured operations have changed."""
        for storage, before in self._before.values():
            storage.copy_(before)
        for storage in self._made.values():
            _bytes(storage).fill_(255)  # not a number, or -1

    def _keep(self, storage: UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._made and key not in self._before:
            self._before[key] = (storage, storage.clone())


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The inputs that an operation changes."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(args[place] if place < len(args) else kwargs.get(argument.name))


def _refuse(func: Any, args: Any) -> None:
    """What CUDA refuses while it captures: whatever lets the host wait for the device.

    Raises:
        CannotCaptureError: it is that.
    """
    if torch.Tag.data_dependent_output in func.tags:
        raise CannotCaptureError(f"the host reads a tensor in the middle of a step ({func})")
    packet = func.overloadpacket
    if packet is torch.ops.aten.lift_fresh and args[0].dim():
        raise CannotCaptureError("a tensor is made of values of the host in the middle of a step")
    if packet in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
        masked = any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1]))
        if masked and not (len(args) > 2 and args[2].numel() == 1):  # one value is filled in where the mask is
            raise CannotCaptureError(f"a mask chooses elements, of which the host must know how many ({func})")
    elif torch.Tag.dynamic_output_shape in func.tags:
        raise CannotCaptureError(f"the size of a result depends on values, which the host must know ({func})")
