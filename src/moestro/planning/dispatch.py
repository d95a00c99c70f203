"""The order in which a decision is carried out: what moves first, what computes when. Shared by live runs and replays.

Moves that wait for nothing start first; experts that are ready compute as one piece of work; those that a copy brings
follow it, in the order of arrival; a move into the slot of an expert of this very step starts when that was computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from .contract import Decision, Expert, Move, Step
from .slots import SlotTable, Transfer

Ran = TypeVar("Ran")  # what running experts on the device returns: work that a copy can wait for


class Found(NamedTuple):
    """Active experts by where they were when their step was decided."""

    hits: tuple[int, ...]
    joined: tuple[int, ...]
    misses: tuple[int, ...]
    joined_bytes: int = 0  # what had not crossed yet


def classify(step: Step, table: SlotTable) -> Found:
    """Hits were ready on the device, joined on their way there, misses the rest."""
    if not table:
        return Found((), (), tuple(step.tokens))
    hits: list[int] = []
    joined: list[int] = []
    misses: list[int] = []
    left_bytes = 0
    for expert in step.tokens:
        slot = table.find((step.layer, expert))
        if slot is None:
            misses.append(expert)
        elif slot.filling is None or table.ready((step.layer, expert)):
            hits.append(expert)
        else:
            joined.append(expert)
            left_bytes += slot.filling.left_bytes()
    return Found(tuple(hits), tuple(joined), tuple(misses), left_bytes)


def dispatch(
    decision: Decision,
    layer: int,
    table: SlotTable,
    start: Callable[[Move, Ran | None], None],
    run: Callable[[list[int], Transfer | None], Ran],
) -> None:
    """Carry out a checked decision but for the CPU's part.

    Args:
        start: begins a move, behind work that must be over first.
        run: queues experts of the layer on the device, behind a copy that they need.
    """
    for unwanted in decision.drop:
        table.drop(unwanted)
    gpu = decision.gpu
    chained = _start_those_that_may(decision.moves, layer, gpu, table, start)
    ready: list[int] = []
    waiting: list[tuple[float, int]] = []
    for expert in sorted(gpu):
        slot = table.find((layer, expert))
        if slot is None:
            continue  # a chained move will bring it
        if table.ready((layer, expert)):
            ready.append(expert)
        else:
            waiting.append((slot.eta_s, expert))
    ran: dict[int, Ran] = dict.fromkeys(ready, run(ready, None)) if ready else {}
    queue = [expert for _, expert in sorted(waiting)]

    def run_next() -> None:
        expert = queue.pop(0)
        slot = table.find((layer, expert))
        ran[expert] = run([expert], slot.filling if slot is not None else None)

    for move in chained:
        victim = move.evict
        if victim is not None and victim[0] == layer and victim[1] in gpu:
            while victim[1] not in ran:
                run_next()
            start(move, ran[victim[1]])
        else:
            start(move, None)
        if move.expert[0] == layer and move.expert[1] in gpu and move.expert[1] not in (*ran, *queue):
            queue.append(move.expert[1])
    while queue:
        run_next()


def _start_those_that_may(
    moves: Iterable[Move],
    layer: int,
    gpu: Iterable[int],
    table: SlotTable,
    start: Callable[[Move, Ran | None], None],
) -> list[Move]:
    """Start moves that wait for no computation of this step; returns the others."""
    chained: list[Move] = []
    leaving: set[Expert | None] = set()  # experts that a chained move brings or evicts
    for move in moves:
        victim = move.evict
        waits = victim is not None and victim[0] == layer and victim[1] in gpu and table.find(move.expert) is None
        if waits or move.expert in leaving or victim in leaving:
            chained.append(move)
            leaving |= {move.expert, victim} - {None}
        else:
            start(move, None)
    return chained
