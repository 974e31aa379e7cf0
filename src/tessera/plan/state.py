"""What one DP rank holds: rows, pages, slots, the prefix tree, and the moves between them.

When a row is released (`release`) its pages and slot are free at once, and the next step's change names it in `leave`.
The row may be entered again by that same step, and its pages and slot reused: steps run in order, so one in flight
(an overshoot range of a sequence that ended, or one that was aborted) reads and writes what it was planned on before
the next step begins. Its result belongs to the old occupant: `RowTable.entered` holds the step index at which the
occupant entered, and a result of an older step is dropped.
"""

from __future__ import annotations

from collections import deque
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from tessera.plan.balance import Load
from tessera.plan.change import ChangeBuilder
from tessera.plan.config import PlannerConfig
from tessera.plan.pages import PagePool
from tessera.plan.policy import Queue
from tessera.plan.prefix import Node, PrefixTree
from tessera.plan.request import Sequence, grouped
from tessera.plan.slots import SlotPool
from tessera.plan.step import NO_INTS, Enter, Ints, ints
from tessera.plan.table import RowTable


class Lease(NamedTuple):
    """Pages and slot that another server reads from or writes to; nobody's row holds them. `quiet_from`: a row did,
    perhaps, until that step was planned, so steps before it may touch them."""

    pages: Ints
    slot: int
    quiet_from: int = 0


