"""A machine of numbers: lanes for CPU, GPU, link and disk that take modelled time on a virtual clock.

A discrete-event simulation of one layer step after another. The replay drives it with a recorded trace, and live runs
with `--clock virtual` charge their real work to it. It knows neither policies nor slots.

What is modelled: every lane does one thing at a time. An expert costs the slower of reading its weights and of
multiplying them (costs.py). The link carries pieces of 16 MiB, the urgent ones first; a piece that runs is never
interrupted. While the link copies, the CPU reads RAM more slowly; the link keeps its rate. Experts that the RAM has no
room for are read from the disk when they are used, as an operating system's page cache does (least recently used out
first). Hidden states cross the link on their own before and after the CPU's part. What is not: the KV cache's bytes,
kernel launches, and what the host does between layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import BudgetError
from ..planning.budget import format_bytes
from ..planning.clock import Share, Traced
from ..planning.contract import Expert, Lane, ModelSpec, Placement
from ..planning.costs import PIECE_BYTES, Costs
from ..planning.machines import Machine
from ..planning.slots import Transfer
from ..planning.spelling import spelled
from ..planning.timeline import Timeline
from .page_cache import PageCache
from .virtual_link import VirtualCopy, VirtualLink

RAM_SHARE = 0.9  # of a machine's RAM, for experts: the rest is the system's
_ACTIVATION_BYTES = 2  # of a hidden state's element on the link


class VirtualMachine:
    """The lanes of one machine and its clock.

    Args:
        ram_bytes: room for experts; None for all of them.
    """

    is_virtual = True

    def __init__(
        self,
        spec: ModelSpec,
        costs: Costs,
        *,
        ram_bytes: int | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        self.spec, self.costs, self._timeline = spec, costs, timeline
        self.now_s = 0.0
        self.link = VirtualLink(costs.link_s(PIECE_BYTES), timeline)
        self.disk = PageCache(costs.disk_gbps, ram_bytes, timeline)
        self._gpu_busy_s = self._cpu_busy_s = self._gpu_bytes = self._cpu_bytes = 0.0
        self._seconds: dict[tuple[int, int, int], tuple[float, float, float]] = {}
        self._dense_seconds: dict[int, float] = {}
        self._gpu_free_s = self._cpu_free_s = 0.0
        self._order = 0
        self._layer = self._tokens = 0

    def lane_free_s(self, lane: Lane) -> float:
        if lane is Lane.CPU:
            return max(self.now_s, self._cpu_free_s)
        if lane is Lane.GPU:
            return max(self.now_s, self._gpu_free_s)
        if lane is Lane.DISK:
            return max(self.now_s, self.disk.free_s)
        self.link.advance(self.now_s)
        return max(self.now_s, self.link.drained_s())

    def arrival_s(self, copy: Transfer, urgent: bool) -> float:
        assert isinstance(copy, VirtualCopy)
        return self.link.eta_s(copy)

    def left_s(self, copy: Transfer) -> float:
        assert isinstance(copy, VirtualCopy)
        self.link.advance(self.now_s)
        return copy.done_s - self.now_s if copy.over else copy.left_s

    def in_ram_s(self, expert: Expert) -> float:
        return (
            0.0
            if self.disk.holds_all
            else self.disk.ready_s(expert, self.spec.layers[expert[0]].expert_bytes, self.now_s)
        )

    def copy(
        self,
        expert: Expert,
        n_bytes: int,
        urgent: bool,
        after_s: float = 0.0,
        before: Transfer | None = None,
        real: Transfer | None = None,
    ) -> VirtualCopy:
        """Queue a copy of an expert's bytes, to begin at `after_s` or later and behind `before`.

        Args:
            real: what moves them, in a live run.
        """
        assert before is None or isinstance(before, VirtualCopy)
        self.link.advance(self.now_s)
        if not self.disk.holds_all:
            after_s = max(after_s, self.disk.read(expert, self.spec.layers[expert[0]].expert_bytes, self.now_s))
        self._order += 1
        copy = VirtualCopy(self, expert, n_bytes, urgent, after_s, self._order, before, real)
        self.link.submit(copy, self.now_s)
        return copy

    def begin_layer(self, layer: int, tokens: int) -> None:
        """The dense part of a layer: attention, router, shared experts and their share of head and embedding."""
        self._layer, self._tokens = layer, tokens
        took_s = self._dense_seconds.get(tokens)
        if took_s is None:
            took_s = self._dense_seconds[tokens] = self.dense_s(tokens)
        if self._timeline is not None:
            lane = Lane.GPU if self.costs.gpu_gbps else Lane.CPU
            self._timeline.add(lane, (layer, -1), self.now_s, self.now_s + took_s, "dense")
        if self.costs.gpu_gbps:
            self._gpu_busy_s += took_s
            self._gpu_bytes += self.spec.dense_bytes / len(self.spec.layers)
        else:
            self._cpu_busy_s += took_s
            self._cpu_bytes += self.spec.dense_bytes / len(self.spec.layers)
        self.now_s += took_s
        self.link.advance(self.now_s)
        self._gpu_free_s = self._cpu_free_s = self.now_s

    def dense_s(self, tokens: int) -> float:
        """As `dense_layer_s`, of this model and machine."""
        return dense_layer_s(self.spec, self.costs, tokens)

    def run_gpu(self, shares: Sequence[Share], after: Transfer | None = None) -> float:
        """Queue experts on the GPU, behind a copy that they need; returns when they will be done."""
        start_s = max(self._gpu_free_s, self.now_s)
        if after is not None:
            assert isinstance(after, VirtualCopy)
            self.link.advance(float("inf"), wanted=after)
            start_s = max(start_s, after.done_s)
        layer = self.spec.layers[self._layer]
        for expert, tokens, neurons in shares:
            took_s = self._expert_s(tokens, neurons)[2]
            if self._timeline is not None:
                self._timeline.add(Lane.GPU, expert, start_s, start_s + took_s, "expert")
            self._gpu_busy_s += took_s
            self._gpu_bytes += layer.expert_bytes * neurons / layer.neurons
            start_s += took_s
        self._gpu_free_s = start_s
        return start_s

    def run_cpu(self, shares: Sequence[Share]) -> None:
        """The CPU's part of a layer step. To be told after the GPU's, whose copies slow the CPU's reading."""
        if not shares:
            return
        layer = self.spec.layers[self._layer]
        crossing_s = self._crossing_s()
        at_s = self.now_s + crossing_s
        for ready_s, (expert, tokens, neurons) in self._by_arrival(shares, layer.expert_bytes):
            begin_s = max(at_s, ready_s)
            fast_s, slow_s, _ = self._expert_s(tokens, neurons)
            at_s = begin_s + self._stretched_s(begin_s, fast_s, slow_s)
            if self._timeline is not None:
                self._timeline.add(Lane.CPU, expert, begin_s, at_s, "expert")
            self._cpu_busy_s += at_s - begin_s
            self._cpu_bytes += layer.expert_bytes * neurons / layer.neurons
        self._cpu_free_s = at_s + crossing_s

    def _by_arrival(self, shares: Sequence[Share], n_bytes: int) -> Sequence[tuple[float, Share]]:
        """The shares as the disk brings them, and when."""
        if self.disk.holds_all:
            return [(0.0, share) for share in shares]
        return sorted((self.disk.read(share.expert, n_bytes, self.now_s), share) for share in shares)

    def _expert_s(self, tokens: int, neurons: int) -> tuple[float, float, float]:
        """Seconds of an expert of this layer: CPU alone, CPU beside a busy link, GPU."""
        key = (self._layer, tokens, neurons)
        found = self._seconds.get(key)
        if found is None:
            layer, costs = self.spec.layers[self._layer], self.costs
            found = self._seconds[key] = (
                costs.cpu_s(layer, tokens, neurons),
                costs.cpu_s(layer, tokens, neurons, beside_link=True),
                costs.gpu_s(layer, tokens, neurons),
            )
        return found

    def _crossing_s(self) -> float:
        """Hidden states of a layer step over the link, one way; nothing where there is no GPU."""
        if not self.costs.gpu_gbps:
            return 0.0
        return self.costs.link_s(self._tokens * self.spec.layers[self._layer].hidden * _ACTIVATION_BYTES)

    def _stretched_s(self, begin_s: float, fast_s: float, slow_s: float) -> float:
        """How long work takes that needs fast_s while the link idles and slow_s while it copies."""
        if slow_s <= fast_s or (not self.link.busy and self.link.is_idle):
            return fast_s
        at_s, left = begin_s, 1.0
        busy = [*self.link.busy, (self.link.free_s, self.link.drained_s())]
        for from_s, to_s in busy:
            if to_s <= at_s:
                continue
            if from_s > at_s:  # the link idles until then
                if left * fast_s <= from_s - at_s:
                    break
                left -= (from_s - at_s) / fast_s
                at_s = from_s
            if left * slow_s <= to_s - at_s:
                return at_s + left * slow_s - begin_s
            left -= (to_s - at_s) / slow_s
            at_s = to_s
        return at_s + left * fast_s - begin_s

    def end_layer(self) -> None:
        """Go on to the moment at which all parts are there."""
        self.now_s = max(self.now_s, self._gpu_free_s, self._cpu_free_s)
        self.link.advance(self.now_s)
        self.link.busy.clear()
        if self.link.free_s > self.now_s:
            self.link.busy.append((self.now_s, self.link.free_s))  # a piece that is on its way

    def lanes_of(self, device: Traced) -> Traced:
        return self

    def trace(self, timeline: Timeline | None) -> None:
        """Note on a timeline what the lanes do from now on; None to stop."""
        self._timeline = self.link.timeline = self.disk.timeline = timeline

    def lanes(self) -> dict[Lane, tuple[float, float]]:
        """Lane -> seconds busy, bytes read or carried so far."""
        return {
            Lane.CPU: (self._cpu_busy_s, self._cpu_bytes),
            Lane.GPU: (self._gpu_busy_s, self._gpu_bytes),
            Lane.LINK: (self.link.busy_s, self.link.n_bytes),
            Lane.DISK: (self.disk.busy_s, float(self.disk.n_bytes)),
        }


