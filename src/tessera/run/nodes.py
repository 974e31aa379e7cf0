"""The ranks of one host: started beside their engine, or on a host of their own, for an engine on another."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import msgspec
import zmq

from tessera.core.config.types import Config
from tessera.core.errors import PeerError
from tessera.core.mesh import ranks_of
from tessera.run import ahead
from tessera.run.children import Children
from tessera.run.startup import Prepared
from tessera.run.wire import Spawn, watched

COMMAND = (sys.executable, "-P", "-m", "tessera.run.rank")
END_S = 5.0
BEGIN_S = 600.0  # for all ranks to be started
log = logging.getLogger(__name__)


def start(
    address: str,
    ranks: Sequence[int],
    devices: Sequence[int],
    folder: str,
    patience: float = BEGIN_S,
    listening: int | None = None,
    config: Config | None = None,
) -> Children:
    """Starts processes for `ranks` that find their engine at `address`; rank 0 inherits `listening`. `devices`: the
    number of the GPU of each. `patience`: seconds that they wait for the others. `config`: what this host
    resolved, where the engine is on another."""
    spawns = [
        Spawn(address, os.getpid(), rank, device, folder, patience, None if rank else listening, config)
        for rank, device in zip(ranks, devices, strict=False)
    ]
    commands = [[*COMMAND, msgspec.json.encode(spawn).decode()] for spawn in spawns]
    return Children(commands, [[] if spawn.listening is None else [spawn.listening] for spawn in spawns])


@contextlib.contextmanager
def engine_at(address: str) -> Iterator[zmq.Socket[bytes]]:
    """A socket that becomes readable when the engine there has gone; nothing is said to it. A rank that hangs does not
    notice that, and its host would wait for it for ever."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as link:
        link.linger = 0
        gone = watched(link)
        try:
            link.connect(address)
            yield gone
        finally:
            link.disable_monitor()
            gone.close(0)


def follow(prepared: Prepared) -> None:
    """Runs the ranks of this host until their engine, on the first host, ends them, or a signal does.

    Raises `PeerError` when one has failed, or does not find the engine in time; the others are ended then.
    """
    config = prepared.resolved.config
    ranks = ranks_of(config.mesh.tp, config.mesh.num_nodes, config.mesh.node_rank)
    told, tell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os.write(tell, b"."))
    mesh = config.mesh
    compiling = ahead.start(prepared.folder, prepared.spec, config)  # each host has a cache of its own
    shown = replace(config, serving=replace(config.serving, api_key=None))  # the list of processes is for all to see
    children = start(f"tcp://{mesh.meeting}", ranks, mesh.devices, str(prepared.folder), mesh.meet_within, config=shown)
    log.info("ranks %d to %d wait for the engine at %s", ranks[0], ranks[-1], config.mesh.meeting)
    log.info("scheduling, sizes of pools and serving are as the first host says")
    try:
        with engine_at(f"tcp://{mesh.meeting}") as gone:
            waiting = zmq.Poller()
            for end in (told, gone, *children.ends):
                waiting.register(end, zmq.POLLIN)
            ready = dict(waiting.poll())
        if told in ready:
            log.info("a signal ends the ranks of this host")
            return
        children.wait(END_S)
        if failed := children.ended(badly=True):
            raise PeerError("; ".join(f"rank {ranks[i]} {how}" for i, how in failed.items()))
        if len(children.ended()) < len(ranks):
            raise PeerError(
                f"the engine has gone, and a rank of this host has not ended within {END_S:g} s; it is killed"
            )
    finally:
        children.close()
        if compiling is not None:
            compiling.close()
        os.close(told)
        os.close(tell)
