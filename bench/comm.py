"""Microseconds of a sum among CPU ranks: `python bench/comm.py [--ranks 2 4] [--kinds shared gloo] [--rows 1]`.

What is summed is a step's hidden states, `[rows, 2048]` in float32. Each round is timed on rank 0 from the
call to the result; ranks meet anew in each round, so the figure holds what waiting for the slowest costs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import statistics
import time

import torch

from tessera.comm.connect import Place, connect
from tessera.core.mesh import instance_mesh

HIDDEN = 2048


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _rank(place: Place, all_rows: list[int], rounds: int) -> None:
    torch.set_num_threads(1)
    comm = connect(place)
    for rows in all_rows:
        took = []
        for _ in range(rounds):
            part = torch.ones(rows, HIDDEN)
            began = time.perf_counter()
            comm.sum([part], "tp").wait()
            took.append(1e6 * (time.perf_counter() - began))
        if place.rank == 0:
            took.sort()
            name = f"{place.kind}{' in order' if place.ordered else ''}"
            best, median, late = took[0], statistics.median(took), took[int(0.95 * rounds)]
            print(f"| {name} | {place.mesh.size} | {rows} | {best:.0f} | {median:.0f} | {late:.0f} |", flush=True)
    comm.close()


def measure(kind: str, ranks: int, ordered: bool, rows: list[int], rounds: int) -> None:
    """Prints a line for each number of rows: microseconds, the best, the median and what 95 % of rounds stay below."""
    address, mesh = f"127.0.0.1:{_free_port()}", instance_mesh(ranks)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tessera.comm.connect"])
    places = [Place(mesh, rank, torch.device("cpu"), address, kind, ordered=ordered) for rank in range(ranks)]
    processes = [context.Process(target=_rank, args=(place, rows, rounds)) for place in places]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints a table."""
    ask = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    ask.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    ask.add_argument("--kinds", nargs="+", default=["shared", "gloo", "gloo-ordered"])
    ask.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    ask.add_argument("--rounds", type=int, default=500)
    asked = ask.parse_args(arguments)
    print("| collectives | ranks | rows | best us | median us | 95 % us |\n|---|---|---|---|---|---|", flush=True)
    for ranks in asked.ranks:
        for kind in asked.kinds:
            measure(kind.removesuffix("-ordered"), ranks, kind.endswith("-ordered"), asked.rows, asked.rounds)


if __name__ == "__main__":
    main()
