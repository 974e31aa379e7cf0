"""Each promise of the planner can be broken: the fault is put in, and the trace that needs the promise goes red."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from plan import scenarios
from plan.fake import World
from tessera.plan.balance import BALANCES
from tessera.plan.change import ChangeBuilder
from tessera.plan.dp_rank import DpRank
from tessera.plan.pages import PagePool
from tessera.plan.prefix import PrefixTree
from tessera.plan.slots import SlotPool
from tessera.plan.state import RankState
from tessera.plan.step import NO_INTS, Ints, Part
from tessera.plan.table import RowTable

Patch = pytest.MonkeyPatch
Scenario = Callable[[], World]
ALL: list[Scenario] = [
    scenarios.shared_prefix,
    scenarios.evicting,
    scenarios.crowded,
    scenarios.growing,
    scenarios.riding,
    scenarios.turns,
    scenarios.long_while_alone,
    scenarios.turns_together,
    scenarios.full_chunks,
    scenarios.aborted_in_flight,
    scenarios.forked,
    scenarios.twins,
    scenarios.one_slot,
    scenarios.spread,
    scenarios.halved,
]


@pytest.mark.parametrize("scenario", ALL, ids=lambda s: s.__name__)
def test_it_runs_clean(scenario: Scenario) -> None:
    scenario()


def around(patch: Patch, owner: type, name: str, body: Callable[..., Any]) -> None:
    """Replaces a method by `body(original, self, ...)`."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda self, *args: body(original, self, *args))


def shared_pages_are_not_counted(patch: Patch) -> None:
    patch.setattr(PagePool, "share", lambda self, pages: None)


def dropped_pages_are_free_whoever_holds_them(patch: Patch) -> None:
    def drop(self: PagePool, pages: Ints) -> None:
        held = np.unique(pages[self.refs[pages] > 0])
        self.refs[held] = 0
        self._push(held)

    patch.setattr(PagePool, "drop", drop)


def pages_in_use_are_evicted(patch: Patch) -> None:
    def evict(self: PrefixTree, count: int) -> int:
        for page in [page for page, node in self._nodes.items() if not node.children][:count]:
            node = self._nodes.pop(page)
            del node.parent.children[node.key]  # type: ignore[union-attr]
            self._pool.num_idle += int(self._pool.refs[page] > 1)
            self._pool.refs[page] = 1
            self._pool.evict(page)
        return count

    patch.setattr(PrefixTree, "evict", evict)


def admission_takes_the_last_page(patch: Patch) -> None:
    patch.setattr(RankState, "num_spare", property(lambda self: self.pages.available - self._num_promised))


def a_preempted_sequence_forgets_what_it_drew(patch: Patch) -> None:
    def preempt(real: Any, self: RankState, sequence: Any) -> None:
        tokens = sequence.tokens
        real(self, sequence)
        sequence.tokens = tokens

    around(patch, RankState, "preempt", preempt)


def a_preempted_sequence_keeps_its_pages(patch: Patch) -> None:
    def preempt(real: Any, self: RankState, sequence: Any) -> None:
        self.pages.share(self.table.held(sequence.row))
        real(self, sequence)

    around(patch, RankState, "preempt", preempt)


def a_slot_is_never_given_back(patch: Patch) -> None:
    patch.setattr(SlotPool, "drop", lambda self, slots: None)


def a_slot_keeps_its_last_state(patch: Patch) -> None:
    def enter(real: Any, self: ChangeBuilder, enters: Any) -> None:
        real(self, enters)
        self._zero_slots.clear()

    around(patch, ChangeBuilder, "enter", enter)


def a_row_in_flight_is_preempted(patch: Patch) -> None:
    def make_room(real: Any, self: DpRank, rows: Ints, need: Any) -> Any:
        self.state.table.done[rows] = self.state.table.computed[rows]
        return real(self, rows, need)

    around(patch, DpRank, "_make_room", make_room)


def decodes_that_ride_are_not_counted(patch: Patch) -> None:
    def prefill(real: Any, self: DpRank, ranges: Any, index: int, alone: bool) -> None:
        rows, ranges.rows = ranges.rows, NO_INTS
        real(self, ranges, index, alone)
        ranges.rows = rows

    around(patch, DpRank, "_prefill", prefill)


def a_rank_looks_only_at_itself(patch: Patch) -> None:
    around(patch, DpRank, "plan", lambda real, self, index, turn, _: real(self, index, turn, not self.decodes))


def prompts_always_go_first(patch: Patch) -> None:
    around(patch, DpRank, "plan", lambda real, self, index, prompts_first, alone: real(self, index, True, alone))


