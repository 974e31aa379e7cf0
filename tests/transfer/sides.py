"""A side of a transfer engine in a process of its own, driven from a test as if it were here."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import partialmethod
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from tessera.transfer.base import Engine

REPLY_S = 60.0


def _serve(pipe: Connection, make: Callable[[], Engine], environ: dict[str, str]) -> None:
    os.environ.update(environ)
    torch.set_num_threads(1)
    engine = make()
    pipe.send(engine.name)
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            if method == "register":
                arguments = (arguments[0], _received(pipe, *arguments[1:]))
            pipe.send(getattr(engine, method)(*arguments))
        except Exception as error:
            pipe.send(error)


def _received(pipe: Connection, *shared: Any) -> Tensor:
    if len(shared) == 1:  # bytes of shared memory, whose descriptor comes separately
        storage = torch.UntypedStorage._new_shared_fd_cpu(reduction.recv_handle(pipe), shared[0])
        return torch.empty(0, dtype=torch.uint8).set_(storage)
    storage = torch.UntypedStorage._new_shared_cuda(*shared)
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class Side:
    """An `Engine` in another process. What is registered becomes memory of both."""

    def __init__(self, make: Callable[[], Engine], environ: dict[str, str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tessera.transfer.engines", "transfer.sides"])
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, environ), daemon=True)
        self.process.start()
        theirs.close()
        self.name = self._reply()

    def _reply(self) -> Any:
        assert self._pipe.poll(REPLY_S), "the other process does not answer"
        found = self._pipe.recv()
        if isinstance(found, BaseException):
            raise found
        return found

    def _call(self, method: str, *arguments: Any) -> Any:
        self._pipe.send((method, arguments))
        return self._reply()

    endpoint = partialmethod(_call, "endpoint")
    connect = partialmethod(_call, "connect")
    write = partialmethod(_call, "write")
    poll = partialmethod(_call, "poll")
    fence = partialmethod(_call, "fence")
    close = partialmethod(_call, "close")

    def register(self, region: int, memory: Tensor) -> None:
        """As `Engine.register`; `memory` moves into shared memory first."""
        storage = memory.untyped_storage()
        if memory.is_cuda:
            self._call("register", region, *storage._share_cuda_())
            return
        handle, size = storage._share_fd_cpu_()
        self._pipe.send(("register", (region, size)))
        reduction.send_handle(self._pipe, handle, self.process.pid)
        self._reply()

    def kill(self) -> None:
        """The process is gone."""
        self.process.kill()
        self.process.join()

    def pause(self) -> None:
        """The process hangs, until `kill` or `resume`."""
        os.kill(self.process.pid or 0, signal.SIGSTOP)

    def resume(self) -> None:
        """The process goes on."""
        os.kill(self.process.pid or 0, signal.SIGCONT)

    def end(self) -> None:
        """Leaves nothing running."""
        self._pipe.close()
        self.kill()
