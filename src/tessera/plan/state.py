"""What one DP rank holds: rows, pages, slots, the prefix tree, and the moves between them.

When a row is released (`release`) its pages and slot are free at once, and the next step's change names it in `leave`.
The row may be entered again by that same step, and its pages and slot reused: steps run in order, so one in flight
(an overshoot range of a sequence that ended, or one that was aborted) reads and writes what it was planned on before
the next step begins. Its result belongs to the old occupant: `RowTable.entered` holds the step index at which the
occupant entered, and a result of an older step is dropped.
"""

from __future__ import annotations

import numpy as np

from tessera.plan.change import ChangeBuilder
from tessera.plan.config import PlannerConfig
from tessera.plan.pages import PagePool
from tessera.plan.policy import Load, Queue
from tessera.plan.prefix import Node, PrefixTree
from tessera.plan.request import Sequence, grouped
from tessera.plan.slots import SlotPool
from tessera.plan.step import Enter, Ints, ints
from tessera.plan.table import RowTable


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
        self.num_preempted = 0

    def take_pages(self, count: int) -> Ints:
        """`count` available pages, evicting idle ones of the prefix tree where too few are free."""
        if count > self.pages.num_free:
            self.prefix.evict(count - self.pages.num_free)
        return self.pages.take(count)

    def room_for(self, count: int) -> bool:
        """`count` pages can be taken and one is left for every running row, which may need its next one."""
        return self.pages.available >= count + self.table.num_running

    # -- into a row ------------------------------------------------------------------------------------------------

    def admit(self, sequence: Sequence, index: int) -> bool:
        """The sequence enters a row at step `index` with pages for all that is known of it; False: no room now."""
        if not (self.table.free and self.slots.has_room):
            return False
        node, cached = self.match(sequence)
        num_fresh = self.config.pages_for(sequence.num_known) - len(cached)
        if len(cached):
            self.pages.share(cached)  # first, so that they are not counted as available
        if not self.room_for(num_fresh):
            self.pages.drop(cached)
            return False
        pages = self.take_pages(num_fresh)
        start = len(cached) * self.config.page_size
        if len(cached):
            self.prefix.touch(cached)
            pages = np.concatenate([cached, pages])
        if not sequence.entered:
            sequence.num_cached = start
        sequence.node, sequence.num_published = node, len(cached)
        self._enter(sequence, pages, start, self.slots.take(), index)
        return True

    def match(self, sequence: Sequence) -> tuple[Node | None, Ints]:
        """Deepest node of the tree for a waiting sequence, and its pages; positions that need logits are computed."""
        if not self.prefix.enabled:
            return None, ints()
        return self.prefix.match(sequence.namespace, sequence.tokens, sequence.logits_from)

    def fork(self, parent: Sequence, index: int, most: int) -> list[Sequence]:
        """Choices that wait for `parent`, all of whose prompt but the last token is computed, enter beside it.

        At most `most` of them, and as many as there is room for; the others wait in the queue as a group of their own.
        They share full pages and copy a part-filled one (which only `parent` writes) and the slot.
        """
        waiting, parent.forks = parent.forks, []
        position = parent.num_prompt - 1
        at, inside = divmod(position, self.config.page_size)
        held = self.table.held(parent.row)
        children: list[Sequence] = []
        while waiting and len(children) < most and self.table.free and self.slots.has_room and self.room_for(1):
            child = waiting.pop(0)
            child.leader = None
            own = self.take_pages(1)
            self.pages.share(held[:at])
            slot = self.slots.take()
            child.node, child.num_published, child.num_cached = parent.node, parent.num_published, parent.num_cached
            self._enter(child, np.concatenate([held[:at], own]), position, slot, index)
            self.change.copy(
                (int(held[at]), int(own[0])) if inside else None,
                (parent.slot, slot) if slot >= 0 else None,
            )
            children.append(child)
        for leader in grouped(waiting):
            self.queue.push(leader)
        return children

    def _enter(self, sequence: Sequence, pages: Ints, start: int, slot: int, index: int) -> None:
        row = self.table.enter(sequence, pages, start, index)
        sequence.slot, sequence.entered = slot, True
        self.change.enter(
            Enter(
                row,
                sequence.request_id,
                sequence.choice,
                sequence.tokens,
                sequence.num_prompt,
                start,
                pages,
                slot,
                sequence.params,
                sequence.seed,
                sequence.num_cached,
            )
        )

    # -- out of a row ----------------------------------------------------------------------------------------------

    def publish(self, sequence: Sequence) -> None:
        """Gives the tree the full pages of a row whose steps are done."""
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
        for sequence in sequences if self.prefix.enabled else ():
            self.publish(sequence)
        rows = [sequence.row for sequence in sequences]
        self.pages.drop(self.table.held(*rows))
        self.slots.drop([sequence.slot for sequence in sequences])
        self.change.leave(rows)
        self.table.leave(rows)
        for sequence in sequences:
            sequence.slot, sequence.node, sequence.num_published = -1, None, 0
            self.prefilling.pop(sequence, None)
            self.leaders.pop(sequence, None)

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
            writable = pages[int(table.computed[row]) // size :]
            assert (self.pages.refs[writable] == 1).all(), f"row {row} would write a page that others hold"
            assert not (sequence in self.prefilling and table.ready[row])
        self.pages.check(held)
        self.slots.check([s.slot for s in running])
        self.prefix.check()
        free = set(table.free)
        assert len(free) == len(table.free)
        assert {s.row for s in running} | free == set(range(len(table.occupants)))
        assert len(running) == table.num_running == len(table.occupants) - len(free)
        assert all((table.entered[row] > 2**62) == (row in free) for row in range(len(table.occupants)))
        assert all(s.row == -1 and s.slot == -1 for s in self.queue.waiting())
        assert len(self.queue.waiting()) == self.queue.num_waiting
