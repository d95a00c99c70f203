"""The device's memory for experts: a slot table (planning/slots.py) and the bytes behind it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..planning.slots import Expert, SlotTable


class SlotPool(SlotTable):
    """Who is in which slot, with the memory of each.

    Args:
        memory: uint8 [slots, slot_bytes] on the device.
        held, warm: as in `SlotTable`; who fills the memory of the warm ones is not said here.
    """

    def __init__(self, memory: Tensor, held: Iterable[Expert] = (), warm: Iterable[Expert] = ()) -> None:
        super().__init__(memory.shape[0], held, warm)
        self.memory = memory
        self._rows = memory.unbind(0)  # made once: a step asks for eight of them a layer

    def __getitem__(self, expert: Expert) -> Tensor:
        """The bytes of an expert's slot: uint8 [slot_bytes] on the device."""
        slot = self.find(expert)
        if slot is None:
            raise KeyError(expert)
        return self._rows[slot.index]

    def row(self, index: int) -> Tensor:
        """The bytes of a slot: uint8 [slot_bytes] on the device."""
        return self._rows[index]

    @property
    def n_bytes(self) -> int:
        """Bytes of device memory that the pool takes."""
        return self.memory.numel()
