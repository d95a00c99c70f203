"""`moestro`: misses split by neurons between CPU and link, a cache of what is used most, guesses where they are free.

What it takes from where: the CPU-or-copy choice from a latency model (Fiddler), the cache and the next gate's guesses
(Eliseev and Mazur), one pool over all layers and both sides ending together (FreeToken). What it adds:

1. Misses, those with the most tokens first, cross the link until the next one would end later than the CPU ends with
   the rest; that one is split at the neuron where both end together. An expert on its way counts with what is left of
   its copy, so a guess that came half way is worth half. Where the CPU alone takes all that the RAM gives, copying
   makes nothing faster, and the CPU computes all.
2. An expert is cached when it was used clearly more than the one that leaves: by `margin` standard deviations of such
   a count, uses weighted by their age. The copy is not waited for: the CPU computes the miss meanwhile. So the cache
   holds still where use is steady, and follows where it drifts.
3. A guess of the next layer's gate is copied into a borrowed slot, behind everything else, if what it is expected to
   save there (by how often guesses of its rank came true, and how much of it will have crossed by then) exceeds what
   its copy takes from the CPU's reading in this step.

Left out: eviction chosen by replaying the model's own trace, costs that follow what is measured.
Parameters: half_life_tokens, after which a use counts half (256); margin, standard deviations (2).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from functools import lru_cache
from math import sqrt

from ..contract import (
    GPU0,
    Costs,
    Decision,
    Expert,
    Lane,
    LayerSpec,
    ModelSpec,
    Move,
    Outcome,
    Phase,
    Placement,
    Step,
    StepInfo,
    View,
)
from .base import BasePolicy, best_copies, hottest, sides_s

_LEARNED = 0.02  # of each new value that is averaged
_UNKNOWN = 0.5  # how often guesses come true of which nothing is known
_REBASE = 1e100
_INF = float("inf")


class Moestro(BasePolicy):
    """Split misses, cache by use, guess when the link has time."""

    name = "moestro"
    lookahead = 1

    def __init__(self, half_life_tokens: float = 256.0, margin: float = 2.0) -> None:
        self._growth = 2.0 ** (1.0 / half_life_tokens)
        self._margin = margin

    def place(self, spec: ModelSpec, gpu_bytes: int, heat: Mapping[Expert, float]) -> Placement:
        super().place(spec, gpu_bytes, heat)
        all_fit = self.slots == sum(layer.experts for layer in spec.layers)
        self._staging = 0 if all_fit else min(self.slots, max(2, min(16, self.slots // 64)))
        pool = self.slots - self._staging
        self._weight = 1.0  # of a use now; earlier ones weigh less and less beside it
        self._uses = self._expected_uses(heat)
        self._cached = dict.fromkeys(hottest(spec, heat, pool) if heat else ())
        self._uses = dict.fromkeys(self._cached, 0.0) | self._uses
        self._least = [(self._uses[e], e) for e in self._cached]  # a heap of (uses when pushed, cached expert)
        heapq.heapify(self._least)
        self._began_s = self._ended_s = 0.0  # the last layer step
        self._gap_s = 0.0  # between two of them: attention, mostly
        self._pending: tuple[int, list[int]] = (-1, [])  # a layer, and the experts guessed for it, the likeliest first
        self._right = [_UNKNOWN] * max(layer.experts for layer in spec.layers)  # by rank, how often guesses came true
        self._all_held = all_fit and self.slots > 0  # then there is nothing to decide, and RAM needs no copy
        if self._all_held:
            return Placement(held=frozenset(hottest(spec, heat, self.slots)))
        return Placement(slots=self.slots, warm=tuple(self._cached))

    def _expected_uses(self, heat: Mapping[Expert, float]) -> dict[Expert, float]:
        """What the profile's uses amount to when each counts half after a while: top-2 for want of knowing better."""
        of_layer: dict[int, float] = {}
        for (layer, _), uses in heat.items():
            of_layer[layer] = of_layer.get(layer, 0.0) + uses
        kept = 2 / (1 - 1 / self._growth)  # the sum of the ages' weights, of two experts a token
        return {(layer, e): kept * uses / of_layer[layer] for (layer, e), uses in heat.items()}

    def begin(self, info: StepInfo, view: View, costs: Costs) -> tuple[Move, ...]:
        if self._weight > _REBASE:
            self._uses = {e: uses / self._weight for e, uses in self._uses.items()}
            self._least = [(uses / self._weight, e) for uses, e in self._least]
            self._weight = 1.0
        self._weight *= min(self._growth ** min(info.tokens, 10**5), _REBASE)  # beyond it nothing from before counts
        for expert in self.lost(self._cached, view):
            del self._cached[expert]
        return ()

    def decide(self, step: Step, view: View, costs: Costs) -> Decision:
        if self._all_held:
            return Decision(gpu=self.whole(step, step.tokens))
        layer, uses = step.layer, self._uses
        for expert, tokens in step.tokens.items():
            uses[layer, expert] = uses.get((layer, expert), 0.0) + tokens * self._weight
        self._learn(step, view.now_s)
        gpu, misses, joined, link_s = self._reachable(step, view, costs)
        if not self.slots:
            return Decision(cpu=self.whole(step, misses))
        moves = [Move((layer, e), keep=False) for e in joined]  # which hastens them
        cpu: dict[int, range] = {}
        room = max(0, view.free_slots(GPU0, layer) - max(0, self.slots - self._staging - len(self._cached)))
        if not costs.link_gbps or not costs.cpu_gbps:
            room = 0  # nothing to reckon with
        if misses:
            self._split(step, misses, link_s, costs, room, gpu, cpu, moves)
        borrowed = len(moves) - len(joined)
        kept, leaving = self._keep(step, gpu, moves, view)
        if step.phase is Phase.DECODE:  # a prompt needs the link for itself
            moves += self._cache(step, list(cpu), gpu, view)
            moves += self._guess(step, cpu, view, costs, room - borrowed)
        return Decision(gpu=gpu, cpu=cpu, moves=(*moves, *kept), drop=tuple(leaving))

    def _keep(
        self, step: Step, gpu: Mapping[int, range], moves: list[Move], view: View
    ) -> tuple[list[Move], list[Expert]]:
        """Guesses that came true and are used enough stay; the cached experts that leave for them."""
        kept: list[Move] = []
        leaving: list[Expert] = []
        brief = {move.evict for move in moves} | {move.expert for move in moves if move.neurons is not None}
        for expert in gpu:
            key = (step.layer, expert)
            if key in self._cached or key in brief or not self.slots - self._staging:
                continue
            if len(self._cached) >= self.slots - self._staging:
                evict = self._least_used(view, step)
                if evict is None or not self._clearly_more(self._uses[key], self._uses[evict]):
                    continue
                del self._cached[evict]
                leaving.append(evict)
            kept.append(Move(key))
            self._enter(key)
        return kept, leaving

    def _enter(self, key: Expert) -> None:
        self._cached[key] = None
        heapq.heappush(self._least, (self._uses[key], key))

    def _reachable(self, step: Step, view: View, costs: Costs) -> tuple[dict[int, range], list[int], list[int], float]:
        """What the GPU has, or will have sooner than the CPU; the rest; which copies are waited for, and until when."""
        of = self.spec.layers[step.layer]
        gpu: list[int] = []
        rest: list[int] = []
        arrivals: list[tuple[float, int]] = []
        for expert in step.tokens:
            ready_s = view.ready_s((step.layer, expert), GPU0)
            if ready_s == _INF:
                rest.append(expert)
            elif not ready_s:
                gpu.append(expert)
            else:
                arrivals.append((max(0.0, ready_s - view.now_s), expert))
        joined: list[int] = []
        link_s = 0.0
        cpu_s = sum(costs.cpu_s(of, step.tokens[e]) for e in (*rest, *(e for _, e in arrivals))) if arrivals else 0.0
        for left_s, expert in sorted(arrivals):
            own_s = costs.cpu_s(of, step.tokens[expert])
            if left_s <= cpu_s or own_s == float("inf"):
                joined.append(expert)
                link_s = left_s
                cpu_s -= own_s
            else:
                rest.append(expert)
        return self.whole(step, gpu + joined), rest, joined, link_s

    def _split(
        self,
        step: Step,
        misses: list[int],
        link_s: float,
        costs: Costs,
        room: int,
        gpu: dict[int, range],
        cpu: dict[int, range],
        moves: list[Move],
    ) -> None:
        """Divide the misses so that both sides end as soon as they can; fills gpu, cpu and moves."""
        of = self.spec.layers[step.layer]
        misses.sort(key=lambda e: -step.tokens[e])
        tokens = tuple(step.tokens[e] for e in misses)
        copied, part = _divide(of, tokens, costs, link_s) if room else (0, 0)
        joined = len(moves)
        for i, expert in enumerate(misses):
            if i > copied or (i == copied and not part):
                cpu[expert] = range(of.neurons)
                continue
            evict = moves[joined + i - room].expert if i >= room else None
            gpu[expert] = range(of.neurons if i < copied else part)
            if i == copied:
                cpu[expert] = range(part, of.neurons)
            share = None if i < copied else range(part)
            moves.append(Move((step.layer, expert), evict=evict, neurons=share, keep=False))

    def _cache(self, step: Step, missed: list[int], gpu: Mapping[int, range], view: View) -> list[Move]:
        """Copies of experts that are used more than the least used cached one; no step waits for them."""
        moves: list[Move] = []
        pool = self.slots - self._staging
        for expert in missed:
            key = (step.layer, expert)
            if expert in gpu or not pool or view.ready_s(key, GPU0) < float("inf"):
                continue
            if len(self._cached) < pool:
                evict = None
            else:
                evict = self._least_used(view, step)
                if evict is None or not self._clearly_more(self._uses[key], self._uses[evict]):
                    break
                del self._cached[evict]
            moves.append(Move(key, evict=evict, urgent=False))
            self._enter(key)
        return moves

    def _clearly_more(self, uses: float, others: float) -> bool:
        """Whether a count exceeds another by more than chance: variances of aged counts are about half of them."""
        weight = self._weight
        return uses - others > self._margin * sqrt((uses + others) / 2 * weight)

    def _least_used(self, view: View, step: Step) -> Expert | None:
        """The cached expert with the fewest uses, if it can leave now."""
        heap = self._least
        while heap:
            uses, expert = heap[0]
            if expert not in self._cached:
                heapq.heappop(heap)
            elif self._uses[expert] > uses:
                heapq.heapreplace(heap, (self._uses[expert], expert))
            else:
                in_use = expert[0] == step.layer and expert[1] in step.tokens
                return None if in_use or expert not in view.evictable(GPU0, step.layer) else expert
        return None

    def _guess(self, step: Step, cpu: Mapping[int, range], view: View, costs: Costs, room: int) -> list[Move]:
        """Copies of the next layer's likely experts into borrowed slots, if the link has nothing to do."""
        following = step.layer + 1
        if room <= 0 or following not in step.guesses:
            return []
        of = self.spec.layers[step.layer]
        copy_s, alone_s, taken = _one_expert(of, costs)
        busy_s = 0.0
        for expert, neurons in cpu.items():
            tokens = step.tokens[expert]
            busy_s += (alone_s if tokens == 1 else costs.cpu_s(of, tokens)) * len(neurons) / of.neurons
        lost_s = min(copy_s, busy_s) * taken
        late_s = max(0.0, copy_s - busy_s - self._gap_s)  # after the next step has begun
        moves: list[Move] = []
        if alone_s - late_s <= lost_s or view.lane_free_s(Lane.LINK) > view.now_s:
            return moves  # it would not pay if it were certain, or others are waiting
        guessed = list(step.guesses[following])[: len(step.tokens)]
        self._pending = following, guessed
        for expert, right in zip(guessed, self._right, strict=False):
            if len(moves) == room:
                break
            key = (following, expert)
            if right * (alone_s - late_s) > lost_s and view.ready_s(key, GPU0) == _INF:
                moves.append(Move(key, keep=False, urgent=False))
                late_s += copy_s
        return moves

    def _learn(self, step: Step, now_s: float) -> None:
        """How long it takes from step to step, and how often guesses of each rank came true."""
        if step.phase is Phase.DECODE and step.layer:
            self._gap_s += _LEARNED * (now_s - self._ended_s - self._gap_s)
        self._began_s = now_s
        layer, guessed = self._pending
        if layer == step.layer:
            right = self._right
            for rank, expert in enumerate(guessed):
                right[rank] += _LEARNED * ((expert in step.tokens) - right[rank])

    def observe(self, done: Outcome) -> None:
        self._ended_s = self._began_s + done.wall_s


