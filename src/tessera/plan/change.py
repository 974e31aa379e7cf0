"""Gathers the difference to the row table between two steps."""

from __future__ import annotations

import numpy as np

from tessera.plan.step import NO_CHANGE, NO_PAIRS, NO_TRIPLES, Change, Enter, Ints, ints


class ChangeBuilder:
    """What a step's `Change` will hold. Page changes of a row are dropped when the row leaves."""

    def __init__(self) -> None:
        self._leave: list[int] = []
        self._enter: list[Enter] = []
        self._grown: list[Ints] = []
        self._swapped: dict[int, list[tuple[int, int, int]]] = {}
        self._page_copies: list[tuple[int, int]] = []
        self._slot_copies: list[tuple[int, int]] = []
        self._zero_slots: list[int] = []
        self._empty = True

    def leave(self, rows: list[int]) -> None:
        """The occupants of rows left. Ranks never hear of one that has entered since the last step and leaves again."""
        self._empty = False
        unheard = {enter.row: enter for enter in self._enter if enter.row in rows} if self._enter else {}
        if unheard:
            self._enter = [enter for enter in self._enter if enter.row not in unheard]
            slots = {enter.slot for enter in unheard.values()}
            self._zero_slots = [slot for slot in self._zero_slots if slot not in slots]
        self._leave += [row for row in rows if row not in unheard]
        for row in rows if self._swapped else ():
            self._swapped.pop(row, None)

    def enter(self, enters: list[Enter]) -> None:
        """Sequences entered; slots of those that start at nothing are zeroed."""
        self._empty = False
        self._enter += enters
        self._zero_slots += [enter.slot for enter in enters if enter.slot >= 0 and enter.start == 0]

    def grow(self, rows: Ints, indices: Ints, pages: Ints) -> None:
        """Rows got one more page each, in a step that computes them."""
        self._empty = False
        self._grown.append(np.stack([rows, indices, pages], axis=1))

    def swap(self, row: int, index: int, page: int) -> None:
        """A row reads another page of the same content from now on."""
        self._empty = False
        self._swapped.setdefault(row, []).append((row, index, page))

    def copy(self, pages: tuple[int, int] | None, slots: tuple[int, int] | None) -> None:
        """A fork copies a part-filled page and a slot."""
        self._empty = False
        if pages is not None:
            self._page_copies.append(pages)
        if slots is not None:
            self._slot_copies.append(slots)

    def take(self) -> Change:
        """The change so far, and starts anew."""
        if self._empty:
            return NO_CHANGE
        swapped = [triple for triples in self._swapped.values() for triple in triples]
        pages = [np.array(swapped, np.int32), *self._grown] if swapped else self._grown
        change = Change(
            ints(self._leave),
            tuple(self._enter),
            np.concatenate(pages) if pages else NO_TRIPLES,
            np.array(self._page_copies, np.int32) if self._page_copies else NO_PAIRS,
            np.array(self._slot_copies, np.int32) if self._slot_copies else NO_PAIRS,
            ints(self._zero_slots),
        )
        self.__init__()  # type: ignore[misc]
        return change
