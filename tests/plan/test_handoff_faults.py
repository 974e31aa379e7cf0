"""Each rule that keeps a hand-over safe can be broken: the fault is put in, and the schedule that needs it goes red."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from plan import handoff_scenarios as scenarios
from plan.pair import Pair
from tessera.core.messages import Output
from tessera.plan import handoff_giver, handoff_taker
from tessera.plan.dp_rank import DpRank
from tessera.plan.handoff import Action, Arrive, Closed, End, Free, Opened, Prompt, Sent, Tell, Why, Written
from tessera.plan.handoff_desk import Desk
from tessera.plan.handoff_giver import Giver, Giving
from tessera.plan.handoff_taker import Taker, Taking
from tessera.plan.pages import PagePool
from tessera.plan.request import Sequence
from tessera.plan.slots import SlotPool
from tessera.plan.state import Lease, RankState
from tessera.plan.step import Ints, ints

Patch = pytest.MonkeyPatch


def pages_are_freed_by_a_timer(patch: Patch) -> None:
    """A room that gives up frees its pages, though the writer has not said that it has stopped."""
    original = Taker._cancel

    def cancel(self: Taker, room: Taking, why: Why) -> Iterator[Action]:
        asked = room.stage == handoff_taker.ASKED
        yield from original(self, room, why)
        if asked and self.rooms.pop(room.key, None) is not None:
            yield Free(room.key)

    patch.setattr(Taker, "_cancel", cancel)


def pages_are_freed_without_a_fence(patch: Patch) -> None:
    """A peer that has gone is taken for one that writes no more."""
    original = Taker._gone

    def gone(self: Taker, peer: str, reason: str) -> Iterator[Action]:
        yield from original(self, peer, reason)
        for rank in range(self.config.num_ranks):
            yield from self._fenced(peer, rank)

    patch.setattr(Taker, "_gone", gone)


def generations_are_ignored(patch: Patch) -> None:
    """A record is taken for whatever its peer was asked for."""
    original = Taker._heard

    def heard(self: Taker, peer: str, letter: Sent | Closed) -> Iterator[Action]:
        asked = [r for r in self.rooms.values() if r.peer == peer and r.stage == handoff_taker.ASKED]
        if letter.generation not in self.rooms and asked and isinstance(letter, Sent):
            letter = Sent(asked[0].key, asked[0].prompt)
        yield from original(self, peer, letter)

    patch.setattr(Taker, "_heard", heard)


def records_are_not_compared(patch: Patch) -> None:
    """Two servers that were sent different prompts do not notice."""
    patch.setattr(Prompt, "__eq__", lambda self, other: True)


def the_record_does_not_wait_for_all_ranks(patch: Patch) -> None:
    original = Giver._written

    def written(self: Giver, event: Written) -> Iterator[Action]:
        room = self.tickets.get(event.ticket)
        if room is not None and event.error is None:
            room.tickets[event.ticket] |= set(range(self.config.num_writers))
        yield from original(self, event)

    patch.setattr(Giver, "_written", written)


def the_record_does_not_wait_for_the_first_token(patch: Patch) -> None:
    original = Giver._open

    def opened(self: Giver, event: Opened) -> Iterator[Action]:
        yield from original(self, msgspec.structs.replace(event, awaits=False))

    patch.setattr(Giver, "_open", opened)


def prefill_draws_with_its_own_seed(patch: Patch) -> None:
    original = Giver._pair

    def paired(self: Giver, room: Giving) -> Iterator[Action]:
        assert room.reserve is not None
        room.reserve = msgspec.structs.replace(room.reserve, seed=8)
        yield from original(self, room)

    patch.setattr(Giver, "_pair", paired)


def the_first_token_ends_nothing(patch: Patch) -> None:
    """Decode goes on after EOS."""
    original = Taker._heard

    def heard(self: Taker, peer: str, letter: Sent | Closed) -> Iterator[Action]:
        if isinstance(letter, Sent) and letter.first is not None:
            letter = msgspec.structs.replace(letter, first=msgspec.structs.replace(letter.first, ends=False))
        yield from original(self, peer, letter)

    patch.setattr(Taker, "_heard", heard)


def the_first_token_is_told_with_a_step(patch: Patch) -> None:
    """It waits until decode has a row, as if it had been drawn there."""
    said = Desk.said

    def late(self: Desk) -> list[Output]:
        self._said, kept = [o for o in self._said if not o.tokens], [o for o in self._said if o.tokens]
        found = said(self)
        self._said = kept
        return found

    patch.setattr(Desk, "said", late)


def the_last_token_of_a_prompt_is_a_decode(patch: Patch) -> None:
    """Where a chunk leaves one token it is computed beside other decodes, and not sent."""
    original = DpRank._advance

    def advance(self: DpRank, ranges: Any, sequence: Sequence, budget: int) -> int:
        length = original(self, ranges, sequence, budget)
        if sequence.num_computed == sequence.target - 1:
            self.state.prefilling.pop(sequence, None)
        return length

    patch.setattr(DpRank, "_advance", advance)


def a_write_that_failed_is_taken_for_done(patch: Patch) -> None:
    """What has not landed is reported as success."""
    original = Giver._written
    patch.setattr(Giver, "_written", lambda self, event: original(self, msgspec.structs.replace(event, error=None)))


def a_refusal_is_told_to_the_client_alone(patch: Patch) -> None:
    """Decode waits for what prefill has refused."""
    patch.setattr(Desk, "refuse", lambda self, submit, why: None)


def an_abort_at_prefill_is_told_to_nobody(patch: Patch) -> None:
    """Decode learns of it from its deadline alone."""
    original = Giver._close

    def close(self: Giver, room: Giving, why: Why) -> Iterator[Action]:
        for action in original(self, room, why):
            if not isinstance(action, Tell):
                yield action

    patch.setattr(Giver, "_close", close)
    patch.setattr(Giver, "_over", silent(Giver._over))


def silent(method: Callable[..., Iterator[Action]]) -> Callable[..., Iterator[Action]]:
    def quiet(*args: Any) -> Iterator[Action]:
        return (
            action for action in method(*args) if not (isinstance(action, Tell) and isinstance(action.letter, Closed))
        )

    return quiet


def prefill_frees_while_it_writes(patch: Patch) -> None:
    """An aborted prompt is freed at once, though writes of it are under way."""
    original = Giver._fail

    def fail(self: Giver, room: Giving, why: Why) -> Iterator[Action]:
        sending = room.stage == handoff_giver.SENDING and room.tickets
        yield from original(self, room, why)
        if sending:
            room.tickets.clear()
            yield from self._stopped(room)

    patch.setattr(Giver, "_fail", fail)


def closed_generations_are_forgotten(patch: Patch) -> None:
    """A reservation that comes after its end, late or again, begins anew."""
    original = Giver._reserve

    def reserve(self: Giver, peer: str, letter: Any) -> Iterator[Action]:
        self.closed.get(peer, {}).clear()
        self.floors.pop(peer, None)
        yield from original(self, peer, letter)

    patch.setattr(Giver, "_reserve", reserve)


def a_lease_is_told_while_steps_run(patch: Patch) -> None:
    """Steps in flight still write pages that a prefill server writes too."""
    original = Desk.settle
    patch.setattr(Desk, "settle", lambda self, index, oldest: original(self, index, index))


def every_lease_waits_for_steps(patch: Patch) -> None:
    """Also one whose pages no step under way touches."""
    original = RankState.lease

    def lease(self: RankState, sequence: Sequence) -> Lease | None:
        found = original(self, sequence)
        return None if found is None else found._replace(quiet_from=self.pages.next_step)

    patch.setattr(RankState, "lease", lease)


def nobody_notes_until_when_pages_were_held(patch: Patch) -> None:
    def forgetful(drop: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def forgets(self: PagePool | SlotPool, given: Ints | list[int]) -> None:
            drop(self, given)
            self.quiet_from[:] = 0

        return forgets

    for pool in (PagePool, SlotPool):
        patch.setattr(pool, "drop", forgetful(pool.drop))


def a_prompt_arrives_twice(patch: Patch) -> None:
    original = Taker._heard

    def heard(self: Taker, peer: str, letter: Sent | Closed) -> Iterator[Action]:
        for action in original(self, peer, letter):
            yield from [action, action] if isinstance(action, Arrive) else [action]

    patch.setattr(Taker, "_heard", heard)


def swapped_pages_are_freed(patch: Patch) -> None:
    """A page that the prefix tree had too is freed, though it is being written from."""
    original = RankState.publish

    def publish(self: RankState, sequence: Sequence) -> None:
        original(self, sequence)
        if sequence.swapped:
            self.pages.drop(ints(sequence.swapped))
            sequence.swapped = ()

    patch.setattr(RankState, "publish", publish)


def the_client_is_not_told(patch: Patch) -> None:
    original = Taker._unmet

    def unmet(self: Taker, *args: Any) -> Iterator[Action]:
        return (action for action in original(self, *args) if not isinstance(action, End))

    patch.setattr(Taker, "_unmet", unmet)


def a_misfit_is_told_to_the_clients_of_decode_alone(patch: Patch) -> None:
    """Prefill learns from its deadline that the two do not fit."""
    original = Taker._unmet
    patch.setattr(Taker, "_unmet", lambda self, address, why, peer: original(self, address, why, ""))


def a_line_is_left_before_all_is_said(patch: Patch) -> None:
    """Requests that wait for the meeting are ended after the session was left."""
    original = Taker._unmet

    def unmet(self: Taker, *args: Any) -> Iterator[Action]:
        return iter(sorted(original(self, *args), key=lambda action: isinstance(action, Tell)))

    patch.setattr(Taker, "_unmet", unmet)


def what_ended_with_a_session_is_not_said_in_the_next(patch: Patch) -> None:
    original = Taker._gone

    def gone(self: Taker, *args: Any) -> Iterator[Action]:
        yield from original(self, *args)
        self.unsaid.clear()

    patch.setattr(Taker, "_gone", gone)


def nothing_is_said_twice(patch: Patch) -> None:
    """A taker says once that it gives up, and waits for ever."""
    patch.setattr(Taker, "_late", lambda self, room: iter(()))


def only_what_was_asked_for_is_given_up_aloud(patch: Patch) -> None:
    """Prefill is not told of rooms for which decode has reserved nothing."""
    original = Taker._cancel

    def cancel(self: Taker, room: Taking, why: Why) -> Iterator[Action]:
        early = room.stage != handoff_taker.ASKED
        for action in original(self, room, why):
            if not (early and isinstance(action, Tell)):
                yield action
        self.unsaid.clear()

    patch.setattr(Taker, "_cancel", cancel)


FAULTS = [
    (only_what_was_asked_for_is_given_up_aloud, scenarios.aborted_before_it_is_asked_for),
    (pages_are_freed_by_a_timer, scenarios.aborted_while_written),
    (pages_are_freed_by_a_timer, scenarios.out_of_time_while_written),
    (pages_are_freed_without_a_fence, scenarios.dead_while_writing),
    (an_abort_at_prefill_is_told_to_nobody, scenarios.told_at_once),
    (closed_generations_are_forgotten, scenarios.asked_too_late),
    (generations_are_ignored, scenarios.doubled_record),
    (records_are_not_compared, scenarios.different_prompts),
    (the_record_does_not_wait_for_all_ranks, scenarios.half_written),
    (the_record_does_not_wait_for_the_first_token, scenarios.written_before_it_is_told),
    (prefill_draws_with_its_own_seed, scenarios.seeds_of_their_own),
    (the_first_token_ends_nothing, scenarios.ended_by_its_first_token),
    (the_first_token_is_told_with_a_step, scenarios.told_before_a_step),
    (the_last_token_of_a_prompt_is_a_decode, scenarios.one_token_left_of_a_prompt),
    (prefill_frees_while_it_writes, scenarios.aborted_at_prefill),
    (a_lease_is_told_while_steps_run, scenarios.overshoot_in_flight),
    (nobody_notes_until_when_pages_were_held, scenarios.overshoot_in_flight),
    (every_lease_waits_for_steps, scenarios.asked_for_at_once),
    (swapped_pages_are_freed, scenarios.twins),
    (the_client_is_not_told, scenarios.nobody_there),
    (nothing_is_said_twice, scenarios.lost_answer),
    (a_prompt_arrives_twice, scenarios.half_written),
    (a_write_that_failed_is_taken_for_done, scenarios.one_write_fails),
    (a_refusal_is_told_to_the_client_alone, scenarios.refused_at_prefill),
    (a_refusal_is_told_to_the_client_alone, scenarios.refused_at_decode),
    (a_misfit_is_told_to_the_clients_of_decode_alone, scenarios.does_not_fit),
    (what_ended_with_a_session_is_not_said_in_the_next, scenarios.cut_before_it_is_asked_for),
    (a_line_is_left_before_all_is_said, scenarios.does_not_fit),
]


@pytest.mark.parametrize("scenario", scenarios.ALL, ids=lambda s: s.__name__)
def test_it_runs_clean(scenario: Callable[[], Pair]) -> None:
    scenario()


@pytest.mark.parametrize(("fault", "scenario"), FAULTS, ids=lambda f: f.__name__)
def test_the_fault_is_seen(fault: Callable[[Patch], None], scenario: Callable[[], Pair], monkeypatch: Patch) -> None:
    fault(monkeypatch)
    with pytest.raises((AssertionError, KeyError)):
        scenario()
