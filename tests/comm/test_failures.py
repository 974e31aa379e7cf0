"""A rank that dies, hangs, leaves or never comes: the others are told, by name and in time; nothing is left behind."""

from __future__ import annotations

import gc
import os
import re
import signal
import socket
import time
from functools import partial
from multiprocessing import get_context
from typing import Any

import pytest
import torch

from comm.ranks import CPU, as_processes, place, raise_first, run_program, together
from ports import free_port
from tessera.comm.base import Comm
from tessera.comm.connect import Place, connect
from tessera.comm.dist import explained
from tessera.comm.meet import meet
from tessera.core.errors import ConfigError, DeadlineError, PeerError
from tessera.core.mesh import instance_mesh
from waits import PATIENCE_S

MESH = instance_mesh(4, dp=2)


def sums(comm: Comm, victim: int, end: Any) -> tuple[str, str, float]:
    """Sums for ever; after some the victim ends. What the others were told, and how long they waited for it."""
    began = time.monotonic()
    try:
        for i in range(1_000_000):
            if comm.rank == victim and i == 20:
                end(comm)
                return "", "", 0.0
            began = time.monotonic()
            comm.sum([torch.ones(3)], "tp").wait()
            comm.gather(torch.ones(i % 3), "attn", 0).wait()
    except (PeerError, DeadlineError) as error:
        return type(error).__name__, str(error), time.monotonic() - began
    raise AssertionError("nobody was told")


def dies(comm: Comm) -> None:
    """As a process that the kernel kills for memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def leaves(comm: Comm) -> None:
    """In good order, and lives on."""
    comm.close()


def hangs(comm: Comm) -> None:
    """Lives, and does nothing."""
    time.sleep(4)


VICTIM = 2
ENDS = {leaves: 20.0, hangs: 1.0, dies: 20.0}  # and the deadline of a collective in seconds


def every_end(rank: int, kind: str, ports: list[int]) -> list[tuple[str, str, float]]:
    """A rank's part in all of them, one after the other."""
    told = []
    for port, (end, deadline_s) in zip(ports, ENDS.items(), strict=True):
        program = partial(sums, victim=VICTIM, end=end)
        told.append(run_program(rank, MESH, kind, port, program, {"deadline_s": deadline_s}))
    return told


@pytest.mark.parametrize("kind", ["shared", "gloo"])
def test_the_others_are_told(kind: str) -> None:
    before = set(os.listdir("/dev/shm"))
    results = as_processes(4, every_end, kind, [free_port() for _ in ENDS])
    assert set(os.listdir("/dev/shm")) <= before, "a segment was left behind"
    assert results.pop(VICTIM) is None, "it was killed"
    raise_first(results)
    left, hung, died = zip(*results, strict=True)
    for told in (*left, *died):
        name, text, waited = told
        assert name == "PeerError", told  # at their deadline it would be another
        assert waited < 4.0, told
        # Rank 3 waits for 2 and leaves when it hears: its neighbours may hear of either.
        assert kind != "shared" or "rank 2 has " in text or "rank 3 has " in text, told
    assert any(name == "DeadlineError" for name, _, _ in hung), hung
    assert all(waited < 3.5 for _, _, waited in hung), hung
    assert kind != "shared" or any("for ranks [2]" in text for _, text, _ in hung), hung


def test_ranks_that_do_not_join_are_named() -> None:
    port = free_port()
    joins = [partial(connect, place(MESH, rank, "shared", port, join_s=1.0)) for rank in (0, 3)]
    began = time.monotonic()
    errors = together(joins)
    assert time.monotonic() - began < 4
    assert all(isinstance(error, (DeadlineError, PeerError)) for error in errors), errors
    named = [str(error) for error in errors if isinstance(error, DeadlineError)]
    assert named, errors
    assert all("1 (unknown), 2 (unknown)" in text and "0 (" not in text for text in named), named


def test_rank_0_leaves_while_ranks_meet() -> None:
    port, two = free_port(), instance_mesh(2)
    met = [partial(meet, two, rank, f"127.0.0.1:{port}", "shared", 5.0) for rank in range(2)]
    first, second = together(met)
    del first, met
    gc.collect()
    for what in (partial(second.all_at, "mapped"), partial(second.ask, "segment")):
        with pytest.raises(PeerError, match=r"rank 0 has left before all ranks met at '(mapped|segment)'"):
            what()


def test_rank_0_does_not_come() -> None:
    port = free_port()
    with pytest.raises(DeadlineError, match=rf"rank 1 waited 1.0 s for rank 0 at 127.0.0.1:{port}"):
        connect(place(MESH, 1, "gloo", port, join_s=1.0))


