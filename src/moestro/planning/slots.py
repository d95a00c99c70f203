"""Which expert is in which slot of the device or on its way there. Pure bookkeeping: no bytes, no clock.

One table of equal slots over all layers. A slot is empty, filling (its copy is in flight) or ready, so nothing reads
a half-filled one, and a second request for an expert in flight joins the first. Eviction forgets: the weights are
still in RAM, so nothing is copied back. Held experts are slots that are never evictable. The live pool
(`memory.slots`) and the replay both stand on this table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

Expert = tuple[int, int]  # (MoE layer, expert), as in contract.py


class Transfer(Protocol):
    """A copy in flight, as the table needs to see it."""

    def done(self) -> bool:
        """Whether the bytes have arrived."""

    def wait(self) -> None:
        """Let the device's next work wait for the bytes."""

    def cancel(self) -> bool:
        """Drop the copy if it has not begun; False when it has."""

    def hasten(self) -> None:
        """A step waits for it now: it goes before copies that no step waits for."""

    def left_bytes(self) -> int:
        """How much of it has not crossed yet; 0 where that is not known."""


@dataclass(slots=True, eq=False)
class Slot:
    """One place for an expert on the device."""

    index: int
    expert: Expert | None = None
    filling: Transfer | None = None
    eta_s: float = 0.0  # when the copy is expected to be done
    n_bytes: int = 0  # of the copy
    keep: bool = True  # False: only borrowed, until its layer's next step is over
    partial: bool = False  # some neurons alone come: of no use but in the step that asked for them


class SlotTable:
    """Which expert is in which slot.

    Args:
        slots: how many there are. held: experts that occupy the first of them for good.
        warm: experts that are in the next ones, and may leave.
    """

    def __init__(self, slots: int, held: Iterable[Expert] = (), warm: Iterable[Expert] = ()) -> None:
        self.held = frozenset(held)
        self.warm = tuple(warm)
        there = [*sorted(self.held), *self.warm]
        if len(there) > slots:
            raise ValueError(f"{len(there)} experts do not fit {slots} slots")
        self._slots = slots
        self._where = {expert: Slot(i, expert) for i, expert in enumerate(there)}
        self.find = self._where.get  # the slot of an expert that is here or on its way, or None; asked most of all
        self._empty = [Slot(i) for i in reversed(range(len(there), slots))]
        self.moved_bytes = 0  # queued so far, without what was dropped before it began
        self.failures = 0  # after which slots may be empty that no policy emptied
        self._borrowed: dict[int, set[Expert]] = {}  # by layer

    def __len__(self) -> int:
        """How many slots there are, full or empty."""
        return self._slots

    def ready(self, expert: Expert) -> bool:
        """Whether the expert can be computed from its slot now."""
        slot = self._where.get(expert)
        if slot is None:
            return False
        if slot.filling is None:
            return True
        if slot.filling.done():
            slot.filling = None
            return True
        return False

    def there(self) -> dict[Expert, bool]:
        """Experts that have a slot, and whether their bytes have arrived. Changes nothing, so any thread may ask."""
        found = list(self._where.items())
        return {expert: (copy := slot.filling) is None or copy.done() for expert, slot in found}

    def evictable(self) -> Collection[Expert]:
        """Experts whose slot may be taken: ready and not held. Looks at the table, copies nothing."""
        return _Evictable(self)  # not kept: in a cycle a live table's memory would wait for the collector

    def empty(self) -> int:
        """How many slots are empty."""
        return len(self._empty)

    def load(
        self,
        expert: Expert,
        evict: Expert | None,
        start: Callable[[int, Transfer | None], tuple[Transfer, float]],
        n_bytes: int,
        keep: bool = True,
        urgent: bool = True,
        partial: bool = False,
    ) -> Slot:
        """Give `expert` a slot and start filling it; joins a load in flight, hastens it and keeps it if asked.

        Args:
            evict: whose slot to take; None for an empty one.
            start: begins to fill the slot of that index, with n_bytes, behind a copy into it that is still in flight;
                returns the copy and when it is expected to be done.
        """
        if (slot := self._where.get(expert)) is not None:
            if urgent and slot.filling is not None:
                slot.filling.hasten()
            if keep and not slot.keep:
                slot.keep = True
                self._borrowed[expert[0]].discard(expert)
            return slot
        before = None if evict is None or self.ready(evict) else self._where[evict].filling
        slot = self._empty[-1] if evict is None else self._where[evict]
        if evict is not None:
            self.forget(evict)  # before its bytes are written over, also if that is interrupted
        filling, eta_s = start(slot.index, before)  # if it cannot, the slot stays empty
        self._empty.pop()  # the slot, in either case
        slot.filling, slot.eta_s = filling, eta_s
        slot.expert, slot.keep, slot.n_bytes, slot.partial = expert, keep, n_bytes, partial
        self.moved_bytes += n_bytes
        self._where[expert] = slot
        if not keep:
            self._borrowed.setdefault(expert[0], set()).add(expert)
        return slot

    def forget(self, expert: Expert) -> None:
        """Empty an expert's slot."""
        slot = self._where.pop(expert)
        if not slot.keep:
            self._borrowed[expert[0]].discard(expert)
        slot.expert = slot.filling = None
        self._empty.append(slot)

    def drop(self, expert: Expert) -> None:
        """Empty the slot of an expert that is not wanted, unless it is held or its copy has begun."""
        slot = self._where.get(expert)
        if slot is None or expert in self.held:
            return
        if self.ready(expert):
            self.forget(expert)
        elif slot.filling is not None and slot.filling.cancel():
            self.moved_bytes -= slot.n_bytes
            self.forget(expert)

    def release(self, layer: int) -> None:
        """Empty the slots of a layer's experts that were only to stay for its step, which is over."""
        for expert in list(self._borrowed.get(layer, ())):
            if self._where[expert].partial:
                self.forget(expert)  # its work is queued behind the copy, and so is whatever comes into the slot next
            else:
                self.drop(expert)  # one that is still coming goes after the layer's next step

    def forget_all(self) -> None:
        """Empty all slots but those held, after a step that failed: what a policy has noted of them is unknown."""
        self.forget_unfinished()
        for expert in self._where.keys() - self.held:
            self.forget(expert)

    def forget_unfinished(self) -> None:
        """Empty the slots of all copies that have not arrived, once they are still: a failure leaves that unknown."""
        self.failures += 1
        for expert, slot in list(self._where.items()):
            if slot.filling is None or self.ready(expert):
                continue
            if slot.filling.cancel():
                self.moved_bytes -= slot.n_bytes
            else:
                with suppress(Exception):  # its failure is being told already
                    slot.filling.wait()  # it would write into the slot's next expert
            self.forget(expert)


class _Evictable(Collection[Expert]):
    """The experts of a table whose slot may be taken, asked one by one."""

    __slots__ = ("_table",)

    def __init__(self, table: SlotTable) -> None:
        self._table = table

    def __contains__(self, expert: object) -> bool:
        table = self._table
        slot = table._where.get(expert)  # type: ignore[call-overload]
        return slot is not None and expert not in table.held and table.ready(slot.expert)

    def __iter__(self) -> Iterator[Expert]:
        return (expert for expert in list(self._table._where) if expert in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)
