"""Which ranges a DP rank computes in the next step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from tessera.plan.config import PlannerConfig
from tessera.plan.request import Sequence, grouped
from tessera.plan.slots import UNLIMITED
from tessera.plan.state import RankState
from tessera.plan.step import NO_INTS, Bools, Ints, Part, PartDone, Send, empty_part, ints


@dataclass(slots=True)
class _Ranges:
    """Ranges of a step as they are gathered: (sequence, start, length) of prompts, and the columns of ready rows."""

    prefill: list[tuple[Sequence, int, int]] = field(default_factory=list)
    rows: Ints = field(default_factory=lambda: NO_INTS)
    starts: Ints = field(default_factory=lambda: NO_INTS)


@dataclass(frozen=True, slots=True)
class InFlight:
    """What a planned part needs when it is done: its ranges, and the sequences whose prompts it computed."""

    index: int
    rows: Ints
    ends: Ints
    samples: Bools
    prefilled: tuple[Sequence, ...]


class DpRank:
    """Plans the part of one DP rank in each step, and hears how it went."""

    def __init__(self, config: PlannerConfig, dp_rank: int, tickets: Iterator[int]) -> None:
        self.config = config
        self.state = RankState(config, dp_rank)
        self._tickets = tickets
        self.computed: list[int] = []  # hand-overs whose prompt is, since the planner looked last
        self._rows = NO_INTS
        self._draws = np.zeros(0, np.bool_)
        self._slack = 0
        self._dirty = True
        self._ones = np.ones(config.max_running, np.int32)

    # -- planning --------------------------------------------------------------------------------------------------

    @property
    def decodes(self) -> bool:
        """A sequence has one token to compute, or one that was handed over is about to."""
        return bool(self.state.arrived) or len(self._ready()) > 0

    def plan(self, index: int, prompts_first: bool, alone: bool = False) -> tuple[Part, InFlight]:
        """The part of step `index`. Its change is what happened since the last part that had ranges.

        Where decodes do not ride along, `prompts_first` says whose turn it is; the others run if those have nothing.
        `alone`: no rank has a sequence that could decode.
        """
        ranges = _Ranges()
        self.state.pages.next_step = self.state.slots.next_step = index + 1
        if self.state.arrived and self.state.seat_arrived(index):
            self._dirty = True
        if self._rides():
            if self._decode(ranges, index):
                self._prefill(ranges, index, alone)
        elif prompts_first:
            self._prefill(ranges, index, alone)
            if not ranges.prefill:
                self._decode(ranges, index)
        elif self._decode(ranges, index) and not len(ranges.rows):
            self._prefill(ranges, index, alone)
        return self._part(ranges, index)

    def _rides(self) -> bool:
        """Decodes ride along with prompts. Where they fill a chunk by themselves the two take turns, or no prompt would
        go on until some have ended."""
        config = self.config
        return config.mixed and (config.chunk_size <= 0 or len(self._ready()) < config.chunk_size)

    def _part(self, ranges: _Ranges, index: int) -> tuple[Part, InFlight]:
        state, table = self.state, self.state.table
        if not ranges.prefill:
            rows, starts, count = ranges.rows, ranges.starts, len(ranges.rows)
            if not count:
                return empty_part(), InFlight(index, NO_INTS, NO_INTS, np.zeros(0, np.bool_), ())
            ones = self._ones[:count]
            samples = self._draws if rows is self._rows else table.draws[rows]
            return Part(rows, starts, ones, ones, samples, state.change.take()), InFlight(
                index, rows, starts + 1, samples, ()
            )
        sequences = [s for s, _, _ in ranges.prefill]
        columns = [
            [s.row for s in sequences],
            [start for _, start, _ in ranges.prefill],
            [length for _, _, length in ranges.prefill],
            [len(s.tokens) for s in sequences],
            [s.logits_from for s in sequences],
            [s.route is None for s in sequences],
        ]
        prompts = np.array(columns, np.int32)
        prompts = prompts[:, np.argsort(prompts[2] == 1, kind="stable")]  # ranges of one token last
        first, starts, lengths, known, logits_from, stays = prompts
        ends, ones = starts + lengths, self._ones[: len(ranges.rows)]
        table.computed[first] = ends
        table.ready[first] = (ends >= known - 1) & (ends < table.goal[first]) & (stays == 1)
        self._dirty = True
        part = Part(
            np.concatenate([first, ranges.rows]),
            np.concatenate([starts, ranges.starts]),
            np.concatenate([lengths, ones]),
            np.concatenate([np.clip(ends - logits_from, 0, lengths), ones]),
            table.draws[np.concatenate([first, ranges.rows])] & np.concatenate([ends == known, ones == 1]),
            state.change.take(),
            self._sends(ranges),
        )
        return part, InFlight(index, part.rows, part.starts + part.lengths, part.samples, tuple(sequences))

    def _sends(self, ranges: _Ranges) -> tuple[Send, ...]:
        """What these ranges complete of prompts that go elsewhere: full pages, and with the last all the rest."""
        sends = []
        for sequence, start, length in ranges.prefill:
            if (route := sequence.route) is None:
                continue
            end, first = start + length, sequence.num_sent
            last = end == sequence.goal
            upto = self.config.pages_for(end) if last else end // self.config.page_size
            if upto == first and not last:
                continue
            sequence.num_sent = upto
            reserve, slots = route.reserve, (sequence.slot, route.reserve.slot) if last else (-1, -1)
            pages = self.state.table.pages[sequence.row, first:upto].copy(), reserve.pages[first:upto]
            ticket = next(self._tickets)
            sends.append(Send(sequence.key, ticket, route.peer, reserve.dp_rank, *pages, *slots, last))
        return tuple(sends)

    def _ready(self) -> Ints:
        """Rows that have one token to compute."""
        if self._dirty:
            table = self.state.table
            self._rows = np.flatnonzero(table.ready).astype(np.int32)
            self._draws = table.draws[self._rows]
            self._slack = int((table.goal[self._rows] - table.computed[self._rows]).min(initial=UNLIMITED))
            self._dirty = False
        return self._rows

    def _decode(self, ranges: _Ranges, index: int) -> bool:
        """Every ready row computes its one token; waiting choices fork. False: pages ran out, nobody may enter."""
        state, table = self.state, self.state.table
        rows, roomy = self._ready(), True
        if not len(rows):
            return True
        starts = table.computed[rows]
        need = starts >= table.capacity[rows]
        if need.any():
            if state.pages.available < np.count_nonzero(need):
                rows, roomy = self._make_room(rows, need)
                starts = table.computed[rows]
                need = starts >= table.capacity[rows]
            self._grow(rows[need])
        if state.leaders:
            rows = self._fork(rows, index, UNLIMITED if roomy else 0)
            starts = table.computed[rows]
        table.computed[rows] = starts + 1
        self._slack -= 1
        if self._slack <= 0 or self._dirty:
            table.ready[rows] = starts + 1 < table.goal[rows]
            self._dirty = True
        ranges.rows, ranges.starts = rows, starts
        return roomy

    def _fork(self, rows: Ints, index: int, most: int) -> Ints:
        """Forks leaders among `rows` before they compute their last prompt token; returns rows and children."""
        state, going = self.state, set(rows.tolist())
        children: list[Sequence] = []
        for leader in [s for s in state.leaders if s.row in going]:
            del state.leaders[leader]
            children += state.fork(leader, index, most)
        self._dirty = True
        return np.concatenate([rows, ints([child.row for child in children])])

    def _grow(self, rows: Ints) -> None:
        if not len(rows):
            return
        table, size = self.state.table, self.config.page_size
        pages = self.state.take_pages(len(rows))
        at = table.capacity[rows] // size
        table.pages[rows, at] = pages
        table.capacity[rows] += size
        self.state.change.grow(rows, at, pages)

    def _make_room(self, rows: Ints, need: Bools) -> tuple[Ints, bool]:
        """Takes rows from who stands last until the others can have their next page; returns the rows that go on.

        A row in flight cannot be preempted, since what it draws is not known here yet: it is not planned, so that it
        can be in the step after, and its pages are counted on. Who would need those pages now stalls for a step.
        """
        state, table = self.state, self.state.table
        order = table.standing()
        order = order[[table.occupant(row).route is None for row in order.tolist()]]  # others may be read by writers
        needy, going = np.zeros((2, len(table.ready)), np.bool_)
        needy[rows[need]] = going[rows] = True
        short = int(np.count_nonzero(need)) - state.pages.available
        while len(order) > 1 and short > 0:
            row, order = int(order[-1]), order[:-1]
            short -= int(needy[row])
            needy[row] = going[row] = False
            if table.computed[row] == table.done[row]:
                before = state.pages.available
                state.preempt(table.occupant(row))
                short -= state.pages.available - before
                self._dirty = True
            else:
                short -= state.pages.num_alone(table.held(row))
        going[order[needy[order]][state.pages.available :]] = False
        return rows[going[rows]], False

    def _prefill(self, ranges: _Ranges, index: int, alone: bool) -> None:
        """Prompts go on in the order in which they were admitted, then others are admitted while budget is left."""
        config, state = self.config, self.state
        budget = config.max_prefill_tokens if config.max_prefill_tokens > 0 else UNLIMITED
        if config.chunk_size > 0:
            size = max(config.alone_size, config.chunk_size) if alone else config.chunk_size
            budget = min(budget, size - len(ranges.rows))
        for under_way in list(state.prefilling):
            budget -= self._advance(ranges, under_way, budget)
        if budget > 0 and state.queue.num_waiting and state.table.free:
            state.queue.reorder(lambda s: len(state.match(s)[1]), state.prefix.version)
        while budget > 0 and (sequence := state.queue.head()) is not None:
            if config.chunk_size <= 0 and ranges.prefill and sequence.num_known > budget:
                break
            if not state.admit(sequence):
                break
            state.queue.pop()
            if (
                sequence.forks and sequence.num_computed == sequence.target
            ):  # all but the last token was cached, and forks wait
                state.seat(index)
                for child in state.fork(sequence, index, budget - 1):
                    budget -= self._advance(ranges, child, budget)
            budget -= self._advance(ranges, sequence, budget)
        state.seat(index)

    def _advance(self, ranges: _Ranges, sequence: Sequence, budget: int) -> int:
        """The next range of a prompt, within `budget` where prompts may be cut; returns its length."""
        state, start = self.state, sequence.num_computed
        length = sequence.target - start
        if length > budget and self.config.chunk_size > 0:
            length = budget
        if length <= 0:
            return 0
        end = sequence.num_computed = start + length
        ranges.prefill.append((sequence, start, length))
        if end < len(sequence.tokens) - 1 or (sequence.route is not None and end < sequence.target):
            state.prefilling[sequence] = None
        else:
            if state.prefilling:
                state.prefilling.pop(sequence, None)
            if sequence.forks:
                state.leaders[sequence] = None
        return length

    # -- what came back --------------------------------------------------------------------------------------------

    def complete(self, planned: InFlight, done: PartDone) -> list[Sequence]:
        """Takes the results of a part; returns the sequences that ended, released.

        Results of rows that were released meanwhile are dropped (see `state`).
        """
        state, table = self.state, self.state.table
        sampling = planned.rows if planned.samples.all() else planned.rows[planned.samples]
        assert np.array_equal(done.rows, sampling), f"step {planned.index}: results are not those of its ranges"
        live = table.entered[planned.rows] <= planned.index
        tokens, finished = done.tokens[:, 0], done.finished
        rows, ends, samples = planned.rows, planned.ends, planned.samples
        if not live.all():
            kept = live[samples]
            tokens, finished = tokens[kept], finished[kept]
            rows, ends, samples = rows[live], ends[live], samples[live]
        table.done[rows] = ends
        drawn, at = (rows, ends) if len(tokens) == len(rows) else (rows[samples], ends[samples])
        table.tokens[drawn, at] = tokens
        ended = drawn[finished].tolist() if finished.any() else []
        for sequence in planned.prefilled:
            if sequence.row >= 0 and table.entered[sequence.row] <= planned.index:
                state.publish(sequence)
        if len(drawn) < len(rows):
            scored = rows[~(samples | table.draws[rows])]
            ended += scored[table.done[scored] == table.goal[scored]].tolist()
        return self._leave([s for s in map(table.occupant, ended) if not self._sent_off(s)])

    def _sent_off(self, sequence: Sequence) -> bool:
        """A prompt that another server takes over is computed: its row is free, its pages are when they are written."""
        if sequence.route is None:
            return False
        self.state.detach(sequence)
        self.state.away[sequence] = None
        self.computed.append(sequence.key)
        self._dirty = True
        return True

    def add(self, sequences: list[Sequence], away: bool = False) -> Sequence:
        """The choices of a request wait for a row, or while `away` for their hand-over. Returns the first."""
        load = self.state.load
        load.num_taken += 1
        load.num_requests += len(sequences)
        for sequence in sequences:
            sequence.dp_rank = load.dp_rank
            load.num_tokens += sequence.goal
        leaders = grouped(sequences) if len(sequences) > 1 else sequences
        for leader in leaders:
            if away:
                self.state.away[leader] = None
            else:
                self.state.queue.push(leader)
        return leaders[0]

    def release_away(self, sequence: Sequence) -> None:
        """Its hand-over is so far that it may be computed."""
        del self.state.away[sequence]
        self.state.queue.push(sequence)

    def free(self, key: int, sequence: Sequence | None) -> None:
        """Nobody writes or reads for hand-over `key` any more; `sequence`: whose it is, if that is still live."""
        if sequence is not None and sequence.row >= 0:  # its writes were told before its step
            self._sent_off(sequence)
        self.state.lapse(key)

    def hand_on(self, leader: Sequence) -> Sequence:
        """The first of several choices ends while their prompt is on its way: the next one waits in its place."""
        first, *rest = leader.forks
        leader.forks, first.forks, first.leader, first.key = (), tuple(rest), None, leader.key
        for other in rest:
            other.leader = first
        self.state.away[first] = None
        return first

    def remove(self, sequence: Sequence) -> None:
        """A sequence ends, wherever it is."""
        if sequence.row >= 0 and sequence.route is not None:
            self.state.detach(sequence)
            self._dirty = True
            self._end(sequence)
            return
        if sequence.row >= 0:
            self._leave([sequence])
            return
        self._end(sequence)
        if sequence in self.state.away:
            del self.state.away[sequence]
            if sequence in self.state.arrived:
                self.state.arrived.remove(sequence)
                self.state.lapse(sequence.key)
        elif sequence.leader is not None:
            sequence.leader.forks = tuple(s for s in sequence.leader.forks if s is not sequence)
        else:
            self.state.queue.discard(sequence)

    def _leave(self, sequences: list[Sequence]) -> list[Sequence]:
        """Sequences end that are in rows."""
        if sequences:
            self.state.release(sequences)
            self._dirty = True
            for sequence in sequences:
                self._end(sequence)
        return sequences

    def _end(self, sequence: Sequence) -> None:
        """Choices that waited to fork from a sequence that ends wait in the queue instead."""
        state = self.state
        sequence.live = False
        state.load.num_requests -= 1
        state.load.num_tokens -= sequence.goal
        if sequence.forks:
            waiting, sequence.forks = sequence.forks, ()
            for leader in grouped(waiting):
                state.queue.push(leader)
