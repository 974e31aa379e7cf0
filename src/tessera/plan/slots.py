"""The slot pool: one recurrent state per sequence in a row. Slot 0 is scratch and never given out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

UNLIMITED = 1 << 30


class SlotPool:
    """`num_slots` slots, the scratch slot included; 0 for a model without recurrent state, which always has room.
    `next_step`, `quiet_from`: as of pages."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._stack = np.arange(num_slots - 1, 0, -1, dtype=np.int32)
        self.num_free = max(num_slots - 1, 0)
        self.next_step = 0
        self.quiet_from = np.zeros(max(num_slots, 1), np.int64)

    @property
    def room(self) -> int:
        """How many more sequences can have a slot; a model without recurrent state sets no limit."""
        return self.num_free if self.num_slots else UNLIMITED

    @property
    def num_used(self) -> int:
        """Slots that a sequence holds."""
        return max(self.num_slots - 1, 0) - self.num_free

    def take(self, count: int) -> list[int]:
        """`count` free slots; -1 for each without recurrent state."""
        if self.num_slots == 0:
            return [-1] * count
        assert count <= self.num_free, f"{count} slots asked of {self.num_free} free ones"
        self.num_free -= count
        taken: list[int] = self._stack[self.num_free : self.num_free + count].tolist()
        return taken

    def drop(self, slots: Sequence[int]) -> None:
        """Give slots back; without recurrent state there is nothing to give."""
        if self.num_slots:
            self.quiet_from[slots] = self.next_step
            self._stack[self.num_free : self.num_free + len(slots)] = slots
            self.num_free += len(slots)

    def check(self, held: Sequence[int]) -> None:
        """Conservation, given the slots that sequences hold."""
        if self.num_slots == 0:
            assert all(slot == -1 for slot in held), "a slot is held though there are none"
            return
        free = self._stack[: self.num_free].tolist()
        assert sorted([*free, *held]) == list(range(1, self.num_slots)), "free and held slots are not all, each once"
