"""A fake rank, and a front that watches it.

The rank mirrors the row table from the changes alone. Its "model" draws a token as a pure hash of the history that it
reads back through its page tables cell by cell, and of its slot, a running hash of all tokens consumed. A wrong page, a
stale slot, a double write or a lost copy changes the answer.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tessera.core.messages import Abort, Flush, Output, SamplingParams, Stop, Submit, choice_seed
from tessera.plan.handoff import scored
from tessera.plan.scheduler import Planner, PlannerConfig
from tessera.plan.step import Clock, Enter, Part, PartDone, Step, StepDone

EOS = 0
VOCABULARY = 6


def draw(history: list[int], slot_hash: int, seed: int) -> int:
    """The next token after `history`: a pure function of it, the state, the seed and the position."""
    data = np.array([*history, len(history), slot_hash, seed & 0x7FFFFFFF], np.int64).tobytes()
    return zlib.crc32(data) % VOCABULARY


def fold(state: int, token: int) -> int:
    """The slot's state after one more token."""
    return zlib.crc32(state.to_bytes(8, "little") + token.to_bytes(4, "little"))


def expected(submit: Submit, choice: int, max_context: int, recurrent: bool) -> tuple[list[int], str]:
    """Tokens and finish reason of a choice, computed directly."""
    history, state, params = list(submit.tokens), 0, submit.params
    if params.max_new_tokens == 0:
        return [], "length"
    for token in history if recurrent else ():
        state = fold(state, token)
    new: list[int] = []
    while True:
        token = draw(history, state, choice_seed(params.seed, choice))
        new.append(token)
        history.append(token)
        state = fold(state, token) if recurrent else state
        if token == EOS and not params.ignore_eos:
            return new, "stop"
        if len(new) == params.max_new_tokens or len(history) == max_context:
            return new, "length"


@dataclass
class Occupant:
    """A sequence in a row of the rank."""

    enter: Enter
    pages: list[int]
    tokens: list[int]
    finished: bool = False
    logit_positions: list[int] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int]:
        return self.enter.request_id, self.enter.choice


