"""One rank of an instance as a process: `python -m tessera.run.rank SPAWN`, started by `run/hub.py`.

It joins the others, loads its weights, then launches every step that comes and sends back what it drew, if it is the
first rank of its DP rank. All of it happens in one thread; another only waits for steps to end.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
from collections import deque
from pathlib import Path

import msgspec
import torch
import zmq

from tessera.comm.base import Comm
from tessera.comm.connect import Place, connect
from tessera.core.config.types import Config
from tessera.core.errors import ConfigError, DeadlineError, PeerError, TesseraError
from tessera.models.folder import configured_source, read_model
from tessera.run.build import build_runner
from tessera.run.children import die_with
from tessera.run.hardware import share_cores
from tessera.run.hosts import conflicts, placed
from tessera.run.mailbox import Mailbox
from tessera.run.poster import News
from tessera.run.progress import Seldom
from tessera.run.runner import Launched, Runner
from tessera.run.stages import Stages
from tessera.run.waiter import Waiter
from tessera.run.wire import (
    Begin,
    Do,
    Done,
    Down,
    Drop,
    End,
    Failed,
    Hello,
    Kept,
    Loaded,
    Loading,
    Look,
    Record,
    Run,
    Spawn,
    Told,
    Trace,
    Try,
    Up,
    decode_down,
    encode,
    watched,
)

log = logging.getLogger(__name__)

LOOK_MS = 1000
LINGER_MS = 2000
FORM = "[%(asctime)s] %(levelname)s rank {}: %(message)s"


class Link:
    """The rank's end of the wire. Only one thread may use it."""

    def __init__(self, address: str, rank: int, elsewhere: bool = False) -> None:
        """`elsewhere`: another host may have been started with the same rank by mistake, and both must be heard."""
        self.address = address
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.routing_id = f"{rank}/{secrets.token_hex(8)}".encode() if elsewhere else str(rank).encode()
        self.socket.set_hwm(0)
        self.socket.linger = LINGER_MS
        self.gone = watched(self.socket)
        self.socket.connect(address)

    def tell(self, message: Up) -> None:
        """Sends without waiting."""
        self.socket.send(encode(message), zmq.NOBLOCK)

    def hear(self, seconds: float) -> Down:
        """The next message. Raises DeadlineError when none comes in time, PeerError when the engine has gone."""
        poller = zmq.Poller()
        for one in (self.socket, self.gone):
            poller.register(one, zmq.POLLIN)
        ready = dict(poller.poll(int(seconds * 1000)))
        if self.socket not in ready:
            self.check()
            where = self.address.removeprefix("tcp://")
            compare = "Compare --dist-init-addr, --nnodes and --tp-size with the first host's"
            raise DeadlineError(
                f"the engine at {where} has said nothing for {seconds:g} s; does the first host run? {compare}"
            )
        message: Down = decode_down(self.socket.recv())
        return message

    def loaded(self, done: int, total: int) -> None:
        """Tells how far the weights are. Raises PeerError: loading may take minutes after the engine has gone."""
        self.check()
        self.tell(Loading(done, total))

    def check(self) -> None:
        """Raises PeerError when the engine has gone."""
        if self.gone.poll(0):
            raise PeerError("the engine has gone")

    def close(self) -> None:
        """Sends what is left, within `LINGER_MS`."""
        self.socket.disable_monitor()
        self.gone.close(0)
        self.socket.close()
        self._context.term()


class Steps:
    """Runs what comes over a link on a runner. `answers`: it tells what it drew. `news` come from other threads, which
    may not use the link."""

    def __init__(self, link: Link, runner: Runner, news: Mailbox[News], answers: bool) -> None:
        self._link, self._runner, self._answers = link, runner, answers
        self._waiter = Waiter()
        self._news = news
        self._flying: deque[Launched] = deque()
        self._poller = zmq.Poller()
        self._poller.register(link.socket, zmq.POLLIN)
        self._poller.register(self._waiter.ended, zmq.POLLIN)
        self._poller.register(link.gone, zmq.POLLIN)
        self._poller.register(news.there, zmq.POLLIN)

    def run(self) -> None:
        """Returns at `End`. Raises what a step raised."""
        while True:
            ready = dict(self._poller.poll(LOOK_MS))
            if self._waiter.ended in ready:
                for _ in range(self._waiter.count()):
                    self._collect()
            if self._news.there in ready:
                for told in self._news.take():
                    self._link.tell(Told(told))
            if self._link.socket in ready:
                message = self._link.hear(0)
                if isinstance(message, End):
                    return
                self._take(message)
            else:
                self._link.check()

    def _take(self, message: Down) -> None:
        match message:
            case Run(step):
                launched = self._runner.launch(step)
                self._flying.append(launched)
                self._waiter.put([launched.result])
            case Record(of, act) | Try(of, act):
                self._link.tell(Kept(self._runner.perform(act, of)))
            case Trace(order):
                self._runner.trace(order)
            case Drop(request_id, choice):
                self._runner.drop(request_id, choice)
            case Do(order):
                self._runner.order(order)
            case Look():
                pass
            case _:
                raise PeerError(f"the engine said {type(message).__name__} out of turn")

    def _collect(self) -> None:
        launched = self._flying.popleft()
        done, outputs = self._runner.collect(launched)
        if self._answers:
            self._link.tell(Done(done, outputs, launched.tallies))


