"""The device's memory for experts: a slot table (planning/slots.py) and the bytes behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from torch import Tensor

from ..errors import CopyError
from ..planning.slots import Expert, SlotTable, Transfer


class SlotUser(Protocol):
    """Work that reads a slot, or a copy that writes it, which the next copy into that slot must not overtake."""

    def launched(self) -> bool:
        """Whether the device knows of it, so that what it is given from now on comes after it."""

    def over(self) -> bool:
        """Whether it has read or written the slot."""

    def when_launched(self, call: Callable[[], None]) -> None:
        """Call back when it is launched, or at once if it is already."""


class SlotCopy(SlotUser, Transfer, Protocol):
    """A copy into a slot."""


class SlotPool(SlotTable):
    """Which expert is in which slot, with the memory of each, and which copies and work use that.

    Warm experts count as on their way until `fill_warm` is told of their copies.

    Args:
        memory: uint8 [slots, slot_bytes] on the device.
        held, warm: as in `SlotTable`. The caller that makes the pool fills the memory of the held ones.
    """

    def __init__(self, memory: Tensor, held: Iterable[Expert] = (), warm: Iterable[Expert] = ()) -> None:
        super().__init__(memory.shape[0], held, warm)
        self.memory = memory
        self._rows = memory.unbind(0)  # made once: a step asks for eight of them a layer
        self._copies: list[list[SlotCopy]] = [[] for _ in self._rows]  # into each slot
        self._work: list[SlotUser | None] = [None for _ in self._rows]  # that read each slot last
        for expert in self.warm:
            self._where[expert].filling = _NotBegun(expert)

    def __getitem__(self, expert: Expert) -> Tensor:
        """The bytes of an expert's slot: uint8 [slot_bytes] on the device."""
        slot = self.find(expert)
        if slot is None:
            raise KeyError(expert)
        return self._rows[slot.index]

    def row(self, index: int) -> Tensor:
        """The bytes of a slot: uint8 [slot_bytes] on the device."""
        return self._rows[index]

    def fill_warm(self, expert: Expert, copy: SlotCopy) -> None:
        """The copy of a warm expert has begun."""
        slot = self._where[expert]
        slot.filling = copy
        self.note_copy(slot.index, copy)

    def note_copy(self, index: int, copy: SlotCopy) -> None:
        """A copy writes a slot."""
        self._copies[index] = [*(one for one in self._copies[index] if not one.over()), copy]

    def note_work(self, experts: Iterable[Expert], work: SlotUser) -> None:
        """Queued work reads the slots of experts. What read them before is over first, see `Device.follow`."""
        for expert in experts:
            self._work[self._where[expert].index] = work

    def users(self, index: int) -> list[SlotUser]:
        """All that still writes or reads a slot, which the next copy into it must not overtake."""
        users: list[SlotUser] = list(self._copies[index])
        if (work := self._work[index]) is not None:
            users.append(work)
        return [one for one in users if not one.over()]


class _NotBegun:
    """What stands for the copy of a warm expert that nothing has begun."""

    def __init__(self, expert: Expert) -> None:
        self._expert = expert

    def done(self) -> bool:
        return False

    def wait(self) -> None:
        raise CopyError(f"the copy of expert {self._expert} has not begun")

    def cancel(self) -> bool:
        return True

    def hasten(self) -> None:
        pass

    def left_bytes(self) -> int:
        return 0