def test_threads_that_do_not_join_are_named() -> None:
    errors = together([partial(connect, place(MESH, rank, "threads", 1, join_s=0.2)) for rank in (0, 3)])
    assert all(isinstance(error, DeadlineError) and "[1, 2]" in str(error) for error in errors), errors


def test_threads_join_by_address() -> None:
    comms = together([partial(connect, place(MESH, rank, "threads", 2)) for rank in range(4)])
    results = together([lambda c=comm: c.sum([torch.ones(2)], "tp").wait() for comm in comms])
    assert all(torch.equal(result, torch.full((2,), 4.0)) for result in results), results


def test_a_port_in_use() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match=r"cannot listen at .*Choose a free port"):
            meet(MESH, 0, f"127.0.0.1:{other.getsockname()[1]}", "gloo", 1.0)


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:0", "host:70000", "host:x"])
def test_a_bad_address(address: str) -> None:
    with pytest.raises(ConfigError, match=r"is no address\. Give host:port"):
        meet(MESH, 0, address, "gloo", 1.0)


def test_two_processes_are_one_rank() -> None:
    port, two = free_port(), instance_mesh(2)
    results = as_processes(3, joins_as, two, port, [0, 1, 1], get_context("forkserver").Event())
    refused = [r for r in results if isinstance(r, ConfigError)]
    assert len(refused) == 1, results
    assert "is that rank already" in str(refused[0])


def joins_as(process: int, mesh: Any, port: int, ranks: list[int], refused: Any) -> None:
    """Joins as the rank that was given to this process; who may stay waits until somebody was refused."""
    try:
        meeting = meet(mesh, ranks[process], f"127.0.0.1:{port}", "gloo", PATIENCE_S)
    except ConfigError:
        refused.set()
        raise
    assert refused.wait(PATIENCE_S)
    assert len(meeting.cards) == 2


@pytest.mark.parametrize("kind", ["gloo", "threads"])
def test_ranks_that_disagree(kind: str) -> None:
    port = free_port()
    places = [place(instance_mesh(2, dp=rank + 1), rank, kind, port, join_s=0.5) for rank in range(2)]
    errors = together([partial(connect, where) for where in places])
    refused = [error for error in errors if isinstance(error, ConfigError)]
    assert refused, errors
    assert "Start " in str(refused[0])
    assert "with the same flags" in str(refused[0])


def test_kinds_for_a_device() -> None:
    for kind, device, fits in (
        ("nccl", CPU, "threads"),
        ("shared", torch.device("cuda", 0), "nccl"),
        ("mpi", CPU, "gloo"),
    ):
        with pytest.raises(ConfigError, match=f"'{kind}' collectives do not run on .*{fits}"):
            connect(Place(MESH, 0, device, "127.0.0.1:1", kind))


def test_one_rank_needs_nobody() -> None:
    comm = connect(Place(instance_mesh(1), 0, CPU, "", "gloo"))
    assert torch.equal(comm.sum([torch.ones(2), torch.ones(2)], "tp").wait(), torch.full((2,), 2.0))


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("Connection closed by peer [127.0.0.1]:23", "a rank has ended or left"),
        ("Read error [::1]:5: Connection reset by peer", "a rank has ended or left"),
        ("Write error: Broken pipe", "a rank has ended or left"),
        ("connect [10.0.0.2]:7: Connection refused", "a rank has ended or left"),
        ("ncclRemoteError: A call failed possibly due to a network error or a remote process exiting", "a rank has "),
        ("Invalid scalar type", "the backend of collectives failed"),
        ("op.preamble.length <= op.nbytes. 8 vs 4", "the backend of collectives failed"),
        ("CUDA error: out of memory", "the backend of collectives failed"),
    ],
)
def test_a_mistake_is_not_taken_for_a_rank_that_left(said: str, found: str) -> None:
    with pytest.raises(PeerError, match=re.escape(f"rank 0 in sum: {found}")), explained("rank 0 in sum", 10.0):
        raise RuntimeError(said)


def test_what_gloo_says_is_told_without_its_advice() -> None:
    """Which is for those who develop it: where in its source it was, and to look at other logs."""
    advice = "This is typically caused by a remote worker hanging or bugs in the application. GLHF!"
    said = (
        f"[/__w/pytorch/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:23: Connection reset by peer. {advice}"
    )
    with pytest.raises(PeerError) as caught, explained("rank 0 in sum", 10.0):
        raise RuntimeError(said)
    told = "a rank has ended or left (Read error [127.0.0.1]:23: Connection reset by peer.)"
    assert str(caught.value) == f"rank 0 in sum: {told}"
