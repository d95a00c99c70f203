"""Experts in slots as one captured piece of work: the host writes a small table and replays a graph.

Launched one by one, the kernels of a decode step's hits would take the host longer than they take the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..compute import gpu
from ..compute.experts import ExpertWork
from .cuda_memory import pinned_bytes
from .graphs import Graph, Graphs, captured
from .port import LayerPort
from .work import StepSum

_ENTRY_BYTES = 12  # of the table of `gpu.plan_on_device`


class CapturedSum(StepSum):
    """The sum of a port's steps, with graphs that add to it.

    They read the routing that the port's `leave` wrote, and from a table which experts are where.

    Args:
        experts: the most of a layer.
    """

    def __init__(self, port: LayerPort, experts: int) -> None:
        super().__init__(port.total.x, port.total.pool, port.total.out, is_fixed=True)
        self._index, self._weights = port.index, port.weights
        self._table = torch.zeros(experts, 3, dtype=torch.int32, device=self.x.device)
        # Each piece of work has a table of its own until the next step: there are no more of them than experts.
        most = min(self._index.numel(), experts)
        host = pinned_bytes(most * experts * _ENTRY_BYTES).view(torch.int32).view(most, experts, 3)
        self._tables = [(table, table.numpy()) for table in host.unbind()]
        self._unused = iter(self._tables)
        self._graphs: dict[gpu.GpuKernel, Graph] = {}

    def begin(self) -> None:
        super().begin()
        self._unused = iter(self._tables)

    def capture(self, kernel: gpu.GpuKernel, graphs: Graphs) -> None:
        """Prepare for experts that this kernel computes."""
        if kernel in self._graphs:
            return
        self._table.zero_()
        self._launch(kernel)  # compiles, and computes nothing
        self._graphs[kernel] = captured(graphs, lambda: self._launch(kernel))

    def _launch(self, kernel: gpu.GpuKernel) -> None:
        assert self.out is not None
        plan = gpu.plan_on_device(kernel, self._index, self._weights, self._table)
        gpu.run_grouped(kernel, self.pool, plan, self.x, self.out)

    def prepared(self, kernel: gpu.GpuKernel, work: Sequence[ExpertWork]) -> Callable[[Tensor], None] | None:
        """What adds the work, in one call of the device; None where that was not captured."""
        graph, found = self._graphs.get(kernel), next(self._unused, None)
        if graph is None or found is None:
            return None
        table, entries = found
        entries.fill(0)
        for item in work:
            assert item.expert >= 0
            first, stop = item.neurons.start // kernel.block, -(-item.neurons.stop // kernel.block)
            entries[item.expert] = gpu.slot_of(self.pool, item.packed), first, stop - first

        def run(_: Tensor) -> None:
            self._table.copy_(table, non_blocking=True)
            graph.replay()

        return run
