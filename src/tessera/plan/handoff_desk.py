"""Where a planner and the machine of its hand-overs meet: requests become rooms, orders become queues and leases.

At decode, pages of a lease may have been held before by a sequence of which a step is in flight (an overshoot range,
or one that was aborted). Other ranks of this instance would write them in order; a prefill server would not. So a lease
is told to nobody before the steps are done that were planned while its pages were held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import msgspec
import numpy as np

from tessera.core.messages import FinishReason, Output, Submit
from tessera.plan.dp_rank import DpRank
from tessera.plan.handoff import (
    ABORTED,
    Action,
    Arrive,
    Cancelled,
    Computed,
    End,
    Errand,
    Fence,
    Free,
    HandoffConfig,
    Inner,
    Leased,
    Meet,
    Noted,
    Opened,
    Refused,
    Scored,
    Start,
    Tell,
    Ticketed,
    Want,
    Why,
    Wire,
    drawn_first,
    num_moved,
    prompt_of,
)
from tessera.plan.handoff_giver import Giver
from tessera.plan.handoff_taker import Taker
from tessera.plan.request import Sequence
from tessera.plan.state import Lease
from tessera.plan.step import Send, ints

PREFILL, DECODE = "prefill", "decode"
MACHINES: dict[str, type[Giver] | type[Taker]] = {PREFILL: Giver, DECODE: Taker}


@dataclass(slots=True)
class Case:
    """A request with a room, on a DP rank. `leader`: its first live sequence, with the others as forks."""

    key: int
    submit: Submit
    rank: DpRank
    leader: Sequence


class Desk:
    """All hand-overs of one planner. `errands`: for the outside."""

    def __init__(self, config: HandoffConfig) -> None:
        self.config = config
        self.machine = MACHINES[config.role](config)
        self.cases: dict[int, Case] = {}
        self.errands: list[Errand] = []
        self._homes: dict[int, DpRank] = {}  # where pages may be held, until they are free
        self._ended: list[tuple[str, list[Output]]] = []
        self._said: list[Output] = []
        self._wanting: deque[int] = deque()
        self._settling: dict[int, Lease] = {}  # by key
        self._num_opened = 0

    @property
    def idle(self) -> bool:
        """No memory is waiting for a writer, and nobody for an answer."""
        return self.machine.idle

    def concerns(self, submit: Submit) -> bool:
        """The request is one half of a pair, with something to hand over."""
        if submit.bootstrap_room is None or len(submit.tokens) < 2:
            return False
        return self.config.role == PREFILL or submit.bootstrap is not None

    def done(self, submit: Submit) -> bool:
        """A prompt of one token has nothing to hand over: decode computes it, and it is done at prefill."""
        return self.gives and submit.bootstrap_room is not None and len(submit.tokens) == 1

    @property
    def gives(self) -> bool:
        """This side computes prompts that others take."""
        return self.config.role == PREFILL

    def misfit(self, submit: Submit) -> str | None:
        """Why a request cannot be served by a server of this role."""
        if self.gives and submit.bootstrap_room is None and submit.params.max_new_tokens > 1:
            return (
                "this is a prefill server (--disaggregation-mode prefill): a request needs a bootstrap_room, and a "
                "decode server that is sent the same request. Ask the router"
            )
        return None

    # -- events ----------------------------------------------------------------------------------------------------

    def open(self, submit: Submit, sequences: list[Sequence], rank: DpRank) -> None:
        """A request with a room is here."""
        key, self._num_opened = self._num_opened, self._num_opened + 1
        leader = rank.add(sequences, away=True)
        leader.key = key
        self.cases[key] = Case(key, submit, rank, leader)
        self._homes[key] = rank
        assert submit.bootstrap_room is not None
        prompt, params = prompt_of(submit, leader.tokens), submit.params
        awaits = drawn_first(submit) or params.prompt_logprobs >= 0
        self.hear(Opened(key, submit.bootstrap_room, prompt, submit.bootstrap, awaits, leader.seed))

    def refuse(self, submit: Submit, why: Why) -> None:
        """A request with a room cannot be served here: whoever waits for it is told."""
        assert submit.bootstrap_room is not None
        key, self._num_opened = self._num_opened, self._num_opened + 1
        self.hear(Refused(submit.bootstrap_room, why, key, submit.bootstrap))

    def hear(self, event: Wire | Inner) -> None:
        """Something happened."""
        for action in self.machine.apply(event):
            self._do(action)

    def scored(self, sequence: Sequence, scored: Scored) -> None:
        """Ranks have told what they have of a prompt."""
        if sequence.key in self.cases:
            self.hear(Noted(sequence.key, scored.scores, scored.first))

    def sends(self, sends: Seq[Send]) -> None:
        """A step was planned that writes."""
        for send in sends:
            self.hear(Ticketed(send.key, send.ticket, send.last, self.cases[send.key].leader.num_cached))

    def computed(self, keys: Seq[int]) -> None:
        """Steps are done that computed the last of these prompts."""
        for key in keys:
            self.hear(Computed(key))

    def cancel(self, sequence: Sequence) -> bool:
        """One choice of a request ends. True: it was the last, or the request has only one here, and it ends."""
        case = self.cases[sequence.key if sequence.leader is None else sequence.leader.key]
        if self.gives or not (case.leader.forks or sequence is not case.leader):
            self.hear(Cancelled(case.key, ABORTED))
            return True
        if sequence is case.leader:
            case.leader = case.rank.hand_on(sequence)
        return False

    def holds(self, sequence: Sequence) -> bool:
        """The sequence is not past its hand-over."""
        return (sequence if sequence.leader is None else sequence.leader).key in self.cases

    def settle(self, index: int, oldest: int) -> None:
        """Sets pages aside for who wants some. Steps from `oldest` to before `index` are under way."""
        full: set[int] = set()  # DP ranks: who comes first gets pages first, however many it needs
        for key in list(self._wanting) if self._wanting else ():
            case = self.cases[key]
            if case.leader.dp_rank in full:
                continue
            lease = case.rank.state.lease(case.leader)
            if lease is None:
                full.add(case.leader.dp_rank)
            else:
                self._wanting.remove(key)
                self._settling[key] = lease
        for key, lease in list(self._settling.items()) if self._settling else ():
            if lease.quiet_from > oldest and oldest < index:
                continue
            del self._settling[key]
            if key in self.cases:
                case = self.cases[key]
                moved = num_moved(case.submit, case.leader.num_prompt)
                pages = lease.pages[: case.rank.config.pages_for(moved)]
                self.hear(Leased(key, case.rank.state.load.dp_rank, pages, lease.slot))

    # -- orders ----------------------------------------------------------------------------------------------------

    def _do(self, action: Action) -> None:
        match action:
            case Tell() | Meet() | Fence():
                self.errands.append(action)
            case Want(key):
                self._wanting.append(key)
            case Start(key):
                case = self.cases[key]
                case.leader.route, case.leader.seed = action, action.reserve.seed
                case.rank.release_away(case.leader)
            case Arrive():
                self._arrive(action)
            case End(key, why, times):
                if key in self._wanting:
                    self._wanting.remove(key)
                case = self.cases.pop(key)
                outputs = self._outputs(case, why)
                outputs[0].handed = times
                self._ended.append((case.submit.request_id, outputs))
                for sequence in (case.leader, *case.leader.forks):
                    case.rank.remove(sequence)
            case Free(key):
                self._homes.pop(key).free(key, self.cases[key].leader if key in self.cases else None)

    def _arrive(self, there: Arrive) -> None:
        """Its client hears at once; a row comes with a step, if anything is left to compute."""
        case, state = self.cases.pop(there.key), self._homes.pop(there.key).state
        leader, first = case.leader, there.first
        leader.params = msgspec.structs.replace(leader.params, prompt_logprobs=-1)  # they are here
        came = Output(leader.request_id, leader.choice, [], prompt_logprobs=there.scores, num_prompt=leader.num_prompt)
        came.num_cached, came.handed = there.num_cached, there.times
        if first is not None:
            came.tokens, came.logprobs = [first.token], first.logprobs
            leader.tokens = np.concatenate([leader.tokens, ints([first.token])])
            if first.ends:
                came.finish, came.matched = "stop", first.token
            elif leader.goal == leader.num_prompt:
                came.finish = "length"
        if came.finish is None:
            state.arrived.append(leader)
            self._said.append(came)
        else:
            state.lapse(there.key)
            case.rank.remove(leader)
            self._ended.append((leader.request_id, [came]))

    def said(self) -> list[Output]:
        """What is said of requests that go on, since it was asked last."""
        said, self._said = self._said, []
        return said

    def ends(self) -> list[tuple[str, list[Output]]]:
        """Requests that ended since it was asked last, and what is said of their choices."""
        ended, self._ended = self._ended, []
        return ended

    def _outputs(self, case: Case, why: Why | None) -> list[Output]:
        reason: FinishReason = "length" if why is None else "abort" if why.fault is None else "error"
        error, fault = (why.text, why.fault) if why is not None and why.fault is not None else (None, None)
        if not self.gives:
            return [s.end(reason, error, fault) for s in (case.leader, *case.leader.forks)]
        of_first = case.leader.end(reason, error, fault)
        return [msgspec.structs.replace(of_first, choice=i) for i in range(case.submit.n)]
