"""Copies of experts into slots: begins them, brings those that are to be there from the start, settles after a failure.

A copy goes behind all that still reads or writes its slot, whichever thread and stream that belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from ..compute.experts import ExpertMath
from ..devices import Device
from ..errors import CopyError
from ..memory.slots import SlotPool
from ..memory.store import ExpertStore
from ..planning.clock import Clock
from ..planning.contract import Move
from ..planning.slots import Transfer


class Copies:
    """The copies of one conductor."""

    def __init__(
        self, math: Sequence[ExpertMath], device: Device, store: ExpertStore, slots: SlotPool, clock: Clock
    ) -> None:
        self._math, self._device, self._store, self._slots, self._clock = math, device.accelerator, store, slots, clock
        self._expert_bytes = [of.format.expert_bytes(of.shape) for of in math]
        self._to_warm = slots.warm
        self._failed = 0 if self._device is None else self._device.link.counters.failed  # as far as the slots know
        self.is_unsettled = False  # something failed, and the rest has not come to an end

    def start(self, move: Move, after_s: float = 0.0) -> None:
        """Start a copy; one that is there or on its way is joined.

        Args:
            after_s: when the clock expects the work that still reads the slot in this step to be over.
        """
        key, math = move.expert, self._math[move.expert[0]]
        part = range(self._expert_bytes[key[0]])
        if move.neurons is not None:
            part = math.format.byte_range(math.shape, move.neurons)

        def fill(index: int, before: Transfer | None) -> tuple[Transfer, float]:
            source, target = self._store[key], self._slots.row(index)
            if move.neurons is not None:
                source = source[part.start : part.stop]
            if source.numel() != target.numel():
                target = target[part.start : part.stop]
            assert self._device is not None  # there are slots
            copy = self._device.copy(source, target, move.urgent, key, self._slots.users(index))
            self._slots.note_copy(index, copy)
            timed = self._clock.copy(key, len(part), move.urgent, after_s, before, copy)
            return timed, self._clock.arrival_s(timed, move.urgent)

        self._slots.load(key, move.evict, fill, len(part), move.keep, move.urgent, move.neurons is not None)

    def warm(self) -> None:
        """Bring the experts that are to be in slots before the first step; costs no time of a virtual clock."""
        keys, self._to_warm = self._to_warm, ()
        copies = []
        for key in keys:
            if self._slots.find(key) is None:  # after an interrupt
                continue
            assert self._device is not None
            source = self._store[key]
            copies.append(self._device.copy(source, self._slots[key][: source.numel()], False, key))
            self._slots.fill_warm(key, copies[-1])
        for copy in copies:
            with suppress(CopyError):  # the link has counted it, and `forget_failed` empties the slot
                copy.wait()

    def forget_failed(self) -> None:
        """Empty the slots of copies that failed: not before a policy is told, which may have them down as coming."""
        if self._device is not None and self._device.link.counters.failed != self._failed:
            self._failed = self._device.link.counters.failed
            self._slots.forget_unfinished()

    def settle(self) -> None:
        """After a failure or an interrupt: nothing is on its way any longer, and only held experts are in slots."""
        self.is_unsettled = True  # until it is done, also if this is interrupted in turn
        if self._device is not None:
            self._device.link.settle()
        self._slots.forget_all()
        self.is_unsettled = False

    def finish_settling(self) -> None:
        """Do it if it was interrupted."""
        if self.is_unsettled:
            self.settle()
