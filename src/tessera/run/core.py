"""The engine without text: messages in, messages out. What `tessera.Engine` and the server's engine process wrap."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import msgspec

from tessera.core.config.types import Resolved
from tessera.core.messages import Inbound, Outbound, Outputs, Ready, Submit
from tessera.core.spec import ModelSpec
from tessera.models.folder import configured_source
from tessera.models.load import Progress
from tessera.models.source import Source
from tessera.plan.log import Recorder
from tessera.plan.scheduler import Planner, PlannerConfig
from tessera.run import ahead
from tessera.run.build import build_instance, planner_config
from tessera.run.eventlog import open_events
from tessera.run.handover import Handover
from tessera.run.hardware import share_cores
from tessera.run.inbox import Inbox
from tessera.run.loop import StepLoop, failures
from tessera.run.poster import News
from tessera.run.profiling import Traced
from tessera.run.recordings import Recordings
from tessera.run.report import Reporter
from tessera.run.stages import Stages
from tessera.run.startup import Prepared
from tessera.run.threshold import measure

log = logging.getLogger(__name__)


class EngineCore:
    """Builds everything of one instance from a resolved configuration: weights, pools, planner, runner, loop.

    `sink(message)` is called from the thread in `run()`: `Ready` first, then `Outputs`, `StepReport`, `Tick`, and
    `Fatal` if it fails. `post()` may be called from any thread, also before `run()`. `compiling`: its kernels, which it
    waits for once its weights are loaded. With `--debug-checks` the position of every recurrent state is watched, and
    the planner checks itself at every turn. When it ends, or cannot start, all that it was given or made is closed.
    """

    def __init__(
        self,
        resolved: Resolved,
        spec: ModelSpec,
        source: Source,
        sink: Callable[[Outbound], None],
        progress: Progress | None = None,
        stages: Stages | None = None,
        compiling: ahead.Ahead | None = None,
    ) -> None:
        self.resolved, self.spec, self.stages = resolved, spec, stages or Stages()
        self._sink = sink
        self._inbox = Inbox()
        self._held = ExitStack()  # what ends with the engine, the last first; or with a start that fails
        try:
            self._build(source, progress, compiling)
        except BaseException:
            self._held.close()
            raise

    def _build(self, source: Source, progress: Progress | None, compiling: ahead.Ahead | None) -> None:
        config, held = self.resolved.config, self._held
        planned = planner_config(config)
        events = open_events(config)
        if events is not None:
            held.callback(events.close)
        if compiling is not None:
            held.callback(compiling.close)
        handed_over = config.handover.role != "null"
        self.handover = Handover(config, self.spec, self._inbox.post) if handed_over else None
        self.runner = build_instance(config, self.spec, source, progress, self._hear)
        held.callback(self.runner.close)
        self.stages.follow([self.runner.stages])
        if compiling is not None:
            with self.stages.timed("kernels"):
                compiling.wait()
        if config.scheduling.split_measured:
            planned = self._measured(planned)
        self.planner = Planner(planned)
        if self.handover is not None:
            held.callback(self.handover.close)
            self.handover.open(self.runner.seats)
        hook = self.planner.check if config.logging.checks else None
        in_flight = config.scheduling.max_in_flight
        report = Reporter(self.planner)
        replica = f"-DP-{config.mesh.replica}" if config.mesh.replicas > 1 else ""
        self.recordings = Recordings(config.kernels.graphs, config.handover.role != "prefill")
        planner = self.planner if events is None else Recorder(self.planner, events.write)
        self._loop = StepLoop(
            planner,
            self.runner,
            self._inbox,
            self._sink,
            report,
            in_flight,
            hook,
            self.handover,
            self.recordings,
            replica,
        )

    def _measured(self, planned: PlannerConfig) -> PlannerConfig:
        """From which size on steps run as halves, tried on ranks that have nothing else to do yet. It is told."""
        with self.stages.timed("halves"):
            found = measure(planned, planned.split_from, self.runner.everywhere)
        log.info("%s", found.decision)
        config, decisions = self.resolved.config, self.resolved.decisions
        scheduling = replace(config.scheduling, split_from=found.split_from, split_measured=False)
        others = tuple(decision for decision in decisions if decision.what != found.decision.what)
        self.resolved = Resolved(replace(config, scheduling=scheduling), (*others, found.decision))
        return replace(planned, split_from=found.split_from)

    def _hear(self, news: News) -> None:
        """A rank has something to say. From any thread."""
        if isinstance(news, Traced):
            self._inbox.post(news)
        elif self.handover is not None:
            self.handover.tell(news)

    def post(self, message: Inbound) -> None:
        """Hands a message to the loop. A `Submit` after the end is answered with an error output at once."""
        if not self._inbox.post(message) and isinstance(message, Submit):
            choices = [(message.request_id, choice) for choice in range(message.n)]
            self._sink(Outputs(failures(choices, self._loop.end)))

    def run(self) -> None:
        """Blocks until `Stop` has been honoured or a step has failed. Never raises an `Exception`."""
        try:
            self._loop.run(Ready(self.info()))
        finally:
            self._held.close()

    @property
    def last_tick(self) -> float:
        """`time.monotonic()` at the loop's last turn, for health."""
        return self._loop.last_tick

    def info(self) -> dict[str, object]:
        """The resolved configuration with its decisions, what the model is, and where decode servers meet it."""
        at = self.handover.bootstrap if self.handover is not None else None
        return {
            "config": self.resolved.config.public(),
            "decisions": [str(decision) for decision in self.resolved.decisions],
            "architecture": self.spec.architecture,
            "vocab_size": self.spec.vocab_size,
            "context_length": self.resolved.config.model.context_length,
            "num_layers": len(self.spec.layers),
            "start": msgspec.to_builtins(self.stages),
            "bootstrap": str(at) if at is not None else None,
        }


def prepared_core(prepared: Prepared, sink: Callable[[Outbound], None], progress: Progress | None = None) -> EngineCore:
    """The engine of a prepared start: weights from the model's folder, or dummy ones. Raises `ModelError`."""
    config, spec = prepared.resolved.config, prepared.spec
    share_cores(config.mesh.replicas)
    source = configured_source(prepared.folder, spec, config)
    compiling = ahead.start(prepared.folder, spec, config)
    return EngineCore(prepared.resolved, spec, source, sink, progress, prepared.stages, compiling)