def each_rank_takes_turns_by_itself(patch: Patch) -> None:
    turns: dict[int, bool] = {}

    def plan(real: Any, self: DpRank, index: int, prompts_first: bool, alone: bool) -> Any:
        part, record = real(self, index, turns.get(id(self), True), alone)
        turns[id(self)] = not record.prefilled
        return part, record

    around(patch, DpRank, "plan", plan)


def decodes_ride_though_they_fill_the_chunk(patch: Patch) -> None:
    patch.setattr(DpRank, "_rides", lambda self: self.config.mixed)


def results_go_to_whoever_sits_in_the_row_now(patch: Patch) -> None:
    def enter(real: Any, self: RowTable, *args: Any) -> list[int]:
        rows = real(self, *args)
        self.entered[rows] = 0
        return rows

    around(patch, RowTable, "enter", enter)


def a_fork_copies_no_page(patch: Patch) -> None:
    around(patch, ChangeBuilder, "copy", lambda real, self, pages, slots: real(self, None, slots))


def a_fork_copies_no_slot(patch: Patch) -> None:
    around(patch, ChangeBuilder, "copy", lambda real, self, pages, slots: real(self, pages, None))


def forks_keep_pages_that_their_parent_gave_up(patch: Patch) -> None:
    patch.setattr(RowTable, "holders", lambda self, page, index: [int(np.flatnonzero(self.pages[:, index] == page)[0])])


def a_swapped_page_is_not_told_to_the_ranks(patch: Patch) -> None:
    patch.setattr(ChangeBuilder, "swap", lambda self, row, index, page: None)


def requests_go_round_whatever_they_weigh(patch: Patch) -> None:
    patch.setitem(BALANCES, "total_tokens", BALANCES["round_robin"])


def the_second_half_runs_first(patch: Patch) -> None:
    def split(real: Any, self: Part, at: int) -> tuple[Part, Part]:
        first, second = real(self, at)
        return replace(second, change=first.change), replace(first, change=second.change)

    around(patch, Part, "split", split)


def a_range_cut_in_two_draws_in_both_halves(patch: Patch) -> None:
    def cut(real: Any, self: Part, keep: Any, starts: Ints, lengths: Ints, logits: Ints, ends_here: Any) -> Any:
        return real(self, keep, starts, lengths, logits, np.ones_like(ends_here))

    around(patch, Part, "_cut", cut)


def the_second_half_starts_where_the_first_does(patch: Patch) -> None:
    def cut(real: Any, self: Part, keep: Any, starts: Ints, *others: Any) -> Any:
        return real(self, keep, self.starts, *others)

    around(patch, Part, "_cut", cut)


FAULTS: list[tuple[Callable[[Patch], None], Scenario]] = [
    (shared_pages_are_not_counted, scenarios.shared_prefix),
    (shared_pages_are_not_counted, scenarios.forked),
    (dropped_pages_are_free_whoever_holds_them, scenarios.forked),
    (pages_in_use_are_evicted, scenarios.evicting),
    (admission_takes_the_last_page, scenarios.growing),
    (a_preempted_sequence_forgets_what_it_drew, scenarios.crowded),
    (a_preempted_sequence_keeps_its_pages, scenarios.crowded),
    (a_row_in_flight_is_preempted, scenarios.crowded),
    (a_slot_is_never_given_back, scenarios.crowded),
    (a_slot_keeps_its_last_state, scenarios.one_slot),
    (decodes_that_ride_are_not_counted, scenarios.riding),
    (prompts_always_go_first, scenarios.turns),
    (each_rank_takes_turns_by_itself, scenarios.turns_together),
    (a_rank_looks_only_at_itself, scenarios.long_while_alone),
    (decodes_ride_though_they_fill_the_chunk, scenarios.full_chunks),
    (results_go_to_whoever_sits_in_the_row_now, scenarios.aborted_in_flight),
    (a_fork_copies_no_page, scenarios.forked),
    (a_fork_copies_no_slot, scenarios.forked),
    (forks_keep_pages_that_their_parent_gave_up, scenarios.twins),
    (a_swapped_page_is_not_told_to_the_ranks, scenarios.twins),
    (requests_go_round_whatever_they_weigh, scenarios.spread),
    (the_second_half_runs_first, scenarios.halved),
    (a_range_cut_in_two_draws_in_both_halves, scenarios.halved),
    (the_second_half_starts_where_the_first_does, scenarios.halved),
]


@pytest.mark.parametrize(("fault", "scenario"), FAULTS, ids=lambda f: f.__name__)
def test_a_fault_is_seen(fault: Callable[[Patch], None], scenario: Scenario, monkeypatch: Patch) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        scenario()
