"""The row table: columns of numbers that ranks mirror, and the tokens known on the host. Memory is touched on use."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tessera.plan.config import PlannerConfig
from tessera.plan.request import Sequence
from tessera.plan.step import Ints

NEVER = np.iinfo(np.int64).max


class RowTable:
    """Columns by row.

    `computed`: positions computed by planned steps; `done`: by finished ones (the row is in flight while they differ).
    `goal`: positions to compute in all. `capacity`: positions that its pages hold. `entered`: index of the step at
    which the occupant entered (`NEVER`: the row is free); the result of an older step is not its own. `ready`: exactly
    one known token is not computed and should be. `draws`: tokens are drawn. `tokens`: those that the occupant drew, by
    position, as far as steps are done. `pages`: page tables.
    """

    def __init__(self, config: PlannerConfig) -> None:
        rows = config.max_running
        self.page_size = config.page_size
        self.computed = np.zeros(rows, np.int32)
        self.done = np.zeros(rows, np.int32)
        self.goal = np.zeros(rows, np.int32)
        self.capacity = np.zeros(rows, np.int32)
        self.entered = np.full(rows, NEVER, np.int64)
        self.ready = np.zeros(rows, np.bool_)
        self.draws = np.zeros(rows, np.bool_)
        self.priority = np.zeros(rows, np.int64)
        self.arrival = np.zeros(rows, np.int64)
        self.tokens = np.zeros((rows, config.max_context + 1), np.int32)
        self.pages = np.zeros((rows, config.max_pages), np.int32)
        self.occupants: list[Sequence | None] = [None] * rows
        self.free = list(range(rows - 1, -1, -1))

    @property
    def num_running(self) -> int:
        """Rows that are taken."""
        return len(self.occupants) - len(self.free)

    def enter(
        self, sequences: tuple[Sequence, ...], starts: tuple[int, ...], pages: list[Ints], index: int
    ) -> list[int]:
        """Puts sequences into free rows; their positions before `starts` are computed already."""
        rows = [self.free.pop() for _ in sequences]
        for sequence, row in zip(sequences, rows, strict=True):
            self.occupants[row] = sequence
            sequence.row = row
        at = np.array(rows)
        self.computed[at] = self.done[at] = starts
        self.entered[at] = index
        self.ready[at] = False
        self.goal[at] = [s.goal for s in sequences]
        self.draws[at] = [s.draws for s in sequences]
        self.priority[at] = [s.priority for s in sequences]
        self.arrival[at] = [s.arrival for s in sequences]
        counts = np.array([len(held) for held in pages])
        self.capacity[at] = counts * self.page_size
        self.pages[_cells(at, counts)] = np.concatenate(pages)
        return rows

    def leave(self, rows: list[int]) -> None:
        """Frees rows."""
        for row in rows:
            self.occupant(row).row = -1
            self.occupants[row] = None
        at = np.array(rows)
        self.entered[at] = NEVER
        self.ready[at] = False
        self.capacity[at] = 0
        self.free += rows

    def occupant(self, row: int) -> Sequence:
        """The sequence in a row that is not free."""
        sequence = self.occupants[row]
        assert sequence is not None, f"row {row} is empty"
        return sequence

    def known(self, sequence: Sequence, upto: int) -> Ints:
        """The first `upto` tokens of a sequence in a row; at most one more than are done."""
        before = sequence.num_known
        if upto <= before:
            return sequence.tokens[:upto]
        return np.concatenate([sequence.tokens, self.tokens[sequence.row, before:upto]])

    def held(self, *rows: int) -> Ints:
        """Pages of rows, one after the other."""
        if len(rows) == 1:
            return self.pages[rows[0], : self.capacity[rows[0]] // self.page_size]
        at = np.array(rows)
        return self.pages[_cells(at, self.capacity[at] // self.page_size)]

    def holders(self, page: int, index: int) -> list[int]:
        """Rows whose page tables name `page` at `index`: sequences that share it share all before it too."""
        found = (self.pages[:, index] == page) & (self.capacity > index * self.page_size)
        return np.flatnonzero(found).tolist()

    def standing(self) -> Ints:
        """Rows that are taken, by the place of their sequences among all (see `policy.standing`), first one first."""
        rows = np.flatnonzero(self.entered != NEVER).astype(np.int32)
        return rows[np.lexsort((self.arrival[rows], -self.priority[rows]))]

    def running(self) -> list[Sequence]:
        """Sequences in rows."""
        return [s for s in self.occupants if s is not None]


def _cells(rows: Ints, counts: Ints) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows and columns of the first `counts[i]` cells of each of `rows`."""
    columns = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(rows, counts), columns