class FakeRank:
    """One DP rank: executes parts in order at launch, gives results later."""

    def __init__(self, config: PlannerConfig) -> None:
        self.config = config
        self.cells = np.full((config.num_pages, config.page_size), -1, np.int64)
        self.slots = [(-1, 0)] * max(config.num_slots, 1)  # (position, hash)
        self.rows: dict[int, Occupant] = {}

    def launch(self, part: Part) -> list[tuple[Occupant, int]]:
        """Runs a part; returns (occupant at that time, token) of each sampling range."""
        self._change(part)
        assert len(set(part.rows.tolist())) == len(part.rows)
        drawn = []
        columns = zip(part.rows, part.starts, part.lengths, part.num_logits, part.samples, strict=True)
        written: set[int] = set()
        for row, start, length, num_logits, samples in columns:
            occupant = self.rows[int(row)]
            start, end = int(start), int(start + length)
            assert end <= len(occupant.tokens) <= self.config.max_context
            assert not samples or end == len(occupant.tokens)
            pages = set(occupant.pages[start // self.config.page_size : -(-end // self.config.page_size)])
            assert not pages & written, "two ranges of a step write one page"
            written |= pages
            for position in range(start, end):
                page, offset = divmod(position, self.config.page_size)
                assert occupant.pages[page] != 0
                self.cells[occupant.pages[page], offset] = occupant.tokens[position]
            self._fold(occupant, start, end)
            occupant.logit_positions += range(end - int(num_logits), end)
            if samples:
                assert num_logits >= 1
                size = self.config.page_size
                history = [int(self.cells[occupant.pages[p // size], p % size]) for p in range(end)]
                slot = occupant.enter.slot
                token = draw(history, self.slots[slot][1] if slot >= 0 else 0, occupant.enter.seed)
                occupant.tokens.append(token)
                drawn.append((occupant, token))
        return drawn

    def _fold(self, occupant: Occupant, start: int, end: int) -> None:
        slot = occupant.enter.slot
        assert (slot == -1) == (self.config.num_slots == 0)
        if slot < 0:
            return
        position, state = self.slots[slot]
        assert position == start, f"slot at {position} is used at {start}"
        for token in occupant.tokens[start:end]:
            state = fold(state, token)
        self.slots[slot] = end, state

    def _change(self, part: Part) -> None:
        change = part.change
        for row in change.leave.tolist():
            del self.rows[row]
        for enter in change.enter:
            assert enter.row not in self.rows
            self.rows[enter.row] = Occupant(enter, enter.pages.tolist(), enter.tokens.tolist())
        for row, index, page in change.pages.tolist():
            pages = self.rows[row].pages
            assert index <= len(pages)
            pages[index : index + 1] = [page]
        self._copy(self.cells, change.page_copies.tolist())
        self._copy(self.slots, change.slot_copies.tolist())
        for slot in change.zero_slots.tolist():
            self.slots[slot] = (0, 0)

    @staticmethod
    def _copy(pool: np.ndarray | list, pairs: list[list[int]]) -> None:
        targets = [target for _, target in pairs]
        assert len(set(targets)) == len(targets)
        assert not {source for source, _ in pairs} & set(targets), "copies of one step form a chain"
        for source, target in pairs:
            pool[target] = pool[source]


class World:
    """Planner, ranks and front together; every step is checked."""

    def __init__(self, config: PlannerConfig, wrap: Callable[[Planner], Any] = lambda planner: planner) -> None:
        self.config = config
        self.planner = Planner(config)
        self.driver = wrap(self.planner)
        self.ranks = [FakeRank(config) for _ in range(config.num_dp)]
        self.running: deque[tuple[Step, list[list[tuple[Occupant, int]]]]] = deque()
        self.steps: list[Step] = []
        self.submitted: dict[str, Submit] = {}
        self.got: dict[tuple[str, int], list[int]] = {}
        self.ends: dict[tuple[str, int], Output] = {}
        self.aborted: set[tuple[str, int]] = set()
        self.now, self.stop_at = 0.0, float("inf")

    def submit(self, submit: Submit) -> None:
        self.submitted[submit.request_id] = submit
        for choice in range(submit.n):
            self.got[submit.request_id, choice] = []
        self.receive(self.driver.apply([submit]))
        self.planner.check()
        stopping = self.stop_at < float("inf")
        assert not stopping or self.ends[submit.request_id, 0].fault == "busy", "taken on while stopping"

    def abort(self, request_id: str, choice: int | None = None) -> None:
        submit = self.submitted[request_id]
        self.aborted |= {(request_id, c) for c in range(submit.n) if choice in (None, c)}
        self.receive(self.driver.apply([Abort(request_id, choice)]))
        self.planner.check()
        assert all(key in self.ends for key in self.aborted), "an abort was not answered at once"

    def flush(self) -> None:
        self.receive(self.driver.apply([Flush()]))
        self.planner.check()

    def tick(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds
        self.hear(Clock(self.now))

    def hear(self, event: Clock | Stop) -> None:
        if self.now >= self.stop_at:
            self.aborted |= self.got.keys() - self.ends.keys()
        self.receive(self.driver.apply([event]))
        self.planner.check()

    def stop(self, deadline_s: float) -> None:
        self.stop_at = min(self.now + deadline_s, self.stop_at)
        self.hear(Stop(deadline_s))

    def receive(self, outputs: list[Output]) -> None:
        for out in outputs:
            key = out.request_id, out.choice
            if key in self.ends:  # the front forgets a choice when it ends
                assert key in self.aborted, f"{key} got an output after its end"
                continue
            self.got[key] += out.tokens
            if out.finish is not None:
                self.ends[key] = out

    def launch(self) -> bool:
        alone = not any(rank.decodes for rank in self.planner.ranks)
        step = self.driver.next_step()
        self.planner.check()
        if step is None:
            return False
        assert step.num_tokens
        self.steps.append(step)
        for part in step.parts:
            self.check_budget(part, alone)
        halves = [half.parts for half in step.halves]
        self.running.append(
            (step, [self.run(r, p) for r, p in zip(self.ranks, zip(*halves, strict=True), strict=True)])
        )
        return True

    def run(self, rank: FakeRank, parts: tuple[Part, ...]) -> list[tuple[Occupant, int]]:
        """A rank's part of a step, or the halves of it one after the other."""
        return [drawn for part in parts for drawn in rank.launch(part)]

    def check_budget(self, part: Part, alone: bool) -> None:
        config, lengths = self.config, part.lengths
        ones = lengths == 1
        assert (np.diff(ones.astype(int)) >= 0).all(), "ranges of one token come last"
        if config.chunk_size > 0 and not ones.all():
            assert lengths.sum() <= (max(config.alone_size, config.chunk_size) if alone else config.chunk_size)
        if config.max_prefill_tokens > 0 and config.chunk_size > 0:
            assert lengths[~ones].sum() <= config.max_prefill_tokens

    def collect(self) -> None:
        """The oldest step in flight comes back."""
        step, results = self.running.popleft()
        parts, outputs = [], list[Output]()
        for part, drawn in zip(step.parts, results, strict=True):
            finished = []
            for occupant, token in drawn:
                over = occupant.finished
                if not over:
                    outputs.append(self.output(occupant, token))
                    occupant.finished = outputs[-1].finish is not None
                finished.append(occupant.finished)
            tokens = np.array([token for _, token in drawn], np.int32).reshape(-1, 1)
            parts.append(PartDone(part.rows[part.samples], tokens, np.array(finished, np.bool_)))
        self.receive([output for output in outputs if not output.parting])
        told = [scored(output) for output in outputs if output.parting]
        self.receive(self.driver.apply([*told, StepDone(step.index, tuple(parts))]))
        self.planner.check()

    def output(self, occupant: Occupant, token: int) -> Output:
        params = occupant.enter.params
        num_new = len(self.got[occupant.key]) + 1
        finish = None
        if token == EOS and not params.ignore_eos:
            finish = "stop"
        elif num_new == params.max_new_tokens or occupant.enter.num_prompt + num_new == self.config.max_context:
            finish = "length"
        leaves, num_cached = occupant.enter.leaves, occupant.enter.num_cached
        return Output(*occupant.key, [token], finish=finish, num_cached=num_cached, parting=leaves)

    def turn(self) -> bool:
        """Launches what may be launched, then collects one step. False: nothing is left to do."""
        launched = False
        while self.launch():
            launched = True
        if self.running:
            self.collect()
            return True
        return launched

    def finish(self, most: int = 3000) -> None:
        """Runs to the end; everything must be free then and all answers right."""
        for _ in range(most):
            if not self.turn():
                break
        else:
            raise AssertionError(f"not done after {most} steps")
        self.planner.check()
        assert self.planner.idle, "nothing to compute, yet requests are left"
        self.verify()

    def verify(self) -> None:
        recurrent = self.config.num_slots > 0
        for key, tokens in self.got.items():
            assert key in self.ends, f"{key} was never answered"
            end = self.ends[key]
            if end.finish == "error":
                assert not tokens
                continue
            answer, reason = expected(self.submitted[key[0]], key[1], self.config.max_context, recurrent)
            if key in self.aborted:
                assert tokens == answer[: len(tokens)], f"{key}: {tokens} does not begin {answer}"
            else:
                assert (tokens, end.finish) == (answer, reason), f"{key}: {tokens} {end.finish}, not {answer} {reason}"
        for rank in self.planner.ranks:
            state = rank.state
            state.prefix.flush()
            assert state.pages.num_used == state.slots.num_used == state.table.num_running == 0


def request(name: str, tokens: list[int], max_new: int = 8, **fields: object) -> Submit:
    """A request; fields of `SamplingParams` and of `Submit` by name."""
    own = {k: fields.pop(k) for k in ("n", "priority", "namespace", "dp_rank", "bootstrap_room") if k in fields}
    return Submit(name, tokens, SamplingParams(max_new_tokens=max_new, **fields), **own)