@lru_cache(maxsize=64)
def _one_expert(of: LayerSpec, costs: Costs) -> tuple[float, float, float]:
    """Its copy in seconds; its computation by the CPU; which share of the CPU's time a copy takes meanwhile."""
    alone_s = costs.cpu_s(of, 1)
    return costs.link_s(of.expert_bytes), alone_s, 1 - alone_s / costs.cpu_s(of, 1, beside_link=True)


@lru_cache(maxsize=4096)
def _divide(of: LayerSpec, tokens: tuple[int, ...], costs: Costs, link_s: float) -> tuple[int, int]:
    """How many misses to copy whole, and how many neurons of the next one, so that both sides are done soonest.

    Args:
        tokens: of each miss, the most first. link_s: until the link is free.
    """
    copied = best_copies(of, tokens, costs, link_s)
    part, best_s = 0, sides_s(of, tokens, copied, costs, link_s)
    if of.splittable:
        for whole in {max(0, copied - 1), copied} - {len(tokens)}:
            neurons, ends_s = _balance(of, tokens, whole, costs, link_s)
            if neurons and ends_s < best_s:
                copied, part, best_s = whole, neurons, ends_s
    return copied, part


def _balance(of: LayerSpec, tokens: tuple[int, ...], copied: int, costs: Costs, link_s: float) -> tuple[int, float]:
    """How many neurons of expert `copied` to copy besides the ones before it, and when CPU and link then end."""
    copy_s = costs.link_s(of.expert_bytes)
    beside_s = [costs.cpu_s(of, n, beside_link=True) for n in tokens[copied:]]
    start_s = link_s + copied * copy_s
    share = (sum(beside_s) - start_s) / (copy_s + beside_s[0])  # start + f copy = the rest - f of the first
    neurons = int(share * of.neurons) // of.block * of.block
    if not 0 < neurons < of.neurons:
        return 0, 0.0
    return neurons, max(start_s + copy_s * neurons / of.neurons, sum(beside_s) - beside_s[0] * neurons / of.neurons)
