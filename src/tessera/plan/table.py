"""The row table: columns of numbers that ranks mirror, and the tokens known on the host. Memory is touched on use."""

from __future__ import annotations

import numpy as np

from tessera.plan.config import PlannerConfig
from tessera.plan.request import Sequence
from tessera.plan.step import Ints

NEVER = np.iinfo(np.int64).max


class RowTable:
    """Columns by row.

    `computed`: positions computed by planned steps; `done`: by finished ones (the row is in flight while they differ).
    `goal`: positions to compute in all. `capacity`: positions that its pages hold. `entered`: index of the step at
    which the occupant entered (`NEVER`: the row is free); the result of an older step is not its own. `ready`: exactly
    one known token is not computed and should be. `draws`: tokens are drawn. `tokens`: known tokens, as far as steps
    are done. `pages`: page tables.
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
        self.tokens = np.zeros((rows, config.max_context + 1), np.int32)
        self.pages = np.zeros((rows, config.max_pages), np.int32)
        self.occupants: list[Sequence | None] = [None] * rows
        self.free = list(range(rows - 1, -1, -1))
        self.num_running = 0

    def enter(self, sequence: Sequence, pages: Ints, start: int, index: int) -> int:
        """Puts a sequence into a free row; its positions before `start` are computed already."""
        row = self.free.pop()
        self.num_running += 1
        self.occupants[row] = sequence
        sequence.row = row
        self.computed[row] = self.done[row] = sequence.num_computed = start
        self.goal[row] = sequence.goal
        self.capacity[row] = len(pages) * self.page_size
        self.entered[row] = index
        self.ready[row] = False
        self.draws[row] = sequence.draws
        self.tokens[row, : len(sequence.tokens)] = sequence.tokens
        self.pages[row, : len(pages)] = pages
        return row

    def leave(self, row: int) -> None:
        """Frees a row."""
        sequence = self.occupant(row)
        sequence.row = -1
        self.occupants[row] = None
        self.entered[row] = NEVER
        self.ready[row] = False
        self.free.append(row)
        self.num_running -= 1

    def occupant(self, row: int) -> Sequence:
        """The sequence in a row that is not free."""
        sequence = self.occupants[row]
        assert sequence is not None, f"row {row} is empty"
        return sequence

    def held(self, row: int) -> Ints:
        """Pages of a row."""
        return self.pages[row, : self.capacity[row] // self.page_size]

    def running(self) -> list[Sequence]:
        """Sequences in rows."""
        return [s for s in self.occupants if s is not None]
