"""Between GPUs: the same suite between processes with a GPU each, or all with one (NCCL takes them for several hosts
then), through NCCL alone and with small collectives through the peers' memory; and collectives in CUDA graphs."""

from __future__ import annotations

import os
import time
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from comm import conformance
from comm.ranks import as_processes, raise_first
from ports import free_port
from tessera.comm.base import Comm
from tessera.comm.connect import Place, connect
from tessera.comm.waits import Waits, drain, interleave
from tessera.core.mesh import Mesh, instance_mesh
from tessera.run.graphs import CudaGraphs

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


def one_rank(
    rank: int, mesh: Mesh, port: int, program: Any, ordered: bool, peers: bool = False, deadline_s: float = 60.0
) -> Any:
    """A rank that connects over NCCL and runs a program."""
    gpus = torch.cuda.device_count()
    if gpus < mesh.size:  # NCCL refuses two ranks of one host on one GPU, and knows hosts by this name
        os.environ.update(NCCL_HOSTID=f"host {rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
    device = torch.device("cuda", rank % gpus)
    comm = connect(Place(mesh, rank, device, f"127.0.0.1:{port}", "nccl", 60.0, deadline_s, ordered, peers=peers))
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


def layers(comm: Comm, x: Tensor, weights: list[Tensor]) -> Waits[Tensor]:
    """A product, all rows together, another product, and a sum that goes home; with work while the rows travel."""
    counts = [len(x)] * comm.mesh.size
    for w in weights:
        mine = x @ w
        coming = comm.gather(mine, "tp", 0, counts)
        beside = torch.tanh(mine)
        everyone = yield coming
        home = yield comm.scatter_sum([torch.tanh(everyone @ w.T)], "tp", 0, counts)
        total = yield comm.sum([home * 1.0], "tp")
        x = home + beside + total
    return x


def recorded(comm: Comm, device: torch.device) -> list[float]:
    """How far two halves that take turns in a CUDA graph are from each alone and unrecorded, for changing inputs."""
    make = torch.Generator(device).manual_seed(5)
    weights = [torch.randn(64, 64, generator=make, device=device).bfloat16() / 8 for _ in range(3)]
    inputs = [torch.zeros(rows, 64, device=device, dtype=torch.bfloat16) for rows in (8, 24)]
    found, replay = CudaGraphs()(lambda: tuple(interleave([layers(comm, x, weights) for x in inputs])))
    apart = []
    for turn in range(20):
        make.manual_seed(100 * turn + comm.rank)
        for x in inputs:
            x.copy_(torch.randn(x.shape, generator=make, device=device))
        replay()
        alone = [drain(layers(comm, x, weights)) for x in inputs]
        apart += [float((a.float() - b.float()).abs().max()) for a, b in zip(found, alone, strict=True)]
    return apart


def left_alone(comm: Comm, device: torch.device) -> None:
    """One rank waits for a peer that does nothing, and says why its device has failed."""
    comm.sum([torch.ones(8, device=device)], "tp").wait().tolist()
    assert comm.fault() is None
    if comm.rank:
        time.sleep(6)
        return
    try:
        comm.sum([torch.ones(8, device=device)], "tp").wait().tolist()
    except RuntimeError as error:
        raise comm.fault() or error from error


PEERS = pytest.mark.parametrize("peers", [False, True], ids=["nccl", "peers"])


@PEERS
@pytest.mark.parametrize("ordered", [False, True], ids=["all-reduce", "in order"])
@pytest.mark.parametrize("mesh", [instance_mesh(2), instance_mesh(2, dp=2, ep=2)], ids=["tp 2", "tp 2, dp 2, ep 2"])
def test_conformance(mesh: Mesh, ordered: bool, peers: bool) -> None:
    program = partial(suite, exact=ordered)
    raise_first(as_processes(2, one_rank, mesh, free_port(), program, ordered, peers, seconds=120))


@PEERS
def test_the_host_does_not_wait(peers: bool) -> None:
    results = as_processes(2, one_rank, instance_mesh(2), free_port(), behind_work, False, peers, seconds=120)
    raise_first(results)
    for host_s, values in results:
        assert values == [6.0] * 4
        assert host_s < 0.05, "the host waited for the GPU"


@PEERS
def test_halves_in_a_graph_give_what_each_gives_alone(peers: bool) -> None:
    results = as_processes(2, one_rank, instance_mesh(2), free_port(), recorded, False, peers, seconds=120)
    raise_first(results)
    for apart in results:
        assert len(apart) == 40
        assert max(apart) < 2.0**-5, "one rounding of bfloat16 near 1, at most a few"


def test_a_peer_that_never_sends_is_noticed() -> None:
    """Its kernel fails after the deadline, and with it all that the process has on the device."""
    results = as_processes(2, one_rank, instance_mesh(2), free_port(), left_alone, False, True, 2.0, seconds=60)
    expected = "rank 0 in a collective of ranks 0, 1 through the peers' memory: nothing came from rank 1 for 2 s"
    assert expected in str(results[0])
