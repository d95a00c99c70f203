"""A machine of numbers: lanes for CPU, GPU, link and disk that take modelled time on a virtual clock.

A discrete-event simulation of one layer step after another. The replay drives it with a recorded trace, and live runs
with `--clock virtual` charge their real work to it. It knows neither policies nor slots.

What is modelled: every lane does one thing at a time. An expert costs the slower of reading its weights and of
multiplying them (costs.py). The link carries pieces of 16 MiB, the urgent ones first; a piece that runs is never
interrupted. While the link copies, the CPU reads RAM more slowly; the link keeps its rate. Experts that the RAM has no
room for are read from the disk when they are used, as an operating system's page cache does (least recently used out
first). Hidden states cross the link on their own before and after the CPU's part. What is not: the KV cache's bytes,
kernel launches, and what the host does between layers (`host_s`, 0 unless given).
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Sequence
from math import ceil

from .clock import Share
from .contract import Expert, Lane, ModelSpec, Placement
from .costs import Costs
from .machines import Machine
from .slots import Transfer
from .timeline import Timeline

PIECE_BYTES = 16 * 2**20
RAM_SHARE = 0.9  # of a machine's RAM, for experts: the rest is the system's
_ACTIVATION_BYTES = 2  # of a hidden state's element on the link


class VirtualCopy:
    """A copy on the virtual link."""

    __slots__ = (
        "_machine",
        "before",
        "done_s",
        "expert",
        "left_s",
        "n_bytes",
        "not_before_s",
        "order",
        "over",
        "real",
        "started",
        "urgent",
    )

    def __init__(
        self,
        machine: VirtualMachine,
        expert: Expert,
        n_bytes: int,
        urgent: bool,
        not_before_s: float,
        order: int,
        before: VirtualCopy | None,
        real: Transfer | None,
    ) -> None:
        self._machine, self.expert, self.n_bytes, self.urgent = machine, expert, n_bytes, urgent
        self.before, self.real = before, real
        self.left_s, self.not_before_s, self.order = machine.costs.link_s(n_bytes), not_before_s, order
        self.started, self.over, self.done_s = False, False, float("inf")  # over: done, or dropped

    def done(self) -> bool:
        now_s, link = self._machine.now_s, self._machine.link
        if link.free_s < now_s:
            link.advance(now_s)
        if self.done_s > now_s:
            return False
        self.wait()
        return True

    def wait(self) -> None:
        if self.real is not None:
            self.real.wait()

    def cancel(self) -> bool:
        self._machine.link.advance(self._machine.now_s)
        if not self._machine.link.drop(self):
            return False
        if self.real is not None and not self.real.cancel():
            self.real.wait()  # it would write into whoever has the slot next
        return True

    def hasten(self) -> None:
        self._machine.link.advance(self._machine.now_s)
        self._machine.link.hasten(self)

    def left_bytes(self) -> int:
        self._machine.link.advance(self._machine.now_s)
        return round(self.left_s / self._machine.costs.link_s(1))


class VirtualLink:
    """Copies one after another, by priority, in pieces. `advance` commits what happens before a moment."""

    def __init__(self, piece_s: float, timeline: Timeline | None) -> None:
        self._piece_s, self._timeline = piece_s, timeline
        self._urgent: list[VirtualCopy] = []  # both in the order in which they came
        self._others: list[VirtualCopy] = []
        self._left_s = [0.0, 0.0]  # of the urgent ones, of the others
        self.free_s = 0.0  # when the last committed piece ends
        self.busy: list[tuple[float, float]] = []  # committed since the layer began
        self.busy_s = 0.0
        self.n_bytes = 0.0  # carried

    @property
    def is_idle(self) -> bool:
        """Whether nothing is queued."""
        return not self._urgent and not self._others

    def submit(self, copy: VirtualCopy, now_s: float) -> None:
        self.free_s = max(self.free_s, now_s)
        (self._urgent if copy.urgent else self._others).append(copy)
        self._left_s[not copy.urgent] += copy.left_s
        if copy.urgent and copy.before is not None:
            self.hasten(copy.before)

    def hasten(self, copy: VirtualCopy) -> None:
        """Put a queued copy among the urgent ones."""
        if copy.urgent or copy not in self._others:
            return
        self._remove(copy)
        copy.urgent = True
        insort(self._urgent, copy, key=lambda one: one.order)
        self._left_s[0] += copy.left_s

    def drop(self, copy: VirtualCopy) -> bool:
        """Take a copy back that has not begun."""
        if copy.started or copy.over:
            return False
        self._remove(copy)
        copy.over = True
        return True

    def _remove(self, copy: VirtualCopy) -> None:
        (self._urgent if copy.urgent else self._others).remove(copy)
        self._left_s[not copy.urgent] -= copy.left_s
        if self.is_idle:
            self._left_s = [0.0, 0.0]  # of rounding

    def advance(self, until_s: float, wanted: VirtualCopy | None = None) -> None:
        """Commit all pieces that begin before `until_s`; no further than to the end of `wanted`, if given."""
        while self.free_s < until_s and (self._urgent or self._others) and not (wanted is not None and wanted.over):
            start_s = self.free_s
            copy, limit_s = self._next(start_s)
            if copy is None:  # all wait for a slot or for the disk
                if limit_s >= until_s:
                    self.free_s = until_s
                    return
                self.free_s = limit_s
                continue
            run_s, limit_s = copy.left_s, min(limit_s, until_s)
            if start_s + run_s > limit_s:
                pieces = max(1, ceil((limit_s - start_s) / self._piece_s - 1e-9))  # rounding begins no further piece
                run_s = min(run_s, pieces * self._piece_s)
            self._commit(copy, start_s, run_s)

    def _next(self, now_s: float) -> tuple[VirtualCopy | None, float]:
        """The copy whose turn it is, and the moment at which another may take its place."""
        limit_s = float("inf")
        for queue in (self._urgent, self._others):
            for copy in queue:
                if copy.before is not None and not copy.before.over:
                    continue  # its turn comes when that one is through, which is no moment of its own
                if copy.not_before_s <= now_s:
                    return copy, limit_s
                limit_s = min(limit_s, copy.not_before_s)
        return None, limit_s

    def _commit(self, copy: VirtualCopy, start_s: float, run_s: float) -> None:
        end_s = start_s + run_s
        copy.started = True
        self.free_s = end_s
        self.busy_s += run_s
        if self.busy and self.busy[-1][1] == start_s:
            self.busy[-1] = (self.busy[-1][0], end_s)
        else:
            self.busy.append((start_s, end_s))
        if self._timeline is not None:
            self._timeline.add(Lane.LINK, copy.expert, start_s, end_s, "copy" if copy.urgent else "guess")
        if run_s >= copy.left_s:
            self._remove(copy)
            copy.done_s, copy.over, copy.left_s = end_s, True, 0.0
            self.n_bytes += copy.n_bytes
        else:
            copy.left_s -= run_s
            self._left_s[not copy.urgent] -= run_s

    def eta_s(self, copy: VirtualCopy) -> float:
        """When a copy that came last will be done if nothing else comes."""
        before_s = self._left_s[0] if copy.urgent else self._left_s[0] + self._left_s[1]
        return max(self.free_s + before_s, copy.not_before_s + copy.left_s)

    def drained_s(self) -> float:
        """When everything queued will be done."""
        return self.free_s + self._left_s[0] + self._left_s[1]


class VirtualMachine:
    """The lanes of one machine and its clock.

    Args:
        ram_bytes: room for experts; None for all of them.
        host_s: what the host takes for a layer step beside all lanes.
    """

    def __init__(
        self,
        spec: ModelSpec,
        costs: Costs,
        *,
        ram_bytes: int | None = None,
        host_s: float = 0.0,
        timeline: Timeline | None = None,
    ) -> None:
        self.spec, self.costs, self._host_s, self._timeline = spec, costs, host_s, timeline
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

    def arrival_s(self, copy: Transfer, n_bytes: int) -> float:
        assert isinstance(copy, VirtualCopy)
        return self.link.eta_s(copy)

    def left_s(self, copy: Transfer) -> float:
        assert isinstance(copy, VirtualCopy)
        self.link.advance(self.now_s)
        return copy.left_s

    def in_ram_s(self, expert: Expert) -> float:
        return self.disk.ready_s(expert, self.spec.layers[expert[0]].expert_bytes, self.now_s)

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
        in_ram_s = self.disk.read(expert, self.spec.layers[expert[0]].expert_bytes, self.now_s)
        self._order += 1
        copy = VirtualCopy(self, expert, n_bytes, urgent, max(after_s, in_ram_s), self._order, before, real)
        self.link.submit(copy, self.now_s)
        return copy

    def begin_layer(self, layer: int, tokens: int) -> None:
        """The dense part of a layer: attention, router, shared experts and their share of head and embedding."""
        self._layer, self._tokens = layer, tokens
        self.now_s += self._host_s
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
        """Seconds of one layer's dense part: an equal share of the model's."""
        costs, layers = self.costs, len(self.spec.layers)
        gbps, gflops = (costs.gpu_gbps, costs.gpu_gflops) if costs.gpu_gbps else (costs.cpu_gbps, costs.cpu_gflops)
        read_s = self.spec.dense_bytes / (gbps * 1e9) if gbps else 0.0
        compute_s = 2 * self.spec.dense_weights * tokens / (gflops * 1e9) if gflops else 0.0
        return max(read_s, compute_s) / layers

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

    def lanes(self) -> dict[Lane, tuple[float, float]]:
        """Lane -> seconds busy, bytes read or carried so far."""
        return {
            Lane.CPU: (self._cpu_busy_s, self._cpu_bytes),
            Lane.GPU: (self._gpu_busy_s, self._gpu_bytes),
            Lane.LINK: (self.link.busy_s, self.link.n_bytes),
            Lane.DISK: (self.disk.busy_s, float(self.disk.n_bytes)),
        }


def machine_clock(
    spec: ModelSpec, placement: Placement, machine: Machine, *, host_s: float = 0.0, timeline: Timeline | None = None
) -> VirtualMachine:
    """A machine's clock for a model whose experts were placed; what its RAM has no room for is on its disk."""
    in_ram_bytes = spec.expert_bytes - sum(spec.layers[layer].expert_bytes for layer, _ in placement.held)
    room_bytes = int(machine.ram_bytes * RAM_SHARE)
    ram_bytes = room_bytes if in_ram_bytes > room_bytes else None
    return VirtualMachine(spec, machine.costs, ram_bytes=ram_bytes, host_s=host_s, timeline=timeline)


