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
            pipe.send(
                _register(engine, pipe, *arguments) if method == "register" else getattr(engine, method)(*arguments)
            )
        except Exception as error:
            pipe.send(error)


def _register(engine: Engine, pipe: Connection, region: int, device: str, given: Any) -> Any:
    """Host memory is shared by its descriptor, which comes separately; on a GPU it must belong to this process."""
    if device == "cpu":
        storage = torch.UntypedStorage._new_shared_fd_cpu(reduction.recv_handle(pipe), given)
        engine.register(region, torch.empty(0, dtype=torch.uint8).set_(storage))
        return None
    memory = torch.from_numpy(given).to(device)
    torch.cuda.synchronize(device)
    engine.register(region, memory)
    return memory.untyped_storage()._share_cuda_()


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
    wait = partialmethod(_call, "wait")
    fence = partialmethod(_call, "fence")
    close = partialmethod(_call, "close")

    def register(self, region: int, memory: Tensor) -> None:
        """As `Engine.register`; `memory` becomes memory of both processes."""
        if memory.is_cuda:
            plain = memory.view(-1).view(torch.uint8).cpu().numpy()
            storage = torch.UntypedStorage._new_shared_cuda(*self._call("register", region, str(memory.device), plain))
            flat = torch.empty(0, dtype=torch.uint8, device=memory.device).set_(storage)[: memory.nbytes]
            memory.set_(flat.view(memory.dtype).view(memory.shape))
            return
        handle, size = memory.untyped_storage()._share_fd_cpu_()
        self._pipe.send(("register", (region, "cpu", size)))
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
