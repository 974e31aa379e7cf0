"""What the two collectives around experts cost between GPUs, in a CUDA graph: `python bench/wire.py [--ranks 2]`.

A gather of `rows` hidden states of each rank, and the scattered sum of all of them, 20 of each in a graph, one after
the other; microseconds of one, median of 30 replays, through NCCL alone and through the memory of the peers.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import sys
from collections.abc import Callable

import torch
import torch.multiprocessing as multiprocessing

from tessera.comm.base import Comm, Handle
from tessera.comm.connect import Place, connect
from tessera.core.mesh import instance_mesh
from tessera.run.graphs import CudaGraphs

HIDDEN, EACH = 2048, 20


def rank_main(rank: int, world: int, ports: list[int], rows_of: list[int]) -> None:
    """One rank; rank 0 tells."""
    device = torch.device("cuda", rank)
    for peers, port in zip((False, True), ports, strict=True):
        comm = connect(Place(instance_mesh(world), rank, device, f"127.0.0.1:{port}", "nccl", 60.0, 60.0, peers=peers))
        for rows in rows_of:
            for what, took in measured(comm, rows, device).items():
                if rank == 0:
                    line = {"what": what, "rows": rows, "peers": peers, "us": round(took, 1)}
                    sys.stdout.write(json.dumps(line) + "\n")
                    sys.stdout.flush()
        comm.close()


def measured(comm: Comm, rows: int, device: torch.device) -> dict[str, float]:
    """Microseconds of each collective."""
    mine, counts = torch.randn(rows, HIDDEN, device=device).bfloat16(), [rows] * comm.mesh.size
    whole = torch.randn(sum(counts), HIDDEN, device=device).bfloat16()
    return {
        "gather": timed(lambda: comm.gather(mine, "tp", 0, counts)),
        "scattered sum": timed(lambda: comm.scatter_sum([whole], "tp", 0, counts)),
        "sum": timed(lambda: comm.sum([mine], "tp")),
    }


def timed(start: Callable[[], Handle]) -> float:
    """Microseconds of one of the collectives that `start` begins."""
    _, replay = CudaGraphs()(lambda: tuple(start().wait() for _ in range(EACH)))
    took = []
    for _ in range(33):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        replay()
        last.record()
        last.synchronize()
        took.append(first.elapsed_time(last) * 1e3 / EACH)
    return statistics.median(took[3:])


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64, 256, 1024])
    args = parser.parse_args()
    if torch.cuda.device_count() < args.ranks:
        parser.error(f"needs {args.ranks} CUDA devices, found {torch.cuda.device_count()}")
    found = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [s.getsockname()[1] for s in found]
    for s in found:
        s.close()
    multiprocessing.spawn(rank_main, (args.ranks, ports, args.rows), nprocs=args.ranks)


if __name__ == "__main__":
    main()
