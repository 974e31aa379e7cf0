"""Starts ranks for a test: as threads, or as processes forked from one server that has loaded torch already."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from tessera.comm.connect import Place, connect
from tessera.comm.local import LocalComm, LocalGroup
from tessera.core.mesh import Mesh
from waits import PATIENCE_S

CPU = torch.device("cpu")


def place(mesh: Mesh, rank: int, kind: str, port: int, **more: Any) -> Place:
    """Where a rank joins on this host."""
    return Place(mesh, rank, CPU, f"127.0.0.1:{port}", kind, **{"join_s": PATIENCE_S, "deadline_s": PATIENCE_S, **more})


def together(functions: list[Callable[[], Any]]) -> list[Any]:
    """Results of the functions, run as threads at once; an exception is a result."""
    results: list[Any] = [None] * len(functions)

    def run(i: int) -> None:
        try:
            results[i] = functions[i]()
        except (Exception, AssertionError) as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def as_threads(
    mesh: Mesh, program: Callable[[LocalComm], Any], make: type[LocalComm] = LocalComm, deadline_s: float = PATIENCE_S
) -> list[Any]:
    """What each rank's program gave or raised. A rank that fails tells the others."""
    group = LocalGroup(mesh, deadline_s)

    def rank(number: int) -> Any:
        try:
            return program(make(group, number))
        except BaseException as error:
            group.fail(number, error)
            raise

    return together([lambda r=r: rank(r) for r in range(mesh.size)])


def raise_first(results: list[Any]) -> None:
    """Raises the first exception among results."""
    for result in results:
        if isinstance(result, BaseException):
            raise result


def _child(function: Callable[..., Any], rank: int, arguments: tuple[Any, ...], pipe: Connection) -> None:
    torch.set_num_threads(1)
    try:
        pipe.send(function(rank, *arguments))
    except BaseException as error:
        pipe.send(error)


def as_processes(size: int, function: Callable[..., Any], *arguments: Any, seconds: float = 100) -> list[Any]:
    """What `function(rank, *arguments)` gave or raised in each of `size` processes; None where one was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "comm.conformance", "comm.ranks"])
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    processes = [
        context.Process(target=_child, args=(function, r, arguments, sender), daemon=True)
        for r, (_, sender) in enumerate(pipes)
    ]
    for process, (_, sender) in zip(processes, pipes, strict=True):
        process.start()
        sender.close()
    results: list[Any] = [None] * size
    open_pipes, until = {receiver: r for r, (receiver, _) in enumerate(pipes)}, time.monotonic() + seconds
    while open_pipes and (ready := wait(list(open_pipes), until - time.monotonic())):
        for pipe in ready:
            rank = open_pipes.pop(pipe)
            try:
                results[rank] = pipe.recv()
            except EOFError:
                results[rank] = None
    for process in processes:
        if open_pipes:
            process.kill()
        process.join()
    assert not open_pipes, f"ranks {sorted(open_pipes.values())} did not end within {seconds} s"
    return results


def run_program(
    rank: int, mesh: Mesh, kind: str, port: int, program: Callable[..., Any], options: dict[str, Any]
) -> Any:
    """One rank of a mesh that connects, runs a program and leaves; a rank outside the mesh does nothing."""
    if rank >= mesh.size:
        return None
    comm = connect(place(mesh, rank, kind, port, **options))
    try:
        return program(comm)
    finally:
        comm.close()
