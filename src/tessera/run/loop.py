"""The step loop: events to the planner, steps to the runner, results back, outputs out.

Overlap: up to `max_in_flight` steps are launched before the oldest is collected, so step n + 1 is planned and launched
while n runs (`max_in_flight` 1 is the plain loop). Waits block. While a step runs, a server that hands prompts over
hears news all the same, lest what another server waits for wait for a chunk. Whatever goes wrong ends the loop with an
error output for every live request and a `Fatal`: nobody waits for an answer that cannot come.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import msgspec

from tessera.core.config.types import NO_GRAPHS
from tessera.core.errors import CapacityError, PeerError, TesseraError
from tessera.core.messages import (
    EndProfile,
    Fatal,
    Fault,
    Outbound,
    Output,
    Outputs,
    Profile,
    StepReport,
    Submit,
    Tick,
)
from tessera.plan.events import Event
from tessera.plan.handoff import scored
from tessera.plan.log import Recorder
from tessera.plan.scheduler import Planner
from tessera.plan.step import Clock, Step, StepDone
from tessera.run.graphs import Size
from tessera.run.handover import Handover
from tessera.run.inbox import Inbox, Message
from tessera.run.poster import Broke, Connect, Order, Part, Shut
from tessera.run.profiling import ProfileOrder, Profiles, Traced
from tessera.run.recordings import Recordings
from tessera.run.report import Reporter

log = logging.getLogger(__name__)

IDLE_WAIT_S = 1.0  # an idle loop wakes this often, to show that it is alive
REST_S = 0.05  # nothing came for so long: time to record a size that steps may have

Ticket = Any  # of a runner: a step under way. `tallies`: what it computes, per DP rank


class Runs(Protocol):
    """All ranks of an instance, as whoever drives them sees them: `Runner`, `Group`, `Processes`."""

    def launch(self, step: Step) -> Ticket:
        """Starts a step without waiting for it."""

    def wait(self, launched: Ticket | None, news: int | None, seconds: float) -> bool:
        """Blocks until the oldest step can be collected (True), until the file `news` is readable, or for `seconds`.

        `launched` None: no step is under way. `news` None: nothing but the step is waited for, by this or by `collect`.
        Raises when ranks can run nothing any more.
        """

    def collect(self, launched: Ticket) -> tuple[StepDone, list[Output]]:
        """Waits for a step and returns what it drew."""

    def drop(self, request_id: str, choice: int) -> None:
        """The choice has ended elsewhere: nothing of it may come out any more."""

    def trace(self, order: ProfileOrder) -> int:
        """Tells ranks that a profile begins or ends; how many tell `Traced` of each that begins."""

    def record(self, size: Size) -> None:
        """Steps of `size` run as a graph from now on, on all ranks. Waits until it is recorded.

        Raises `CapacityError`, which says what memory is missing where; then they go on running as they are.
        """

    def order(self, order: Order) -> None:
        """Gives all ranks an order about another server. What comes of it is told by the function that the instance
        was built with."""


class Live:
    """Choices that somebody waits for."""

    def __init__(self) -> None:
        self._choices: dict[str, set[int]] = {}

    def add(self, submit: Submit) -> bool:
        """The choices of a new request; False when its id is one that somebody waits for already."""
        new = submit.request_id not in self._choices
        if new:
            self._choices[submit.request_id] = set(range(submit.n))
        return new

    def finish(self, outputs: Sequence[Output]) -> None:
        """Removes the choices that these outputs end."""
        for output in outputs:
            left = self._choices.get(output.request_id)
            if output.finish is not None and left is not None:
                left.discard(output.choice)
                if not left:
                    del self._choices[output.request_id]

    def failed(self, why: str) -> list[Output]:
        """An error output for every choice left; none is left afterwards."""
        outputs = failures(((r, c) for r, choices in self._choices.items() for c in sorted(choices)), why)
        self._choices.clear()
        return outputs


def failures(choices: Iterable[tuple[str, int]], why: str, fault: Fault = "engine") -> list[Output]:
    """Outputs that end choices with an error."""
    return [Output(request_id, choice, [], finish="error", error=why, fault=fault) for request_id, choice in choices]


def shown(output: Output) -> Output | None:
    """What is told here of an output: of a prompt that goes elsewhere its logprobs alone."""
    if not output.parting:
        return output
    if output.prompt_logprobs is None:
        return None
    return msgspec.structs.replace(output, tokens=[], logprobs=None, finish=None, matched=None)


class StepLoop:
    """Runs steps until `Stop`, or until one fails. `turn_hook` is called after every turn (tests check there)."""

    def __init__(
        self,
        planner: Planner | Recorder,
        runner: Runs,
        inbox: Inbox,
        sink: Callable[[Outbound], None],
        report: Reporter,
        max_in_flight: int = 2,
        turn_hook: Callable[[], None] | None = None,
        outside: Handover | None = None,
        recordings: Recordings | None = None,
        replica: str = "",
    ) -> None:
        self.planner, self.runner, self.inbox, self.sink, self.report = planner, runner, inbox, sink, report
        self.max_in_flight = max_in_flight
        self.last_tick = time.monotonic()
        self.end = "the engine has ended"  # why, for those who come too late
        self._flying: deque[Ticket] = deque()
        self._live = Live()
        self._last_collect = 0.0
        self._hook = turn_hook
        self._outside = outside
        self._profiles = Profiles(runner.trace, sink, replica)
        self._recordings = recordings or Recordings(NO_GRAPHS)

    def run(self, ready: Outbound) -> None:
        """Sends `ready` and blocks until the engine ends. A failure becomes error outputs and a `Fatal`."""
        try:
            self.sink(ready)
            while not (self.planner.stopping and self.planner.idle):
                self._turn()
                if self._hook is not None:
                    self._hook()
            self._end("the engine has stopped")
        except BaseException as error:
            if isinstance(error, TesseraError):  # a rank that has ended, say: where we noticed tells nothing
                log.error("the step loop failed: %s", error)
            else:
                log.exception("the step loop failed")
            why = f"{type(error).__name__}: {error}"
            self._end(f"the engine failed: {why}")
            self.sink(Fatal(why, type(error).__name__))
            if not isinstance(error, Exception):
                raise

    def _turn(self) -> None:
        oldest = self._flying[0] if self._flying else None
        hears = oldest is None or self._outside is not None
        patience = REST_S if oldest is None and self._recordings.num_left else IDLE_WAIT_S
        over = self.runner.wait(oldest, self.inbox.there if hears else None, patience)
        if over:
            self._collect()
        messages = self.inbox.drain()
        now = time.monotonic()
        if over or oldest is None:  # a step that hangs is no sign of life, whatever else is heard
            self.last_tick = now
        if oldest is None and not messages:
            self.sink(Tick(now))
            self._record(self._recordings.rest())
        self._apply([Clock(now), *self._note(messages)])
        self._launch()
        if messages and not self._flying:
            self._send_reports(self.report.idle())

    def _launch(self) -> None:
        while len(self._flying) < self.max_in_flight:
            step = self.planner.next_step()
            if step is None:
                break
            self._record(self._recordings.due(step))
            if not self._flying:
                self._last_collect = time.monotonic()
            self._flying.append(self.runner.launch(step))
        self._run_errands()

    def _record(self, size: Size | None) -> None:
        if size is None:
            return
        try:
            self.runner.record(size)
        except CapacityError as error:
            self._recordings.drop(size)
            log.warning(
                "No memory is left to record steps of %d tokens (%d ranges) as a CUDA graph: %s. Steps of this size, "
                "and of larger ones that are not recorded by now, run as they are, slower. Lower "
                "--mem-fraction-static, or --cuda-graph-max-bs.",
                size.all_tokens,
                size.num_segments * size.num_halves,
                error,
            )
        finally:
            self._recordings.under_way = False

    def _apply(self, events: list[Event]) -> None:
        self._settle(self.planner.apply(events))
        self._run_errands()

    def _scores(self, outputs: list[Output]) -> list[Event]:
        """What goes with prompts to whoever takes them over."""
        if self._outside is None:
            return []
        return [scored(output) for output in outputs if output.parting or output.prompt_logprobs is not None]

    def _run_errands(self) -> None:
        if self._outside is not None:
            for errand in self.planner.errands():
                self._outside.do(errand)

    def _note(self, messages: list[Message]) -> list[Event]:
        """The messages for the planner. A request whose id is under way is refused here, lest it end the other."""
        taken: list[Event] = []
        for message in messages:
            if isinstance(message, Connect | Part | Shut):
                self.runner.order(message)
                continue
            if isinstance(message, Profile | EndProfile | Traced):
                self._profiles.hear(message)
                continue
            if isinstance(message, Broke):
                raise PeerError(f"rank {message.rank} can hand nothing over any more: {message.error}")
            if not isinstance(message, Submit) or self._live.add(message):
                taken.append(message)
                continue
            why = f"request id '{message.request_id}' is in use; ids must be unique among requests under way"
            self.sink(Outputs(failures(((message.request_id, c) for c in range(message.n)), why, "request")))
        return taken

    def _settle(self, outputs: list[Output]) -> None:
        """Sends outputs that the planner ended; the runner drops what is still in flight of them."""
        for output in outputs:
            if output.finish is not None:
                self.runner.drop(output.request_id, output.choice)
        self._send(outputs)

    def _collect(self) -> None:
        launched = self._flying.popleft()
        done, outputs = self.runner.collect(launched)
        now = time.monotonic()
        seconds, self._last_collect = now - self._last_collect, now
        self._send([output for output in map(shown, outputs) if output is not None])
        self._apply([Clock(now), *self._scores(outputs), done])
        self._send_reports(self.report(done, launched.tallies, seconds))

    def _send(self, outputs: list[Output]) -> None:
        if outputs:
            self._live.finish(outputs)
            self.sink(Outputs(outputs))

    def _send_reports(self, reports: list[StepReport]) -> None:
        for report in reports:
            self.sink(report)

    def _end(self, why: str) -> None:
        self.end = why
        left = [m for m in self.inbox.close() if isinstance(m, Submit)]
        for submit in left:
            self._live.add(submit)
        self._flying.clear()
        self._send(self._live.failed(why))