class PageCache:
    """RAM over a disk: experts in the order of their last use; what does not fit is read again when it is used.

    Args:
        gbps: of the disk. ram_bytes: room for experts; None where all fit, and nothing is ever read.
    """

    def __init__(self, gbps: float | None, ram_bytes: int | None, timeline: Timeline | None = None) -> None:
        self._gbps, self._room_bytes, self._timeline = gbps, ram_bytes, timeline
        self._in_ram: OrderedDict[Expert, tuple[float, int]] = OrderedDict()  # when it came, bytes
        self.holds_all = ram_bytes is None
        self.free_s = 0.0
        self.busy_s = 0.0
        self.n_bytes = 0

    def ready_s(self, expert: Expert, n_bytes: int, now_s: float) -> float:
        """When an expert can be in RAM if it is asked for now."""
        if self._room_bytes is None:
            return 0.0
        if expert in self._in_ram:
            return self._in_ram[expert][0]
        return max(now_s, self.free_s) + self._read_s(n_bytes)

    def read(self, expert: Expert, n_bytes: int, now_s: float) -> float:
        """Use an expert, from the disk if it is not in RAM; when it is there."""
        if self._room_bytes is None:
            return 0.0
        if expert in self._in_ram:
            self._in_ram.move_to_end(expert)
            return self._in_ram[expert][0]
        start_s = max(now_s, self.free_s)
        self.free_s = start_s + self._read_s(n_bytes)
        self.busy_s += self.free_s - start_s
        self.n_bytes += n_bytes
        if self._timeline is not None:
            self._timeline.add(Lane.DISK, expert, start_s, self.free_s, "read")
        self._in_ram[expert] = (self.free_s, n_bytes)
        self._room_bytes -= n_bytes
        while self._room_bytes < 0 and len(self._in_ram) > 1:
            _, (_, freed_bytes) = self._in_ram.popitem(last=False)
            self._room_bytes += freed_bytes
        return self.free_s

    def _read_s(self, n_bytes: int) -> float:
        return n_bytes / (self._gbps * 1e9) if self._gbps else float("inf")