def dense_layer_s(spec: ModelSpec, costs: Costs, tokens: int) -> float:
    """Seconds that one layer's dense part takes for so many tokens: an equal share of the model's; 0 without rates."""
    gbps, gflops = (costs.gpu_gbps, costs.gpu_gflops) if costs.gpu_gbps else (costs.cpu_gbps, costs.cpu_gflops)
    read_s = spec.dense_bytes / (gbps * 1e9) if gbps else 0.0
    compute_s = 2 * spec.dense_weights * tokens / (gflops * 1e9) if gflops else 0.0
    return max(read_s, compute_s) / len(spec.layers)


def machine_clock(
    spec: ModelSpec, placement: Placement, machine: Machine, timeline: Timeline | None = None
) -> VirtualMachine:
    """A machine's clock for a model whose experts were placed; what its RAM has no room for is on its disk.

    Raises:
        BudgetError: it has no room, and how fast its disk is is not known.
    """
    in_ram_bytes = spec.expert_bytes - sum(spec.layers[layer].expert_bytes for layer, _ in placement.held)
    room_bytes = int(machine.ram_bytes * RAM_SHARE)
    ram_bytes = room_bytes if in_ram_bytes > room_bytes else None
    if ram_bytes is not None and not machine.costs.disk_gbps:
        raise BudgetError(
            f"the experts need {format_bytes(in_ram_bytes)} of RAM, but {machine.name} has {format_bytes(room_bytes)} "
            f"for them and no disk rate to read the rest by; take fewer {spelled('bits')} or another "
            f"{spelled('machine')}"
        )
    return VirtualMachine(spec, machine.costs, ram_bytes=ram_bytes, timeline=timeline)
