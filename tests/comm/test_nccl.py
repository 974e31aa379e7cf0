"""NCCL: the same suite between processes with a GPU each, or all with one (then NCCL takes them for several hosts)."""

from __future__ import annotations

import os
import time
from functools import partial
from typing import Any

import pytest
import torch

from comm import conformance
from comm.ranks import as_processes, free_port, raise_first
from tessera.comm.base import Comm
from tessera.comm.connect import Place, connect
from tessera.core.mesh import Mesh, instance_mesh

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


def one_rank(rank: int, mesh: Mesh, port: int, program: Any, ordered: bool) -> Any:
    """A rank that connects over NCCL and runs a program."""
    gpus = torch.cuda.device_count()
    if gpus < mesh.size:  # NCCL refuses two ranks of one host on one GPU, and knows hosts by this name
        os.environ.update(NCCL_HOSTID=f"host {rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
    device = torch.device("cuda", rank % gpus)
    comm = connect(Place(mesh, rank, device, f"127.0.0.1:{port}", "nccl", 60.0, 60.0, ordered))
    try:
        return program(comm, device)
    finally:
        comm.close()


def suite(comm: Comm, device: torch.device, exact: bool) -> None:
    """The conformance suite on a device."""
    conformance.run(comm, count=90, exact=exact, device=device)


def behind_work(comm: Comm, device: torch.device) -> tuple[float, list[float]]:
    """Seconds that the host spends on a sum behind long work of the GPU, and the sum."""
    _ = comm.sum([torch.ones(4, device=device)], "tp").wait() * 3  # loads the kernels, which would wait for the GPU
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)
    began = time.perf_counter()
    total = comm.sum([torch.ones(4, device=device)], "tp").wait() * 3
    host_s = time.perf_counter() - began
    values = total.tolist()
    return host_s, values


@pytest.mark.parametrize("ordered", [False, True], ids=["all-reduce", "in order"])
@pytest.mark.parametrize("mesh", [instance_mesh(2), instance_mesh(2, dp=2, ep=2)], ids=["tp 2", "tp 2, dp 2, ep 2"])
def test_conformance(mesh: Mesh, ordered: bool) -> None:
    program = partial(suite, exact=ordered)
    raise_first(as_processes(2, one_rank, mesh, free_port(), program, ordered, seconds=120))


def test_the_host_does_not_wait() -> None:
    results = as_processes(2, one_rank, instance_mesh(2), free_port(), behind_work, False, seconds=120)
    raise_first(results)
    for host_s, values in results:
        assert values == [6.0] * 4
        assert host_s < 0.05, "the host waited for the GPU"
