"""What a hand-over costs: `python bench/handover.py speed|plans|device [--json]`.

`speed`: GB/s of each transfer engine between two processes of this host, against a plain copy inside one process, for
long and for short runs. `plans`: copy descriptors (runs) of one request for pairs of layouts, and what making the plan
and the runs takes. `device`: the same as `speed` between two GPUs of this host (or on one), with the pages and slots of
a model, against the link's own peer copy.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from tessera.core.errors import ConfigError
from tessera.core.families import read_spec
from tessera.core.mesh import instance_mesh
from tessera.core.spec import ModelSpec
from tessera.core.tensors import cache_dtypes, cache_table
from tessera.transfer.base import Engine, Runs
from tessera.transfer.copies import CopyPlan
from tessera.transfer.engines import MOVERS, make_engine
from tessera.transfer.manifest import Manifest, Member, Region

ROOT = Path(__file__).resolve().parent.parent
MODELS = {
    "abacus-hybrid": ROOT / "src" / "tessera" / "assets" / "abacus-hybrid",
    "qwen3next16": ROOT / "bench" / "shapes" / "qwen3next16",
    "dsv2lite": ROOT / "bench" / "shapes" / "dsv2lite",
    "qwen3-8b": ROOT / "bench" / "shapes" / "qwen3-8b",
}
PAIRS = (((1, 1), (1, 1)), ((2, 1), (2, 1)), ((4, 1), (4, 2)), ((4, 1), (2, 2)), ((2, 1), (4, 1)), ((4, 1), (1, 4)))
DEADLINE_S = 120.0
PAGE_SIZE = 64


def manifest(spec: ModelSpec, attn: int, dp: int, num_pages: int, num_slots: int) -> Manifest:
    """A server with `attn` ranks in each of `dp` groups, as data."""
    mesh = instance_mesh(attn * dp, dp)
    table = cache_table(spec, PAGE_SIZE, cache_dtypes(spec, "bfloat16"))

    def held(rank: int) -> Member:
        counts = [num_pages if cache.kind == "page" else num_slots for cache in table]
        sizes = [n * cache.bytes_per_unit(mesh, rank) for n, cache in zip(counts, table, strict=True)]
        return Member("local", b"", num_pages, num_slots, tuple(Region(i, size) for i, size in enumerate(sizes)))

    members = tuple(held(rank) for rank in range(mesh.size))
    return Manifest(instance="a", weights="w", mesh=mesh, page_size=PAGE_SIZE, caches=table, members=members)


def load(name: str) -> ModelSpec:
    """The model of that name."""
    return read_spec(json.loads((MODELS[name] / "config.json").read_text()))


def plans(names: list[str], tokens: int) -> Iterator[dict[str, object]]:
    """A line for each model and pair of layouts: one request of so many tokens, its pages in order on both sides."""
    pages = -(-tokens // PAGE_SIZE)
    near, far = np.arange(1, pages + 1), np.random.default_rng(0).permutation(np.arange(1, pages + 1))
    for name in names:
        spec = load(name)
        for src, dst in PAIRS:
            source, destination = (manifest(spec, *side, pages + 1, 3) for side in (src, dst))
            began = time.perf_counter()
            try:
                plan = CopyPlan(source, destination)
            except ConfigError as error:
                yield {"model": name, "prefill": src, "decode": dst, "refused": str(error).partition("\n")[0]}
                continue
            planned = time.perf_counter() - began
            pairs = plan.pairs(0, destination.num_dp_ranks - 1)
            began = time.perf_counter()
            joined = [plan.paged(a, b, near, near) for a, b in pairs]
            took = time.perf_counter() - began
            apart = [plan.paged(a, b, near, far) for a, b in pairs]
            slots = [plan.slots(a, b, 1, 2) for a, b in pairs] if spec.recurrent else []
            moved = sum(int(runs[:, 4].sum()) for runs in [*joined, *slots])
            yield {
                "model": name,
                "prefill": f"TP {src[0]} x DP {src[1]}",
                "decode": f"TP {dst[0]} x DP {dst[1]}",
                "pairs of ranks": len(pairs),
                "runs, pages in order": sum(map(len, joined)),
                "runs, pages scattered": sum(map(len, apart)),
                "runs of the slot": sum(map(len, slots)),
                "MB": round(moved / 1e6, 1),
                "plan, ms": round(1e3 * planned, 1),
                "runs, ms": round(1e3 * took, 2),
            }


def _reader(pipe: Connection, kind: str, device: str, sizes: list[int]) -> None:
    torch.set_num_threads(1)
    engine = make_engine(kind)
    for region, size in enumerate(sizes):
        engine.register(region, torch.zeros(size, dtype=torch.uint8, device=device))
    pipe.send(engine.endpoint())
    pipe.recv()
    engine.close()


class Link:
    """A writer in this process and its reader in another."""

    def __init__(self, kind: str, devices: tuple[str, str], sizes: list[int]) -> None:
        self._engine: Engine = make_engine(kind)
        for region, size in enumerate(sizes):
            memory = torch.zeros(size, dtype=torch.uint8, device=devices[0]).fill_(1)
            self._engine.register(region, memory)
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_reader, args=(theirs, kind, devices[1], sizes))
        self._process.start()
        self._peer = self._engine.connect(self._pipe.recv(), DEADLINE_S)

    def seconds(self, runs: Runs, rounds: int) -> float:
        """The best of several rounds, from the post to the acknowledgement."""
        return min(self._once(runs) for _ in range(rounds))

    def _once(self, runs: Runs) -> float:
        began = time.perf_counter()
        ticket = self._engine.write(self._peer, runs)
        while not (done := self._engine.poll()):
            if time.perf_counter() - began > DEADLINE_S:
                raise TimeoutError(f"{len(runs)} runs took more than {DEADLINE_S} s")
            time.sleep(20e-6)
        took = time.perf_counter() - began
        if done[0].ticket != ticket or done[0].error is not None:
            raise RuntimeError(f"the copy failed: {done[0].error}")
        return took

    def close(self) -> None:
        """Ends both sides."""
        self._pipe.send(None)
        self._process.join()
        self._engine.close()


def even(total: int, length: int) -> Runs:
    """Runs of one length that fill a region, the destination in reverse order, so that nothing joins."""
    at = np.arange(0, total, length)
    return np.stack([0 * at, at, 0 * at, at[::-1], 0 * at + length], 1)


def best(function: Callable[[], object], rounds: int) -> float:
    """Seconds of the quickest call."""
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        function()
        took.append(time.perf_counter() - began)
    return min(took)


def speed(kinds: list[str], total: int, rounds: int) -> Iterator[dict[str, object]]:
    """A line for each engine: GB/s by length of a run, each beside a plain copy taken turn about, and microseconds of
    one run of 4 KiB alone."""
    source, target = torch.ones(total, dtype=torch.uint8), torch.zeros(total, dtype=torch.uint8)
    for kind in kinds:
        try:
            link = Link(kind, ("cpu", "cpu"), [total])
        except ConfigError as error:
            yield {"engine": kind, "refused": str(error)}
            continue
        line: dict[str, object] = {"engine": kind}
        for name, length in (("16 KiB", 1 << 14), ("256 KiB", 1 << 18), ("16 MiB", 1 << 24)):
            runs = even(total, length)
            took = [(link.seconds(runs, 1), best(lambda: target.copy_(source), 1)) for _ in range(rounds)]
            ours, plain = (total / 1e9 / min(column) for column in zip(*took, strict=True))
            line[name] = f"{ours:.2f} / {plain:.2f}"
        line["one of 4 KiB, us"] = round(1e6 * link.seconds(even(1 << 12, 1 << 12), 10 * rounds))
        link.close()
        yield line


def peer_copy(devices: tuple[str, str], rounds: int) -> float:
    """GB/s of one large copy between two devices, or inside one: the limit of what follows."""
    source, target = (torch.zeros(1 << 30, dtype=torch.uint8, device=name) for name in devices)

    def once() -> None:
        target.copy_(source)
        for name in devices:
            torch.cuda.synchronize(name)

    once()
    return source.nbytes / 1e9 / best(once, rounds)


def device(name: str, tokens: int, rounds: int) -> Iterator[dict[str, object]]:
    """Peer copy of the link, then hand-overs of a request between two servers of one rank, and to one of two ranks."""
    devices = ("cuda:0", f"cuda:{min(1, torch.cuda.device_count() - 1)}")
    limit = peer_copy(devices, rounds)
    yield {
        "what": f"peer copy {devices[0]} to {devices[1]} of {torch.cuda.get_device_name(0)}",
        "GB/s": round(limit, 1),
    }
    spec, pages = load(name), -(-tokens // PAGE_SIZE)
    near, far = np.arange(1, pages + 1), np.random.default_rng(0).permutation(np.arange(1, pages + 1))
    for attn in (1, 2):
        source, destination = manifest(spec, 1, 1, pages + 1, 3), manifest(spec, attn, 1, pages + 1, 3)
        plan = CopyPlan(source, destination)
        sizes = [region.num_bytes for region in source.members[0].regions]  # enough for either side
        link = Link("cuda_ipc", devices, sizes)
        for what, to in (("pages in order", near), ("pages scattered", far)):
            runs = np.concatenate([plan.paged(0, 0, near, to), plan.slots(0, 0, 1, 2)])
            took, moved = link.seconds(runs, rounds), int(runs[:, 4].sum())
            yield {
                "what": f"{name}, {tokens} tokens, TP 1 to rank 0 of TP {attn}, {what}",
                "runs": len(runs),
                "MB": round(moved / 1e6, 1),
                "ms": round(1e3 * took, 2),
                "GB/s": round(moved / 1e9 / took, 1),
                "of the peer copy": f"{moved / 1e9 / took / limit:.0%}",
            }
        link.close()


def report(lines: Iterator[dict[str, object]], as_json: bool) -> None:
    """Writes each line as it comes: JSON, or a row of a table whose head comes anew when its columns change."""
    columns: tuple[str, ...] = ()
    for line in lines:
        text = json.dumps(line) if as_json else f"| {' | '.join(map(str, line.values()))} |"
        if not as_json and tuple(line) != columns:
            columns = tuple(line)
            text = f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n{text}"
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    ask = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    ask.add_argument("what", choices=("speed", "plans", "device"))
    ask.add_argument("--engines", nargs="+", default=[kind for kind in MOVERS if kind != "cuda_ipc"], choices=MOVERS)
    ask.add_argument("--models", nargs="+", default=["abacus-hybrid", "qwen3next16", "dsv2lite"], choices=MODELS)
    ask.add_argument("--tokens", type=int, default=4096, help="tokens of the request")
    ask.add_argument("--mib", type=int, default=256, help="MiB that `speed` moves")
    ask.add_argument("--rounds", type=int, default=5)
    ask.add_argument("--json", action="store_true")
    asked = ask.parse_args(arguments)
    torch.set_num_threads(1)
    if asked.what == "plans":
        report(plans(asked.models, asked.tokens), asked.json)
    elif asked.what == "speed":
        report(speed(asked.engines, asked.mib << 20, asked.rounds), asked.json)
    else:
        for name in asked.models:
            report(device(name, asked.tokens, asked.rounds), asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
