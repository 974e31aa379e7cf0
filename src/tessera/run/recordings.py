"""When sizes of steps are recorded as graphs: after they have run as they are, so that no first token waits for it.

A recording takes as long as a hundred steps of that size. It is due when the size has come `MEETINGS` times, since it
will come again; and while there is nothing to run: first what was met, then all sizes of decode, which every load
meets on its way up and down. Whoever drives the ranks decides, and tells all of them in order with the steps: ranks
that disagreed would meet in collectives of different lengths.
"""

from __future__ import annotations

from collections import Counter

from tessera.core.config.types import GraphSizes
from tessera.plan.step import Step
from tessera.run.graphs import Size, padded

MEETINGS = 2  # as it is: for kernels and handles, and for a prompt that nothing like it follows


class Recordings:
    """Counts the sizes of steps and says which one is to be recorded. Who asks records what is answered.

    `held`: nothing is to be recorded now. `decodes`: steps of decode will come.
    """

    def __init__(self, sizes: GraphSizes, decodes: bool = True) -> None:
        self._sizes, self.held = sizes, False
        self.under_way = False  # a size was told and is not recorded yet; who records it says when it is
        self._met: Counter[Size] = Counter()  # of those that are not recorded
        self._recorded: set[Size] = set()
        self._below = float("inf")  # tokens of the smallest size that there was no memory for
        coming = [Size(rows, rows, one_each=True) for rows in sizes.rows if decodes]
        self._ahead = coming[:-1][::-1] + coming[-1:]  # from its end: the largest, whose memory serves all, then up

    @property
    def num_left(self) -> int:
        """How many would be recorded if there were nothing else to do."""
        return 0 if self.held else len(self._met.keys() | set(self._ahead))

    def due(self, step: Step) -> Size | None:
        """The size to record before `step` runs; None: it runs as what there is."""
        size = padded(step, self._sizes)
        if size is None or size in self._recorded or self.held or size.all_tokens >= self._below:
            return None
        self._met[size] += 1
        return self._note(size) if self._met[size] > MEETINGS else None

    def rest(self) -> Size | None:
        """The size to record while nothing runs."""
        if self.held:
            return None
        if self._met:
            return self._note(self._met.most_common(1)[0][0])
        return self._note(self._ahead[-1]) if self._ahead else None

    def drop(self, size: Size) -> None:
        """There was no memory for a size: neither it nor larger ones are recorded any more, smaller ones may be."""
        self._below = min(self._below, size.all_tokens)
        self._met = Counter({met: times for met, times in self._met.items() if met.all_tokens < self._below})
        self._ahead = [ahead for ahead in self._ahead if ahead.all_tokens < self._below]

    def _note(self, size: Size) -> Size:
        self.under_way = True
        self._recorded.add(size)
        self._met.pop(size, None)
        if size in self._ahead:
            self._ahead.remove(size)
        return size
