"""All ranks of one instance as processes, behind what the step loop needs of one runner.

Every rank runs every step. Ranks of one data-parallel group draw the same tokens, so the first of each group answers.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from tessera.core.config.types import Config, MeshConfig
from tessera.core.errors import ConfigError, Conflict, DeadlineError, PeerError
from tessera.core.mesh import ranks_of, share
from tessera.core.messages import Output
from tessera.models.load import Progress
from tessera.plan.step import Step, StepDone
from tessera.run.graphs import Size
from tessera.run.hosts import identity, placed
from tessera.run.hub import Hub
from tessera.run.poster import News, Order, Seat
from tessera.run.profiling import ProfileOrder
from tessera.run.recording import TOGETHER, Act, called, record
from tessera.run.report import Tally
from tessera.run.stages import Stages
from tessera.run.wire import Begin, Do, Done, Drop, Hello, Kept, Loaded, Loading, Record, Run, Told, Trace, Try

CLOSE_S = 5.0
GIVE_UP_S = 1.0  # after a start that failed: a rank that imports or loads hears nothing anyway
HOST = "127.0.0.1"
Tell = Callable[[News], None]
UpT = TypeVar("UpT", Hello, Loaded)


def unheard(news: News) -> None:
    """For an instance that hands nothing over."""


@dataclass(slots=True)
class Sent:
    """A step under way. `tallies`: what each DP rank computes, once it is collected. `due`: when it must be there,
    since it was first waited for."""

    index: int
    due: float | None = None
    tallies: list[Tally] = field(default_factory=list)


class Processes:
    """Runs steps on ranks that are processes. They read the model in the folder `config.model.path` themselves.

    Raises `ConfigError`, `ModelError` or `PeerError` when one cannot start, `DeadlineError` naming those that do not
    come; from the other calls `PeerError` that says which rank has failed, and how.
    """

    def __init__(self, config: Config, progress: Progress | None = None, tell: Tell = unheard) -> None:
        if config.mesh.node_rank > 0:
            flag, remedy = f"--node-rank {config.mesh.node_rank}", "Use `tessera serve`, or run this on the first host."
            raise ConfigError([Conflict((flag,), "the engine is on the first host", remedy)])
        mesh = config.mesh.mesh
        self._all = range(mesh.size)
        self._first = mesh.group(0, "dp")
        self._silence, self._patience = config.serving.watchdog_timeout, config.serving.start_timeout
        self._tell = tell
        self._kept: dict[int, str] = {}  # what ranks said after an act
        self.seats: list[Seat] = []
        self.stages = Stages()
        self._done: dict[int, deque[Done]] = {rank: deque() for rank in self._first}
        self._last = -1
        self._dropped: dict[tuple[str, int], int] = {}  # and the last step that may still bring something of it
        self._hub = Hub(mesh.size, config.mesh.meeting if config.mesh.num_nodes > 1 else None, placed(config))
        try:
            self._start(config, progress)
        except BaseException:
            self._hub.close(GIVE_UP_S)
            raise

    def _start(self, config: Config, progress: Progress | None) -> None:
        mesh = config.mesh
        several = mesh.num_nodes > 1
        host = (mesh.meeting or "").rpartition(":")[0] if several else HOST
        alive = (lambda: None) if progress is None else partial(progress, 0, 1)  # each wait of a start is one by itself
        alive()
        with self.stages.timed("processes"):
            with socket.create_server((host, 0)) as meeting:
                here = ranks_of(mesh.tp, mesh.num_nodes, 0)
                self._hub.start(here, mesh.devices, config.model.path, meeting.fileno())
                address = f"{host}:{meeting.getsockname()[1]}"
            self._meet(mesh)
            self._hub.met()
        alive()
        self._hub.send(Begin(config, address, identity(config) if several else ("", "")), self._all)
        loaded: dict[int, Loading] = {}

        def note(rank: int, message: Loading) -> None:
            loaded[rank] = message
            if progress is not None and len(loaded) == len(self._all):
                progress(sum(m.done for m in loaded.values()), sum(m.total for m in loaded.values()))

        said = self._until_all(Loaded, note, self._patience)
        self.stages.follow([loaded.stages for loaded in said.values()])
        self.seats = [seat for rank in self._all if (seat := said[rank].seat) is not None]

    def _meet(self, mesh: MeshConfig) -> None:
        """Until every rank has come, the last one in time too."""
        try:
            self._until_all(Hello, lambda rank, message: None, mesh.meet_within, anew=False)
        except DeadlineError as error:
            if mesh.num_nodes == 1:
                raise
            flags = f"--tp-size {mesh.tp} --nnodes {mesh.num_nodes} --node-rank N --dist-init-addr {mesh.meeting}"
            each = share(mesh.tp, mesh.num_nodes)
            why = (
                f"host N has the {each} from rank {each} * N on. Compare the flags of each host: all need a "
                f"server with {flags}, started within --dist-timeout {mesh.meet_within:g} seconds"
            )
            raise DeadlineError(f"{error}; {why}") from error

    def _until_all(
        self, kind: type[UpT], note: Callable[[int, Loading], None], seconds: float, anew: bool = True
    ) -> dict[int, UpT]:
        """Until every rank has said one thing; they may say how far they are. `seconds`: of silence, or where it does
        not begin `anew` with what is said, of all."""
        missing, said = set(self._all), {}
        until = time.monotonic() + seconds
        while missing:
            found = self._hub.receive(seconds if anew else max(until - time.monotonic(), 0.0))
            if found is None:
                raise DeadlineError(f"ranks {sorted(missing)} did not say {kind.__name__} for {seconds:g} s")
            rank, message = found
            if isinstance(message, kind):
                missing.discard(rank)
                said[rank] = message
            elif isinstance(message, Loading):
                note(rank, message)
            else:
                raise PeerError(f"rank {rank} said {type(message).__name__} out of turn")
        return said

    def launch(self, step: Step) -> Sent:
        """Starts a step on every rank."""
        self._hub.send(Run(step), self._all)
        self._last = step.index
        return Sent(step.index)

    def collect(self, launched: Sent) -> tuple[StepDone, list[Output]]:
        """Waits for the ranks that answer."""
        while not self.wait(launched, None, self._silence):
            pass
        answers = [self._done[rank].popleft() for rank in self._first]
        assert all(answer.done.index == launched.index for answer in answers), f"step {launched.index} out of turn"
        launched.tallies += [tally for answer in answers for tally in answer.tallies]
        outputs = [output for answer in answers for output in answer.outputs if self._wanted(output, launched.index)]
        self._dropped = {choice: last for choice, last in self._dropped.items() if last > launched.index}
        return StepDone(launched.index, tuple(part for answer in answers for part in answer.done.parts)), outputs

    def trace(self, order: ProfileOrder) -> int:
        """See `Runs.trace`."""
        self._hub.send(Trace(order), self._all)
        return len(self._all)

    def record(self, size: Size) -> None:
        """See `Runs.record`."""
        record(TOGETHER, lambda act: self.everywhere(act, size))

    def everywhere(self, act: Act, of: Size | Step) -> dict[int, str]:
        """See `Runner.everywhere`."""
        self._kept.clear()
        self._hub.send(Try(of, act) if isinstance(of, Step) else Record(of, act), self._all)
        until = time.monotonic() + self._patience
        while missing := [rank for rank in self._all if rank not in self._kept]:
            if not self._take(until - time.monotonic()):
                raise DeadlineError(
                    f"ranks {missing} are not through with {called(of)} ({act}) in {self._patience:g} s"
                )
        return dict(self._kept)

    def wait(self, launched: Sent | None, news: int | None, seconds: float) -> bool:
        """See `Runs.wait`. What ranks have to tell is told meanwhile."""
        until = time.monotonic() + seconds
        if launched is None:
            self._take(seconds, news)
            return False
        if launched.due is None:
            launched.due = time.monotonic() + self._silence
        while missing := [rank for rank in self._first if not self._done[rank]]:
            now = time.monotonic()
            if self._take(min(until, launched.due) - now, news):
                continue
            if time.monotonic() >= launched.due:
                late = f"ranks {missing} have not finished step {launched.index} in {self._silence:g} s"
                raise self._hub.why(DeadlineError(late))  # who waits for another one may say for whom
            return False
        return True

    def _take(self, seconds: float, news: int | None = None) -> bool:
        """Takes a message; False when none comes in time, or before `news` is readable."""
        found = self._hub.receive(max(seconds, 0), news)
        if found is None:
            return False
        rank, message = found
        match message:
            case Done():
                self._done[rank].append(message)
            case Kept(missing):
                self._kept[rank] = missing
            case Told(told):
                self._tell(told)
            case _:
                raise PeerError(f"rank {rank} said {type(message).__name__} out of turn")
        return True

    def _wanted(self, output: Output, index: int) -> bool:
        """The rank may have answered before it heard that the choice has ended."""
        return self._dropped.get((output.request_id, output.choice), -1) < index

    def drop(self, request_id: str, choice: int) -> None:
        """The choice has ended elsewhere: nothing of it may come out any more."""
        self._dropped[request_id, choice] = self._last
        self._hub.send(Drop(request_id, choice), self._first)

    def order(self, order: Order) -> None:
        """See `Runs.order`."""
        self._hub.send(Do(order), self._all)

    def close(self) -> None:
        """Ends all ranks."""
        self._hub.close(CLOSE_S)
