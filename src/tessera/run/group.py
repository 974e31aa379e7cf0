"""All ranks of one instance as threads of this process, behind what the step loop needs of one runner.

Every rank runs every step. Ranks of one data-parallel group draw the same tokens, so the first of each group answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tessera.comm.local import LocalGroup
from tessera.core.errors import PeerError
from tessera.core.messages import Output
from tessera.plan.step import Step, StepDone
from tessera.run.graphs import Size
from tessera.run.poster import Order, Seat
from tessera.run.profiling import ProfileOrder
from tessera.run.recording import TOGETHER, Act, called, record
from tessera.run.report import Tally
from tessera.run.runner import Launched, Runner
from tessera.run.stages import Stages
from tessera.run.waiter import Watch


@dataclass(frozen=True, slots=True)
class GroupLaunched:
    """A step under way on all ranks: their tickets, by rank, and what each DP rank computes."""

    index: int
    ranks: list[Launched]
    tallies: list[Tally]


class Group:
    """Runs steps on all ranks together. `runners` by rank, each with a thread of its own; they meet at `meeting`."""

    def __init__(self, runners: Sequence[Runner], meeting: LocalGroup) -> None:
        mesh = meeting.mesh
        assert len(runners) == mesh.size
        self.runners = runners
        self._meeting = meeting
        self._steps = Watch()
        self._first = [mesh.group(0, "dp")[i] for i in range(mesh.size_of("dp"))]

    def launch(self, step: Step) -> GroupLaunched:
        """Starts a step on every rank."""
        tickets = [runner.launch(step) for runner in self.runners]
        return GroupLaunched(step.index, tickets, [tickets[rank].tallies[0] for rank in self._first])

    def wait(self, launched: GroupLaunched | None, news: int | None, seconds: float) -> bool:
        """See `Runs.wait`."""
        return self._steps.wait([t.result for t in launched.ranks] if launched is not None else (), news, seconds)

    def collect(self, launched: GroupLaunched) -> tuple[StepDone, list[Output]]:
        """Waits for all ranks. Raises what a rank raised, rather than that others missed it."""
        errors = [error for ticket in launched.ranks if (error := ticket.result.exception()) is not None]
        if errors:
            raise next((error for error in errors if not isinstance(error, PeerError)), errors[0])
        parts, outputs = [], []
        for rank, ticket in enumerate(launched.ranks):
            done, told = self.runners[rank].collect(ticket)
            if rank in self._first:
                parts += done.parts
                outputs += told
        return StepDone(launched.index, tuple(parts)), outputs

    def drop(self, request_id: str, choice: int) -> None:
        """The choice has ended elsewhere: nothing of it may come out any more."""
        for rank in self._first:
            self.runners[rank].drop(request_id, choice)

    @property
    def stages(self) -> Stages:
        """What their start took: they load one after the other."""
        found = Stages()
        for runner in self.runners:
            found.weight_bytes += runner.stages.weight_bytes
            for stage, seconds in runner.stages.seconds.items():
                found.seconds[stage] = found.seconds.get(stage, 0.0) + seconds
        return found

    @property
    def seats(self) -> list[Seat]:
        """How other servers reach each rank."""
        return [seat for runner in self.runners for seat in runner.seats]

    def order(self, order: Order) -> None:
        """See `Runs.order`."""
        for runner in self.runners:
            runner.order(order)

    def trace(self, order: ProfileOrder) -> int:
        """See `Runs.trace`: the profiler of the first sees all threads of this process."""
        return self.runners[0].trace(order)

    def record(self, size: Size) -> None:
        """See `Runs.record`."""
        record(TOGETHER, lambda act: self.everywhere(act, size))

    def everywhere(self, act: Act, of: Size | Step) -> dict[int, str]:
        """See `Runner.everywhere`."""
        with ThreadPoolExecutor(len(self.runners)) as pool:  # they may meet in an act
            acts = [pool.submit(runner.perform, act, of) for runner in self.runners]
        for one in acts:
            if (error := one.exception()) is not None:
                raise PeerError(f"{called(of)} ({act}) failed: {error}") from error
        return {rank: one.result() for rank, one in enumerate(acts)}

    def close(self) -> None:
        """Ends all ranks; one that waits for another stops waiting."""
        self._meeting.fail(0, None)
        for runner in self.runners:
            runner.close()
        self._steps.close()
