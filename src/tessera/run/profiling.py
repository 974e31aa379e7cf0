"""Profiles of what ranks do, by torch's profiler: one trace in Chrome's form for each process that computes.

`Profiles` is the engine's side: it answers who asks, and counts what its ranks still owe. `Tracer` is a rank's: it
starts and stops the profiler in order with the steps, and writes the trace in a thread of its own while steps go on.
"""

from __future__ import annotations

import gzip
import logging
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from torch._C._profiler import _ExperimentalConfig
from torch.autograd.profiler import profile

from tessera.core.messages import EndProfile, Profile, Profiled
from tessera.run.host import Executor, finished

log = logging.getLogger(__name__)

PACKED = 5  # of gzip's 9: twice as fast, a tenth larger
ProfileOrder = Profile | EndProfile


class Traced(msgspec.Struct, tag=True, frozen=True):
    """A rank has written its trace, or `error`."""

    rank: int
    file: str
    error: str | None = None


class Profiles:
    """At most one profile at a time. `trace` tells the ranks (see `Runs.trace`). `sink` gets an answer for everything
    that is asked: at once for a start, once all is written for a stop."""

    def __init__(
        self, trace: Callable[[ProfileOrder], int], sink: Callable[[Profiled], None], replica: str = ""
    ) -> None:
        self._trace, self._sink, self._replica = trace, sink, replica
        self._running: Profile | None = None
        self._owed = 0
        self._told: list[Traced] = []
        self._waiting: list[str] = []  # who asked for the end

    def hear(self, message: ProfileOrder | Traced) -> None:
        """Somebody asks, or a rank is through."""
        match message:
            case Profile():
                self._start(message)
            case EndProfile():
                self._end(message)
            case Traced():
                self._note(message)

    def _start(self, asked: Profile) -> None:
        error = f"profile '{self._running.name}' runs; end it first (/stop_profile)" if self._running else None
        error = error or unwritable(asked.folder)
        if error is None:
            name = f"{asked.name}{self._replica}"
            self._running, self._told = msgspec.structs.replace(asked, name=name), []
            self._owed = self._trace(self._running)
            log.info("Profile '%s' starts; its traces go to %s", name, asked.folder)
        self._sink(Profiled(asked.id, error))

    def _end(self, asked: EndProfile) -> None:
        if self._running is None:
            last = f"; the last one is in {', '.join(t.file for t in self._told)}" if self._told else ""
            self._sink(Profiled(asked.id, f"no profile runs{last}; start one first (/start_profile)"))
            return
        if not self._waiting:
            self._trace(asked)
        self._waiting.append(asked.id)

    def _note(self, told: Traced) -> None:
        self._told.append(told)
        self._owed -= 1
        if self._owed:
            return
        self._told.sort(key=lambda t: t.rank)
        errors = [f"rank {t.rank}: {t.error}" for t in self._told if t.error is not None]
        files = [t.file for t in self._told if t.error is None]
        log.info("Profile ends: %s", "; ".join([*errors, *files]))
        for asked in self._waiting:
            self._sink(Profiled(asked, "; ".join(errors) or None, files))
        self._running, self._waiting = None, []


def unwritable(folder: str) -> str | None:
    """Why nothing can be written to a folder, which is made where it is not there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"the folder '{folder}' cannot be written: {error}; name another one (output_dir)"


class Tracer:
    """The profiler of one process. `threads`: how many ranks it has, all of which are seen. Only the thread that
    launches may use it; the profiler runs where `executor` does."""

    def __init__(
        self, rank: int, device: torch.device, executor: Executor, tell: Callable[[Traced], None], threads: int = 1
    ) -> None:
        self._rank, self._device, self._executor, self._tell = rank, device, executor, tell
        self._ranks = f"{rank}" if threads == 1 else f"{rank}-{threads - 1}"
        self._asked: Profile | None = None
        self._ran = -1  # steps since it started; -1: it has not
        self._profiler: profile | None = None

    def order(self, order: ProfileOrder) -> None:
        """A profile begins, or ends before its steps have run."""
        if isinstance(order, Profile):
            self._asked, self._ran = order, -1
            if not order.first_step:
                self._start()
        elif self._asked is not None:
            self._stop()

    def before(self, index: int) -> None:
        """Step `index` is launched next."""
        if self._asked is not None and self._ran < 0 and index >= self._asked.first_step:
            self._start()

    def after(self) -> None:
        """A step was launched."""
        if self._asked is not None and self._ran >= 0:
            self._ran += 1
            if self._ran == self._asked.num_steps:
                self._stop()

    def _start(self) -> None:
        asked, self._ran = self._asked, 0
        assert asked is not None
        device = "cuda" if "GPU" in asked.activities and self._device.type == "cuda" else None

        def work() -> None:
            profiler = profile(  # what torch.profiler wraps; the wrapper imports a compiler first, for 10 seconds
                use_kineto=True,
                use_cpu="CPU" in asked.activities or device is None,
                use_device=device,
                record_shapes=asked.shapes,
                with_stack=asked.stacks,
                experimental_config=_ExperimentalConfig(profile_all_threads=True),
            )
            try:
                profiler.__enter__()
            except RuntimeError as error:  # somebody else profiles this process
                log.warning("no profile: %s", error)
            else:
                self._profiler = profiler

        self._executor.submit(work)

    def _stop(self) -> None:
        asked, started, self._asked = self._asked, self._ran >= 0, None
        assert asked is not None
        file = str(Path(asked.folder) / f"{asked.name}-TP-{self._ranks}.trace.json.gz")

        def work() -> None:
            profiler, self._profiler = self._profiler, None
            if profiler is None:
                never = f"step {asked.first_step} (start_step) did not come"
                self._tell(Traced(self._rank, file, "the profiler could not start" if started else never))
                return
            finished(self._device)  # what was launched belongs to it
            profiler.__exit__(None, None, None)
            threading.Thread(target=self._write, args=(profiler, file), name="tessera-trace", daemon=True).start()

        self._executor.submit(work)

    def _write(self, profiler: profile, file: str) -> None:
        path = Path(file)
        part = path.with_name(f".{path.name}")  # so that who sees the file sees all of it
        try:
            with tempfile.NamedTemporaryFile(suffix=".json") as plain:
                profiler.export_chrome_trace(plain.name)
                with Path(plain.name).open("rb") as whole, gzip.open(part, "wb", PACKED) as packed:
                    shutil.copyfileobj(whole, packed)
            part.replace(path)
        except (OSError, RuntimeError) as error:
            part.unlink(missing_ok=True)
            self._tell(Traced(self._rank, file, str(error)))
        else:
            self._tell(Traced(self._rank, file))