def join(begin: Begin, spawn: Spawn, device: torch.device) -> Comm:
    """The collectives of a rank."""
    mesh, silence = begin.config.mesh, begin.config.serving.watchdog_timeout
    return connect(
        Place(
            mesh.mesh,
            spawn.rank,
            device,
            begin.meeting,
            mesh.collectives,
            deadline_s=silence,
            listening=spawn.listening,
            peers=mesh.peers,
        )
    )


def load(config: Config, spawn: Spawn, comm: Comm, device: torch.device, link: Link, news: Mailbox[News]) -> Runner:
    """The runner of a rank, with weights from its folder."""
    folder = Path(spawn.folder)
    spec = read_model(folder)
    source = configured_source(folder, spec, config)
    return build_runner(config, spec, source, Seldom(link.loaded), None, spawn.rank, comm, device, news.put)


def _agree(begin: Begin, spawn: Spawn) -> None:
    """Raises `ConfigError` where this host was asked for something else than the engine's."""
    if spawn.config is not None and (found := conflicts(spawn.config, begin.config, begin.model)):
        raise ConfigError(found)


def serve(link: Link, spawn: Spawn) -> int:
    """Runs the rank until its engine ends it; the exit code."""
    comm: Comm | None = None
    begin: Down | None = None
    try:
        link.tell(Hello(placed(spawn.config) if spawn.config is not None else None))
        while isinstance(begin := link.hear(spawn.patience), Look):
            pass
        if isinstance(begin, End) and begin.why:
            raise ConfigError(list(begin.why))
        if not isinstance(begin, Begin):
            raise PeerError(f"the engine said {type(begin).__name__} and not what to be")
        _agree(begin, spawn)
        mesh = begin.config.mesh
        log.setLevel(begin.config.logging.level.upper())
        share_cores(mesh.ranks_here)
        device = torch.device(mesh.device, spawn.device if mesh.device == "cuda" else None)
        stages = Stages()
        with stages.timed("connect"):
            comm = join(begin, spawn, device)
        news: Mailbox[News] = Mailbox()
        runner = load(begin.config, spawn, comm, device, link, news)
        stages.follow([runner.stages])
        link.tell(Loaded(runner.post.seat if runner.post is not None else None, stages))
        Steps(link, runner, news, spawn.rank in mesh.mesh.group(0, "dp")).run()
    except Exception as raised:
        error = (comm.fault() if comm is not None else None) or raised
        if not isinstance(error, TesseraError):
            log.exception("it has failed")
        elif begin is None or spawn.config is not None:  # and so nobody else says it on this host
            log.error("%s", error)
        conflicts = error.conflicts if isinstance(error, ConfigError) else ()
        link.tell(Failed(type(error).__name__, str(error), conflicts))
        return 1
    finally:
        if comm is not None:
            comm.close()
    return 0


def main(argv: list[str]) -> int:
    """The process. Ctrl-C and SIGTERM are for others to answer: the engine tells it when to end."""
    spawn = msgspec.json.decode(argv[0], type=Spawn)
    die_with(spawn.parent)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(format=FORM.format(spawn.rank), datefmt="%Y-%m-%d %H:%M:%S")
    link = Link(spawn.address, spawn.rank, elsewhere=spawn.config is not None)
    try:
        return serve(link, spawn)
    finally:
        link.close()


if __name__ == "__main__":
    code = main(sys.argv[1:])
    logging.shutdown()
    os._exit(code)  # threads of torch and of backends have nothing more to say
