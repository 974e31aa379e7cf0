"""The page pool: reference counts and a free stack. Page 0 is scratch and never given out.

A page's holders are the rows whose page tables name it, the prefix tree, and copies planned but not yet in a step. A
page of the tree that nobody else holds is *idle*: it can be taken back, so it counts as available.
"""

from __future__ import annotations

import numpy as np

from tessera.plan.step import Ints


class PagePool:
    """`num_pages` pages, the scratch page included.

    `next_step`: steps before it may be under way. `quiet_from`: of each page the first step that was planned when no
    row held it any more: once those before it are done, none touches it.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.refs = np.zeros(num_pages, np.int32)
        self.cached = np.zeros(num_pages, np.bool_)
        self.num_idle = 0
        self.next_step = 0
        self.quiet_from = np.zeros(num_pages, np.int64)
        self._stack = np.arange(num_pages - 1, 0, -1, dtype=np.int32)
        self.num_free = num_pages - 1

    @property
    def available(self) -> int:
        """Pages that are free or can be taken back from the prefix tree."""
        return self.num_free + self.num_idle

    @property
    def num_used(self) -> int:
        """Pages that somebody holds."""
        return self.num_pages - 1 - self.num_free

    def take(self, count: int) -> Ints:
        """`count` free pages, held once."""
        assert count <= self.num_free, f"{count} pages asked of {self.num_free} free ones"
        self.num_free -= count
        pages = self._stack[self.num_free : self.num_free + count].copy()
        self.refs[pages] = 1
        return pages

    def share(self, pages: Ints) -> None:
        """One more holder of each of `pages` (distinct, held)."""
        before = self.refs[pages]
        assert (before > 0).all(), "a free page cannot be shared"
        self.num_idle -= int(np.count_nonzero(self.cached[pages] & (before == 1)))
        self.refs[pages] = before + 1

    def drop(self, pages: Ints) -> None:
        """One holder less of each of `pages`, which are named once by each holder that gives them up."""
        pages = np.sort(pages)  # runs of equal pages: ten times as fast as np.unique and np.subtract.at
        last = np.concatenate([np.flatnonzero(pages[1:] != pages[:-1]), [len(pages) - 1]])
        pages, times = pages[last], np.diff(last, prepend=-1)
        after = self.refs[pages] - times
        assert (after >= 0).all(), "a page was dropped more often than held"
        self.refs[pages] = after
        self.num_idle += int(np.count_nonzero(self.cached[pages] & (after == 1)))
        self.quiet_from[pages] = self.next_step
        self._push(pages[after == 0])

    def num_alone(self, pages: Ints) -> int:
        """How many of `pages` one of their holders could free by giving them up: the others that hold them are idle."""
        return int(np.count_nonzero(self.refs[pages] - self.cached[pages] == 1))

    def cache(self, page: int) -> None:
        """The prefix tree becomes a holder of `page`, which somebody else holds."""
        assert self.refs[page] > 0
        assert not self.cached[page]
        self.refs[page] += 1
        self.cached[page] = True

    def evict(self, page: int) -> None:
        """The prefix tree gives up an idle page."""
        assert self.cached[page]
        assert self.refs[page] == 1
        self.cached[page] = False
        self.refs[page] = 0
        self.num_idle -= 1
        self._push(np.array([page], np.int32))

    def _push(self, pages: Ints) -> None:
        self._stack[self.num_free : self.num_free + len(pages)] = pages
        self.num_free += len(pages)

    def check(self, held: Ints) -> None:
        """Conservation, given the number of holders of every page as counted by the owner."""
        assert held[0] == 0, "the scratch page is held"
        assert np.array_equal(self.refs, held), f"pages {np.flatnonzero(self.refs != held)} have wrong counts"
        free = self._stack[: self.num_free]
        assert len(np.unique(free)) == self.num_free, "a page is free twice"
        assert not self.refs[free].any(), "a free page is held"
        assert self.num_free + np.count_nonzero(self.refs) == self.num_pages - 1, "free and used pages are not all"
        assert self.num_idle == np.count_nonzero(self.cached & (self.refs == 1)), "idle pages are miscounted"
