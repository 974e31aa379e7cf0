"""The planner: `apply(events)` takes what happened, `next_step()` gives what all ranks run next. No clock, no I/O.

A step may be planned while `max_in_flight - 1` others run. Decodes advance without their tokens being known; lengths
are known, so nothing is planned past them; a sequence that ends by a stop token has at most `max_in_flight - 1`
overshoot ranges in flight, whose results are dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import count

from tessera.core.messages import Abort, Fault, FinishReason, Flush, Output, Stop, Submit
from tessera.plan.balance import misplaced, place
from tessera.plan.config import PlannerConfig
from tessera.plan.dp_rank import DpRank, InFlight
from tessera.plan.events import Event
from tessera.plan.halves import cuts
from tessera.plan.handoff import Errand, Fenced, Gone, Heard, Joined, Met, Scored, Unmet, Why, Wire, Written
from tessera.plan.handoff_desk import Desk
from tessera.plan.request import Sequence, choices, given
from tessera.plan.step import Clock, Part, Step, StepDone

__all__ = ["Planner", "PlannerConfig"]


class Planner:
    """Plans the steps of one instance. State is kept by DP rank; only admission looks at all of them."""

    def __init__(self, config: PlannerConfig) -> None:
        self.config = config
        tickets = count()
        self.ranks = [DpRank(config, i, tickets) for i in range(config.num_dp)]
        self.desk = Desk(config.handoff) if config.handoff is not None else None
        self.now = 0.0
        self._stop_at: float | None = None
        self._requests: dict[str, list[Sequence]] = {}
        self._in_flight: deque[list[InFlight]] = deque()
        self._index = 0
        self._prompts_first = True
        self._arrivals = 0

    @property
    def idle(self) -> bool:
        """No request is here and no step is in flight."""
        return not self._requests and not self._in_flight and (self.desk is None or self.desk.idle)

    @property
    def stopping(self) -> bool:
        """`Stop` came: nothing new is accepted. The engine may end when it is idle too."""
        return self._stop_at is not None

    @property
    def num_waiting(self) -> int:
        """Requests and forked-off choices that wait for a row, or for their hand-over."""
        return sum(rank.state.queue.num_waiting + len(rank.state.away) for rank in self.ranks)

    def apply(self, events: Iterable[Event]) -> list[Output]:
        """Takes events in order; returns the outputs of sequences that end here and not on a rank (refused, aborted,
        scored prompts), to be sent after those of the ranks for the steps among `events`."""
        outputs: list[Output] = []
        for event in events:
            match event:
                case StepDone():
                    outputs += self._step_done(event)
                case Submit():
                    outputs += self._submit(event)
                case Abort():
                    outputs += self._abort(event)
                case Clock():
                    assert event.now >= self.now, f"the clock went back from {self.now} to {event.now}"
                    self.now = event.now
                    outputs += self._handoff(event)
                case Scored():
                    outputs += self._scored(event)
                case Heard() | Met() | Unmet() | Joined() | Gone() | Fenced() | Written():
                    outputs += self._handoff(event)
                case Flush():
                    for rank in self.ranks:
                        rank.state.prefix.flush()
                case Stop():
                    deadline = self.now + event.deadline_s
                    self._stop_at = deadline if self._stop_at is None else min(self._stop_at, deadline)
            if self._stop_at is not None and self.now >= self._stop_at:
                outputs += self._abort_all()
        if self.desk is not None:
            self.desk.settle(self._index, self._in_flight[0][0].index if self._in_flight else self._index)
        return outputs

    def errands(self) -> list[Errand]:
        """What is to be told to other servers, or done about them, since it was asked last."""
        if self.desk is None:
            return []
        errands, self.desk.errands = self.desk.errands, []
        return errands

    def next_step(self) -> Step | None:
        """The next step; None when `max_in_flight` steps are, or nothing can be computed now."""
        if len(self._in_flight) >= self.config.max_in_flight:
            return None
        alone = not any(rank.decodes for rank in self.ranks)
        planned = [rank.plan(self._index, self._prompts_first, alone) for rank in self.ranks]
        self._prompts_first = not any(record.prefilled for _, record in planned)  # all ranks wait for the longest part
        if not any(len(part.rows) for part, _ in planned):
            return None
        parts = tuple(part for part, _ in planned)
        step = Step(self._index, parts, self._cuts(parts))
        self._in_flight.append([record for _, record in planned])
        if self.desk is not None:
            self.desk.sends([send for part in parts for send in part.sends])
        self._index += 1
        return step

    def _cuts(self, parts: tuple[Part, ...]) -> tuple[int, ...]:
        config = self.config
        if not 0 < config.split_from <= max(part.num_tokens for part in parts):
            return ()
        return cuts(parts, config.split_share, config.split_grain)

    def check(self) -> None:
        """Raises AssertionError when a page, a slot or a row is lost, held twice or written by two."""
        live = {id(s) for sequences in self._requests.values() for s in sequences}
        found: list[Sequence] = []
        for rank in self.ranks:
            rank.state.check()
            members = [*rank.state.queue.waiting(), *rank.state.table.running(), *rank.state.away]
            members += [fork for s in members for fork in s.forks]
            assert len(members) == rank.state.load.num_requests
            assert sum(s.goal for s in members) == rank.state.load.num_tokens
            found += members
        assert len(found) == len(live), "a sequence is in two places, or in none"
        assert {id(s) for s in found} == live, "sequences and requests differ"

    # -- events ----------------------------------------------------------------------------------------------------

    def _submit(self, submit: Submit) -> list[Output]:
        sequences = choices(submit, self.config.max_context, self._arrivals)
        desk = self.desk if self.desk is not None and self.desk.concerns(submit) else None
        refusal = self._refusal(submit, sequences)
        if refusal is not None:
            if desk is not None:
                desk.refuse(submit, Why(*refusal))
            return [s.end("error", *refusal) for s in sequences] + self._handed()
        if self.desk is not None and self.desk.done(submit):
            return [s.end("length") for s in sequences]
        if desk is not None and desk.gives:
            sequences = [given(submit, self.config.max_context, self._arrivals)]
        self._arrivals += submit.n
        self._requests[submit.request_id] = sequences
        rank = self.ranks[place(self.config.load_balance, submit, [rank.state.load for rank in self.ranks])]
        if desk is None:
            rank.add(sequences)
            return []
        desk.open(submit, list(sequences), rank)
        return self._handed()

    def _handoff(self, event: Wire | Clock) -> list[Output]:
        if self.desk is None:
            return []
        self.desk.hear(event)
        return self._handed()

    def _scored(self, scored: Scored) -> list[Output]:
        sequences = self._requests.get(scored.request_id)
        if self.desk is None or sequences is None:
            return []
        self.desk.scored(sequences[0], scored)
        return self._handed()

    def _handed(self) -> list[Output]:
        """Outputs of requests whose hand-over ended them."""
        outputs = self.desk.said() if self.desk is not None else []
        for request_id, said in self.desk.ends() if self.desk is not None else ():
            del self._requests[request_id]
            outputs += said
        return outputs

    def _refusal(self, submit: Submit, sequences: list[Sequence]) -> tuple[str, Fault] | None:
        """Why a request cannot be served here, ever or now."""
        if self._stop_at is not None:
            return "the engine is stopping and accepts no new requests", "busy"
        if (why := self._misfit(submit, sequences)) is not None:
            return why, "request"
        if 0 < self.config.max_queued <= self.num_waiting:
            waiting, most = self.num_waiting, self.config.max_queued
            return f"the queue is full: {waiting} requests wait, {most} may. Try again later", "busy"
        return None

    def _misfit(self, submit: Submit, sequences: list[Sequence]) -> str | None:
        """Why a request can never be served here."""
        config, num_prompt = self.config, len(submit.tokens)
        if submit.request_id in self._requests:
            return f"request id '{submit.request_id}' is in use; ids must be unique among requests under way"
        if self.desk is not None and (why := self.desk.misfit(submit)) is not None:
            return why
        if not num_prompt:
            return "the prompt has 0 tokens; at least 1 is needed"
        if num_prompt + 1 > config.max_context:
            return (
                f"the prompt has {num_prompt} tokens; at most {config.max_context - 1} are allowed, so that one more "
                f"fits in the context of {config.max_context}"
            )
        if (why := misplaced(config.load_balance, submit, config.num_dp)) is not None:
            return why
        needed, allowed = config.pages_for(sequences[0].goal), config.num_pages - 1
        if needed > allowed:
            return (
                f"a prompt of {num_prompt} tokens with max_new_tokens {submit.params.max_new_tokens} needs {needed} "
                f"pages of {config.page_size} tokens; the pool has {allowed}. Ask for fewer tokens, or enlarge the pool"
            )
        return None

    def _abort(self, abort: Abort) -> list[Output]:
        sequences = self._requests.get(abort.request_id, [])
        outputs = []
        for sequence in list(sequences):
            if not sequence.live or (abort.choice is not None and sequence.choice != abort.choice):
                continue
            if self.desk is not None and self.desk.holds(sequence) and self.desk.cancel(sequence):
                outputs += self._handed()
            else:
                self.ranks[sequence.dp_rank].remove(sequence)
                outputs.append(self._ended(sequence, abort.reason))
        return outputs

    def _abort_all(self) -> list[Output]:
        return [out for request_id in list(self._requests) for out in self._abort(Abort(request_id))]

    def _ended(self, sequence: Sequence, reason: FinishReason) -> Output:
        self._forget(sequence)
        return sequence.end(reason)

    def _forget(self, sequence: Sequence) -> None:
        sequences = self._requests[sequence.request_id]
        sequences.remove(sequence)
        if not sequences:
            del self._requests[sequence.request_id]

    def _step_done(self, done: StepDone) -> list[Output]:
        records = self._in_flight.popleft()
        outputs = []
        for rank, record, part in zip(self.ranks, records, done.parts, strict=True):
            assert record.index == done.index, f"step {done.index} came back, step {record.index} was next"
            for sequence in rank.complete(record, part):
                if sequence.draws:
                    self._forget(sequence)
                else:
                    outputs.append(self._ended(sequence, "length"))
            if self.desk is not None and rank.computed:
                self.desk.computed(rank.computed)
                rank.computed = []
        return outputs