class RankState:
    """Resources of one DP rank and who holds them."""

    def __init__(self, config: PlannerConfig, dp_rank: int) -> None:
        self.config = config
        self.table = RowTable(config)
        self.pages = PagePool(config.num_pages)
        self.slots = SlotPool(config.num_slots)
        self.prefix = PrefixTree(self.pages, config.page_size, config.weights_version, config.prefix_cache)
        self.queue = Queue(config.policy)
        self.load = Load(dp_rank)
        self.change = ChangeBuilder()
        self.prefilling: dict[Sequence, None] = {}  # prompts under way, in the order in which they were admitted
        self.leaders: dict[Sequence, None] = {}  # computed but for the last token, with choices that wait to fork
        self.leases: dict[int, Lease] = {}  # by key of the hand-over
        self.away: dict[Sequence, None] = {}  # neither queued nor in a row: their hand-over is not that far
        self.arrived: deque[Sequence] = deque()  # prompts that are there; they wait for a row
        self.num_preempted = 0
        self._admitted: list[tuple[Sequence, Ints, int, int]] = []  # sequence, cached pages, start, pages promised
        self._num_promised = 0

    def take_pages(self, count: int) -> Ints:
        """`count` available pages, evicting idle ones of the prefix tree where too few are free."""
        if count > self.pages.num_free:
            self.prefix.evict(count - self.pages.num_free)
        return self.pages.take(count)

    @property
    def num_spare(self) -> int:
        """Pages that are spoken for by nobody: one is left for every row and every lease, which may need its next."""
        pages = self.pages
        return pages.num_free + pages.num_idle - self.table.num_running - self._num_promised - len(self.leases)

    # -- into a row ------------------------------------------------------------------------------------------------

    def admit(self, sequence: Sequence) -> bool:
        """Promises a row, a slot, and pages for all that is known of it, which `seat` gives; False: no room now."""
        admitted = self._admitted
        if len(admitted) >= len(self.table.free) or len(admitted) >= self.slots.room:
            return False
        num_known, size = min(len(sequence.tokens), sequence.goal), self.config.page_size
        sequence.node, cached = self.match(sequence) if self.prefix.enabled else (None, NO_INTS)
        num_cached = len(cached)
        if num_cached:
            self.pages.share(cached)  # first, so that they are not counted as available
        num_soon = -(-min(num_known + 1, sequence.goal) // size) - num_cached  # with the page of its next token
        if num_soon > self.num_spare:
            if num_cached:
                self.pages.drop(cached)
            return False
        start = sequence.num_computed = num_cached * size
        if num_cached:
            self.prefix.touch(cached)
        if not sequence.entered:
            sequence.num_cached = start
        sequence.num_published = num_cached
        num_fresh = -(-num_known // size) - num_cached
        admitted.append((sequence, cached, start, num_fresh))
        self._num_promised += num_fresh + 1
        return True

    def seat(self, index: int) -> None:
        """Who was admitted enters a row, at step `index`."""
        if not self._admitted:
            return
        sequences, cached, starts, counts = zip(*self._admitted, strict=True)
        ends = list(accumulate(counts))
        fresh = self.take_pages(ends[-1])
        pages = [
            np.concatenate([shared, fresh[end - count : end]]) if len(shared) else fresh[end - count : end]
            for shared, count, end in zip(cached, counts, ends, strict=True)
        ]
        self._enter(sequences, starts, pages, self.slots.take(len(sequences)), index)
        self._admitted, self._num_promised = [], 0

    def match(self, sequence: Sequence) -> tuple[Node, Ints]:
        """Deepest node of the tree for a waiting sequence, and its pages; positions that need logits are computed."""
        return self.prefix.match(sequence.namespace, sequence.tokens, sequence.reusable)

    def fork(self, parent: Sequence, index: int, most: int) -> tuple[Sequence, ...]:
        """Choices that wait for `parent`, all of whose prompt but the last token is computed, enter beside it.

        At most `most` of them, and as many as there is room for; the others wait in the queue as a group of their own.
        They share full pages and copy a part-filled one (which only `parent` writes) and the slot.
        """
        waiting, parent.forks = parent.forks, ()
        position = parent.num_prompt - 1
        at, inside = divmod(position, self.config.page_size)
        held = self.table.held(parent.row)
        room = min(most, len(self.table.free), self.slots.room, (self.num_spare + 1) // 2)  # a page, and the next one
        children, waiting = waiting[: max(room, 0)], waiting[max(room, 0) :]
        if children:
            own = self.take_pages(len(children))
            for child in children:
                self.pages.share(held[:at])
                child.leader, child.num_computed, child.num_cached = None, position, parent.num_cached
                child.node, child.num_published = parent.node, parent.num_published
            pages = [np.append(held[:at], page) for page in own]
            self._enter(children, (position,) * len(children), pages, self.slots.take(len(children)), index)
        for child in children:
            copied = (int(held[at]), int(self.table.pages[child.row, at])) if inside else None
            self.change.copy(copied, (parent.slot, child.slot) if parent.slot >= 0 else None)
        for leader in grouped(waiting):
            self.queue.push(leader)
        return children

    def _enter(
        self, sequences: tuple[Sequence, ...], starts: tuple[int, ...], pages: list[Ints], slots: list[int], index: int
    ) -> None:
        rows = self.table.enter(sequences, starts, pages, index)
        enters = []
        for s, row, slot, start, held in zip(sequences, rows, slots, starts, pages, strict=True):
            s.slot, s.entered = slot, True
            enters.append(
                Enter(
                    row,
                    s.request_id,
                    s.choice,
                    s.tokens,
                    s.num_prompt,
                    start,
                    held,
                    slot,
                    s.params,
                    s.seed,
                    s.num_cached,
                    s.key >= 0 and s.route is None,
                    s.route is not None,
                )
            )
        self.change.enter(enters)

    # -- for other servers -----------------------------------------------------------------------------------------

    def lease(self, sequence: Sequence) -> Lease | None:
        """Sets pages and a slot aside for a prompt that another server writes; None: no room now.

        Not before those who wait in the queue, and no more than there are rows for.
        """
        num_known, config = len(sequence.tokens), self.config
        if self.queue.num_waiting or len(self.leases) >= len(self.table.free) or not self.slots.room:
            return None
        if config.pages_for(min(num_known + 1, sequence.goal)) > self.num_spare:
            return None
        pages, (slot,) = self.take_pages(config.pages_for(num_known)), self.slots.take(1)
        quiet = max(int(self.pages.quiet_from[pages].max()), int(self.slots.quiet_from[max(slot, 0)]))
        lease = self.leases[sequence.key] = Lease(pages, slot, quiet)
        return lease

    def detach(self, sequence: Sequence) -> None:
        """A sequence leaves its row, but its pages and slot stay as they are until `lapse`."""
        self.publish(sequence)
        pages = np.concatenate([self.table.held(sequence.row), ints(sequence.swapped)])
        self.leases[sequence.key] = Lease(pages, sequence.slot)
        self._vacate([sequence])

    def lapse(self, key: int) -> None:
        """Pages and slot of a lease, if there is one, are free."""
        lease = self.leases.pop(key, None)
        if lease is not None:
            self.pages.drop(lease.pages)
            self.slots.drop([lease.slot])

    def seat_arrived(self, index: int) -> bool:
        """Who was handed over enters a row at step `index`, all that is known of it but the last token computed."""
        seated = False
        while self.arrived and self.table.free:
            sequence, seated = self.arrived.popleft(), True
            lease, start = self.leases.pop(sequence.key), sequence.num_known - 1
            del self.away[sequence]
            self._enter((sequence,), (start,), [lease.pages], [lease.slot], index)
            sequence.num_computed, sequence.key = start, -1
            self.table.ready[sequence.row] = True
            if sequence.forks:
                self.leaders[sequence] = None
        return seated

    # -- out of a row ----------------------------------------------------------------------------------------------

    def publish(self, sequence: Sequence) -> None:
        """Gives the tree, where there is one, the full pages of a row whose steps are done."""
        if not self.prefix.enabled:
            return
        table, row, size = self.table, sequence.row, self.config.page_size
        depth, upto = sequence.num_published, int(table.done[row]) // size
        if upto <= depth:
            return
        node = sequence.node or self.prefix.root(sequence.namespace)
        tokens = table.known(sequence, upto * size)[depth * size :]
        sequence.node, swaps = self.prefix.publish(node, tokens, table.pages[row, depth:upto])
        sequence.num_published = upto
        for i, page in swaps:
            if sequence.route is not None:  # its own page may be read by a writer still
                sequence.swapped += (int(table.pages[row, depth + i]),)
                self.pages.share(table.pages[row, depth + i : depth + i + 1])
            self._swap(row, depth + i, page)
        self.prefix.touch(table.pages[row, :upto])

    def _swap(self, row: int, index: int, page: int) -> None:
        """`row` takes a page of the tree in place of its own; so do the forks that share it, since who holds a page of
        the tree must hold all above it."""
        table = self.table
        own = int(table.pages[row, index])
        holders = [row] if self.pages.refs[own] == 1 else table.holders(own, index)
        for holder in holders:
            self.pages.share(ints([page]))
            table.pages[holder, index] = page
            self.change.swap(holder, index, page)
        self.pages.drop(ints([own] * len(holders)))

    def release(self, sequences: list[Sequence]) -> None:
        """Sequences leave their rows; what is done of them goes to the tree, pages and slots are free."""
        for sequence in sequences:
            self.publish(sequence)
        rows = [sequence.row for sequence in sequences]
        self.pages.drop(self.table.held(*rows))
        self.slots.drop([sequence.slot for sequence in sequences])
        self._vacate(sequences)

    def _vacate(self, sequences: list[Sequence]) -> None:
        rows = [sequence.row for sequence in sequences]
        self.change.leave(rows)
        self.table.leave(rows)
        for sequence in sequences:
            sequence.slot, sequence.node, sequence.num_published = -1, None, 0
        for group in (self.prefilling, self.leaders):
            for sequence in sequences if group else ():
                group.pop(sequence, None)

    def preempt(self, sequence: Sequence) -> None:
        """Back to the queue with all that is known of it; nothing of it may be in flight, so all is known here."""
        table, row = self.table, sequence.row
        done = int(table.done[row])
        assert table.computed[row] == done, "a sequence in flight cannot be preempted"
        if done >= sequence.num_known:
            sequence.tokens = table.known(sequence, done + 1)
        self.release([sequence])
        self.queue.push(sequence)
        self.num_preempted += 1

    def check(self) -> None:
        """Pages, slots and rows are conserved, and nobody writes a page that somebody else holds."""
        table, size = self.table, self.config.page_size
        held = np.zeros(self.config.num_pages, np.int32)
        held[self.prefix.pages()] += 1
        running = table.running()
        for sequence in running:
            row = sequence.row
            assert table.occupants[row] is sequence
            assert sequence.live
            assert table.done[row] <= table.computed[row] <= table.goal[row] == sequence.goal
            assert table.computed[row] <= table.capacity[row]
            pages = table.held(row)
            held[pages] += 1
            held[ints(sequence.swapped)] += 1
            writable = pages[int(table.computed[row]) // size :]
            assert (self.pages.refs[writable] == 1).all(), f"row {row} would write a page that others hold"
            assert not (sequence in self.prefilling and table.ready[row])
        for lease in self.leases.values():
            held[lease.pages] += 1
        self.pages.check(held)
        self.slots.check([*(s.slot for s in running), *(lease.slot for lease in self.leases.values())])
        assert all(s.row == -1 and s.slot == -1 and s.live for s in self.away)
        assert all(s in self.away and s.key in self.leases for s in self.arrived)
        self.prefix.check()
        free = set(table.free)
        assert len(free) == len(table.free)
        assert {s.row for s in running} | free == set(range(len(table.occupants)))
        assert len(running) == table.num_running
        assert all((table.entered[row] > 2**62) == (row in free) for row in range(len(table.occupants)))
        assert all(s.row == -1 and s.slot == -1 for s in self.queue.waiting())
        assert len(self.queue.waiting()) == self.queue.num_waiting
