"""The inside of the engine process: it builds an engine, hands it what the front says, and ends with its parent.

Ctrl-C and SIGTERM are the front's to answer: it tells the engine when to stop, and the kernel ends the engine if the
front dies.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from tessera.core.errors import ConfigError, PeerError, TesseraError
from tessera.core.messages import Fatal, Inbound
from tessera.run.children import die_with
from tessera.serve import logs
from tessera.serve.wire import Begin, EngineEnd, Refusal, Upward

log = logging.getLogger(__name__)

BEGIN_SECONDS = 30.0
HEAR_SECONDS = 0.2


class Engine(Protocol):
    """What is hosted."""

    def post(self, message: Inbound) -> None:
        """Hands a message in, from any thread."""

    def run(self) -> None:
        """Blocks until `Stop`, or a failure that it has told."""


Tell = Callable[[Upward], None]
Build = Callable[[Begin, Tell], Engine]


def host(argv: Sequence[str], build: Build) -> int:
    """Runs an engine for the front that started this process with (folder of the wire, its process id)."""
    die_with(int(argv[1]))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logs.configure()
    end = EngineEnd(Path(argv[0]))
    try:
        return _host(end, build)
    finally:
        end.close()


def _host(end: EngineEnd, build: Build) -> int:
    failed: list[Fatal] = []

    def tell(message: Upward) -> None:
        if isinstance(message, Fatal):
            failed.append(message)
        end.tell(message)

    try:
        begin = end.hear(BEGIN_SECONDS)
        if not isinstance(begin, Begin):
            raise PeerError(f"the front said {type(begin).__name__} and not what to start")
        engine = build(begin, tell)
    except ConfigError as error:
        end.tell(Refusal(error.conflicts))
        return 2
    except Exception as error:
        if not isinstance(error, TesseraError):
            log.exception("the engine could not be built")
        kind = "" if isinstance(error, TesseraError) else f"{type(error).__name__}: "
        end.tell(Fatal(f"{kind}{error}", type(error).__name__))
        return 1
    _run(engine, end)
    return 1 if failed else 0


def _run(engine: Engine, end: EngineEnd) -> None:
    ended = threading.Event()

    def listen() -> None:
        while not ended.is_set():
            message = end.hear(HEAR_SECONDS)
            if message is not None and not isinstance(message, Begin):
                engine.post(message)

    listener = threading.Thread(target=listen, name="tessera-listen")
    listener.start()
    try:
        engine.run()
    finally:
        ended.set()
        listener.join()
