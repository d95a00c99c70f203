"""Slots: the experts that are on the device, and those on their way there.

One pool of equal slots over all layers. A slot is empty, filling (its copy is in flight) or ready, so
nothing reads a half-filled one, and a second request for an expert in flight joins the first. Eviction
forgets: the weights are still in RAM, so nothing is copied back. Held experts are slots that are never
evictable.

The pool knows who is where; the conductor orders the copies and tells it when they are done.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Transfer(Protocol):
    """A copy in flight, as the pool needs to see it."""

    def done(self) -> bool:
        """Whether the bytes have arrived."""

    def wait(self) -> None:
        """Let the device's next work wait for the bytes."""

    def cancel(self) -> bool:
        """Drop the copy if it has not begun; False when it has."""


@dataclass(slots=True)
class Slot:
    """One place for an expert on the device."""

    index: int
    expert: tuple[int, int] | None = None
    filling: Transfer | None = None
    eta_s: float = 0.0  # when the copy is expected to be done
    keep: bool = True  # False: only borrowed, until its layer's next step is over
    pinned: bool = False  # computed from right now: not evictable until the step is over


class SlotPool:
    """Who is in which slot.

    Args:
        memory: uint8 [slots, slot_bytes] on the device.
        held: experts that occupy the first slots for good.
    """

    def __init__(self, memory: Tensor, held: Iterable[tuple[int, int]] = ()) -> None:
        self._memory = memory
        self._slots = [Slot(i) for i in range(memory.shape[0])]
        self._held = frozenset(held)
        self._where: dict[tuple[int, int], Slot] = {}
        if len(self._held) > len(self._slots):
            raise ValueError(f"{len(self._held)} held experts do not fit {len(self._slots)} slots")
        for slot, expert in zip(self._slots, sorted(self._held), strict=False):
            slot.expert = expert
            self._where[expert] = slot

    def __len__(self) -> int:
        """How many slots there are, full or empty."""
        return len(self._slots)

    def __getitem__(self, expert: tuple[int, int]) -> Tensor:
        """The bytes of an expert's slot: uint8 [slot_bytes] on the device."""
        return self._memory[self._where[expert].index]

    def find(self, expert: tuple[int, int]) -> Slot | None:
        """The slot of an expert that is here or on its way."""
        return self._where.get(expert)

    def ready(self, expert: tuple[int, int]) -> bool:
        """Whether the expert can be computed from its slot now."""
        slot = self._where.get(expert)
        if slot is None:
            return False
        if slot.filling is not None and slot.filling.done():
            slot.filling = None
        return slot.filling is None

    def evictable(self) -> Collection[tuple[int, int]]:
        """Experts whose slot may be taken: ready, not held, not in use."""
        return [
            expert
            for expert, slot in self._where.items()
            if expert not in self._held and not slot.pinned and self.ready(expert)
        ]

    def empty(self) -> int:
        """How many slots are empty."""
        return sum(slot.expert is None for slot in self._slots)

    def load(
        self,
        expert: tuple[int, int],
        evict: tuple[int, int] | None,
        start: Callable[[Tensor], Transfer],
        eta_s: float,
        keep: bool = True,
    ) -> Slot:
        """Give `expert` a slot and start filling it; joins a load of it that is in flight."""
        if (slot := self._where.get(expert)) is not None:
            return slot
        empty = (slot for slot in self._slots if slot.expert is None)
        slot = next(empty) if evict is None else self._where.pop(evict)
        slot.expert, slot.eta_s, slot.keep = expert, eta_s, keep
        self._where[expert] = slot
        slot.filling = start(self._memory[slot.index])
        return slot

    def forget(self, expert: tuple[int, int]) -> None:
        """Empty an expert's slot: after a failed copy, or when it was not to be kept."""
        slot = self._where.pop(expert)
        slot.expert = slot.filling = None
        slot.pinned = False

    def borrowed(self, layer: int) -> list[tuple[int, int]]:
        """Experts of a layer that were only to stay for its step."""
        return [expert for expert, slot in self._where.items() if expert[0] == layer and not slot.keep]

    @property
    def n_bytes(self) -> int:
        """Bytes of device memory that the pool takes."""
        return self._memory.numel()
