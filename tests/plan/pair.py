"""A prefill and a decode planner with fake ranks, and between them a network and writes that misbehave as told.

A tape of numbers decides what happens next, so hypothesis can look for a bad schedule and shrink it. What is written is
read from prefill's memory when it lands, not when it is posted: a page that is reused too early on either side shows in
the tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from plan.fake import FakeRank, Occupant, World, expected, request
from tessera.core.messages import Address, Submit
from tessera.plan.config import PlannerConfig
from tessera.plan.handoff import (
    Fence,
    Fenced,
    Gone,
    HandoffConfig,
    Heard,
    Joined,
    Meet,
    Met,
    Tell,
    Unmet,
    Why,
    Wire,
    Written,
)
from tessera.plan.log import Recorder
from tessera.plan.step import Part, Send

HOME = Address("prefill", 8998)
TIMES = {"bootstrap_s": 20.0, "meet_s": 10.0, "waiting_s": 15.0, "reply_s": 4.0, "retry_s": 1.0}
LONGEST_S = 2 * sum(TIMES.values())  # every deadline after every other, both sides
NUM_WRITERS = 2


class Side(World):
    """One instance. A step is run when it is told to, at the latest when it is collected: so memory is written late."""

    def __init__(self, config: PlannerConfig, name: str) -> None:
        self.log: list[bytes] = []
        super().__init__(config, lambda planner: Recorder(planner, self.log.append))
        self.name = name
        self.posted: list[tuple[FakeRank, Send]] = []
        self.unrun: deque[tuple[FakeRank, tuple[Part, ...], list[tuple[Occupant, int]]]] = deque()

    def run(self, rank: FakeRank, parts: tuple[Part, ...]) -> list[tuple[Occupant, int]]:
        drawn: list[tuple[Occupant, int]] = []
        self.unrun.append((rank, parts, drawn))
        return drawn

    def execute(self) -> None:
        """The oldest step runs on the ranks, as far as it has not. They may write before the planner hears of it."""
        left = len(self.running) - 1
        while len(self.unrun) > left * len(self.ranks):
            rank, parts, drawn = self.unrun.popleft()
            drawn += super().run(rank, parts)
            part = self.running[0][0].parts[self.ranks.index(rank)]
            self.posted += [(rank, send) for send in part.sends]

    def hear_wire(self, event: Wire) -> None:
        self.receive(self.driver.apply([event]))
        self.planner.check()

    def collect(self) -> None:
        self.execute()
        super().collect()

    def verify(self) -> None:
        """Everything was answered, rightly or not at all, and everything is free."""
        for key, tokens in self.got.items():
            assert key in self.ends, f"{self.name}: {key} was never answered"
            end, submit = self.ends[key], self.submitted[key[0]]
            assert (end.finish == "error") == (end.error is not None)
            if self.gives and submit.bootstrap_room is not None:
                assert not tokens
                continue
            answer, reason = expected(submit, key[1], self.config.max_context, self.config.num_slots > 0)
            assert tokens == answer[: len(tokens)], f"{self.name}: {key}: {tokens} does not begin {answer}"
            if end.finish == "error":
                assert not tokens
            elif end.finish != "abort":
                assert (tokens, end.finish) == (answer, reason), f"{key}: {tokens} {end.finish}, not {answer} {reason}"
        for rank in self.planner.ranks:
            state = rank.state
            state.prefix.flush()
            assert not state.leases
            assert not state.away
            assert state.pages.num_used == state.slots.num_used == state.table.num_running == 0

    @property
    def gives(self) -> bool:
        return self.planner.desk is not None and self.planner.desk.gives


@dataclass(eq=False)
class Session:
    """A connection. `up`: which ends still know it."""

    name: str
    prefill: Side
    decode: Side
    up: set[str] = field(default_factory=lambda: {"prefill", "decode"})


@dataclass(eq=False)
class Write:
    """What one writer still has to write of a ticket."""

    session: Session
    source: FakeRank
    send: Send
    writer: int


@dataclass(eq=False)
class Item:
    """Something on its way to a side: an event, a meeting or a fence to be made. Only letters can be lost."""

    to: Side
    what: Wire | Meet | tuple[str, int]
    session: Session | None = None

    @property
    def letter(self) -> bool:
        return isinstance(self.what, Heard)


class Pair:
    """Two servers, their clients and all between them."""

    def __init__(self, prefill: PlannerConfig, decode: PlannerConfig) -> None:
        self.configs = {"prefill": prefill, "decode": decode}
        self.now, self.num_sessions, self.num_requests = 0.0, 0, 0
        self.sides: dict[str, Side] = {}
        self.sessions: dict[str, Session] = {}
        self.bag: list[Item] = []
        self.writes: list[Write] = []
        self.fenced: set[tuple[str, int]] = set()
        self.dead: list[Side] = []
        self.misfit = ""  # why they do not fit or reach each other, when they meet next
        for role in self.configs:
            self.start(role)

    def start(self, role: str) -> None:
        side = self.sides[role] = Side(self.configs[role], role)
        side.tick(self.now)

    # -- what a side wants -----------------------------------------------------------------------------------------

    def run_errands(self) -> None:
        for side in self.sides.values():
            for errand in side.planner.errands():
                match errand:
                    case Tell(peer, letter):
                        session = self.sessions[peer]
                        other = session.decode if side is session.prefill else session.prefill
                        if len(session.up) == 2:
                            self.bag.append(Item(other, Heard(peer, letter), session))
                    case Meet():
                        self.bag.append(Item(side, errand))
                    case Fence(peer):
                        session = self.sessions[peer]
                        self.lose(session, "decode", "fenced")
                        self.bag += [Item(side, (peer, rank)) for rank in range(len(side.ranks))]
            for source, send in side.posted:
                session = self.sessions[send.peer]
                self.writes += [Write(session, source, send, writer) for writer in range(NUM_WRITERS)]
            side.posted = []

    def lose(self, session: Session, end: str, reason: str) -> None:
        """One end leaves a session; the other hears of it, some time."""
        if end in session.up:
            session.up.discard(end)
            for other in tuple(session.up):
                self.bag.append(Item(getattr(session, other), Gone(session.name, reason), session))

    def alive(self, side: Side) -> bool:
        return side in self.sides.values()

    def deliver(self, item: Item) -> None:
        if not self.alive(item.to):
            return
        side = item.to
        match item.what:
            case Meet(address):
                self.meet(side, address)
            case str() as peer, int() as rank:
                self.fenced.add((peer, rank))
                side.hear_wire(Fenced(peer, rank))
            case Gone(peer) as gone:
                item.session.up.discard(side.name)  # type: ignore[union-attr]
                side.hear_wire(gone)
            case Heard() as heard:
                if side.name in item.session.up:  # type: ignore[union-attr]
                    side.hear_wire(heard)
            case event:
                side.hear_wire(event)

    def meet(self, side: Side, address: Address) -> None:
        prefill = self.sides["prefill"]
        if prefill.running and self.num_sessions % 5 == 4:
            self.num_sessions += 1
            side.hear_wire(Unmet(address, Why("nobody answers there")))
            return
        session = Session(f"s{self.num_sessions}", prefill, side)
        self.num_sessions += 1
        self.sessions[session.name] = session
        prefill.hear_wire(Joined(session.name))
        why, self.misfit = self.misfit, ""
        side.hear_wire(Unmet(address, Why(why), session.name) if why else Met(address, session.name))

    def land(self, write: Write, fails: bool = False) -> None:
        """One writer writes its half of the tokens and of the slot, if it still can."""
        session, send = write.session, write.send
        if (session.name, send.dp_rank) in self.fenced or not self.alive(session.decode):
            fails = True
        if not fails:
            target = session.decode.ranks[send.dp_rank]
            for source, to in zip(send.pages.tolist(), send.to_pages.tolist(), strict=True):
                target.cells[to, write.writer :: NUM_WRITERS] = write.source.cells[source, write.writer :: NUM_WRITERS]
            if send.slot >= 0:
                new, old = write.source.slots[send.slot], target.slots[send.to_slot]
                target.slots[send.to_slot] = (new[0], old[1]) if write.writer else (old[0], new[1])
        if self.alive(session.prefill):
            session.prefill.hear_wire(Written(send.ticket, write.writer, 1, "it failed" if fails else None))

    # -- what happens to them --------------------------------------------------------------------------------------

    def submit(self, tape: Iterator[int]) -> None:
        number = self.num_requests
        self.num_requests += 1
        num_prompt, how = 1 + next(tape) % 11, next(tape) % 12
        tokens = [1 + (7 * number + 3 * i) % 5 for i in range(num_prompt)]
        fields = {"n": 1 + (next(tape) % 4 == 3), "seed": number}
        new = 1 + next(tape) % 6
        room = number - (how == 11 and number > 0)  # once in a while a room is used twice
        for role, side in self.sides.items():
            if (how, role) in ((8, "prefill"), (9, "decode")):
                continue
            given = [*tokens[:-1], 5 - tokens[-1] % 5] if how == 10 and role == "prefill" else tokens
            seed = number + (how % 2 and role == "prefill")  # as where a request names none
            side.submit(paired(request(f"r{number}", tokens, new, **{**fields, "seed": seed}), given, room))

    def abort(self, tape: Iterator[int]) -> None:
        side = self.sides[("prefill", "decode")[next(tape) % 2]]
        open_ones = sorted({key[0] for key in side.got.keys() - side.ends.keys()})
        if open_ones:
            name = open_ones[next(tape) % len(open_ones)]
            choices = [key[1] for key in side.got.keys() - side.ends.keys() if key[0] == name]
            whole = side.gives or next(tape) % 3 > 0
            side.abort(name, None if whole else sorted(choices)[0])

    def kill(self, role: str) -> None:
        side = self.sides.pop(role)
        self.dead.append(side)
        for session in self.sessions.values():
            if side in (session.prefill, session.decode):
                self.lose(session, role, "it died")
        if role == "decode":
            for write in [w for w in self.writes if w.session.decode is side]:
                self.writes.remove(write)
                self.land(write)
        self.start(role)
        self.sides = {name: self.sides[name] for name in ("prefill", "decode")}

    def tick(self, seconds: float) -> None:
        self.now += seconds
        for side in self.sides.values():
            side.tick(seconds)

    def act(self, tape: Iterator[int]) -> None:
        """One thing happens."""
        what, bag, writes = next(tape) % 60, self.bag, self.writes
        letters = [item for item in bag if item.letter]
        if what >= 56:
            self.go_on()
        elif what >= 44:
            self.sides[("prefill", "decode")[what % 2]].turn()
            for item in [item for item in bag if next(tape) % 2]:
                bag.remove(item)
                self.deliver(item)
        elif what >= 40:
            for side in self.sides.values():
                if side.running:
                    side.execute()
                while side.launch():
                    pass
        elif what < 6:
            self.submit(tape)
        elif what < 12:
            self.sides["prefill"].turn()
        elif what < 18:
            self.sides["decode"].turn()
        elif what < 26 and bag:
            self.deliver(bag.pop(next(tape) % len(bag)))
        elif what < 28 and letters:
            bag.remove(letters[next(tape) % len(letters)])
        elif what < 30 and letters:
            bag.append(letters[next(tape) % len(letters)])
        elif what < 34 and writes:
            self.land(writes.pop(next(tape) % len(writes)), next(tape) % 8 == 7)
        elif what < 36:
            self.abort(tape)
        elif what == 36:
            self.tick((0.5, 1.0, 4.0, 15.0)[next(tape) % 4])
        elif what == 37:
            self.kill(("prefill", "decode")[next(tape) % 2])
        elif what == 38 and self.sessions:
            session = list(self.sessions.values())[next(tape) % len(self.sessions)]
            for end in tuple(session.up):
                self.bag.append(Item(getattr(session, end), Gone(session.name, "the line was cut"), session))
        elif what == 39:
            self.misfit = "rank 0 cannot reach its ranks"
        self.run_errands()

    def go_on(self) -> None:
        """All that is on its way arrives, and each side takes a turn."""
        for item in self.bag[:]:
            self.bag.remove(item)
            self.deliver(item)
        for write in self.writes[:]:
            self.writes.remove(write)
            self.land(write)
        for side in self.sides.values():
            side.turn()
        self.run_errands()

    def drain(self) -> None:
        """From now on the network is good. Everything ends, in bounded time, and is free."""
        began = self.now
        while True:
            self.run_errands()
            while self.bag or self.writes:
                for item in (bag := self.bag[:]):
                    self.bag.remove(item)
                    self.deliver(item)
                for write in (writes := self.writes[:]):
                    self.writes.remove(write)
                    self.land(write)
                self.run_errands()
                assert bag or writes
            moved = [side.turn() for side in self.sides.values()]
            if any(moved):
                continue
            if all(side.planner.idle for side in self.sides.values()) and not self.bag and not self.writes:
                break
            assert self.now - began <= LONGEST_S, f"not over after {LONGEST_S} s"
            self.tick(0.5)
        for side in self.sides.values():
            side.verify()


def paired(one: Submit, tokens: list[int], room: int) -> Submit:
    """A request as the two servers get it."""
    return Submit(one.request_id, tokens, one.params, one.n, bootstrap_room=room, bootstrap=HOME)


def config(role: str, **fields: object) -> PlannerConfig:
    """A small planner of a role."""
    num_dp = int(fields.get("num_dp", 1))  # type: ignore[call-overload]
    handoff = HandoffConfig(role, num_writers=NUM_WRITERS, num_ranks=num_dp, **TIMES)
    sizes = {"max_running": 4, "num_pages": 24, "page_size": 4, "max_context": 32, "chunk_size": 5, "num_slots": 6}
    return PlannerConfig(handoff=handoff, **{**sizes, **fields})  # type: ignore[arg-type]


def play(pair: Pair, numbers: list[int]) -> None:
    """A schedule: the tape until it ends, then all that is left in good order."""

    def tape() -> Iterator[int]:
        yield from numbers
        while True:
            yield 0

    numbers_left = tape()
    used = 0
    while used < len(numbers):
        before = pair.now
        pair.act(numbers_left)
        used += 3
        assert pair.now >= before
    pair.drain()
