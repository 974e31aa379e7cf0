"""What a hand-over costs: `python bench/handover.py speed|plans|device [--json]`.

`speed`: GB/s of each transfer engine between two processes of this host, against a plain copy inside one process, for
long and for short runs. `plans`: copy descriptors (runs) of one request for pairs of layouts, and what making the plan
and the runs takes. `device`: hand-overs of a model's pages and slots between two GPUs of this host (or on one; without
any, in memory of the host), against the link's own peer copy: one alone, its legs, and several at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from link import Link
from tessera.core.errors import ConfigError
from tessera.core.families import read_spec
from tessera.core.mesh import instance_mesh
from tessera.core.spec import ModelSpec
from tessera.core.tensors import cache_dtypes, cache_table
from tessera.transfer.base import Runs
from tessera.transfer.copies import CopyPlan
from tessera.transfer.engines import MOVERS
from tessera.transfer.manifest import Manifest, Member, Region

ROOT = Path(__file__).resolve().parent.parent
MODELS = {
    "abacus-hybrid": ROOT / "src" / "tessera" / "assets" / "abacus-hybrid",
    "qwen3next16": ROOT / "bench" / "shapes" / "qwen3next16",
    "dsv2lite": ROOT / "bench" / "shapes" / "dsv2lite",
    "qwen3-8b": ROOT / "bench" / "shapes" / "qwen3-8b",
}
PAIRS = (((1, 1), (1, 1)), ((2, 1), (2, 1)), ((4, 1), (4, 2)), ((4, 1), (2, 2)), ((2, 1), (4, 1)), ((4, 1), (1, 4)))
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
    return Manifest(
        instance="a", weights="w", mesh=mesh, page_size=PAGE_SIZE, parts="model", caches=table, members=members
    )


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


def peer_copy(devices: tuple[str, str], total: int, rounds: int) -> float:
    """GB/s of one large copy between two devices, or inside one: the limit of what follows."""
    source, target = (torch.zeros(total, dtype=torch.uint8, device=name) for name in devices)

    def once() -> None:
        target.copy_(source)
        for name in {name for name in devices if name != "cpu"}:
            torch.cuda.synchronize(name)

    once()
    return source.nbytes / 1e9 / best(once, rounds)


def two_devices() -> tuple[str, tuple[str, str], str]:
    """The engine between two GPUs, or on one, or in memory of the host; both devices; what they are."""
    if not torch.cuda.is_available():
        return "local", ("cpu", "cpu"), "the host's memory"
    return "cuda_ipc", ("cuda:0", f"cuda:{min(1, torch.cuda.device_count() - 1)}"), torch.cuda.get_device_name(0)


def device(name: str, tokens: int, requests: int, total: int, rounds: int) -> Iterator[dict[str, object]]:
    """Peer copy of the link, then hand-overs of a request between two servers of one rank, and to one of two ranks:
    alone, where the time of that goes, and so many of them under way at once."""
    kind, devices, what = two_devices()
    limit = peer_copy(devices, total, rounds)
    yield {"what": f"peer copy {devices[0]} to {devices[1]} of {what}", "GB/s": round(limit, 1)}
    spec, each = load(name), -(-tokens // PAGE_SIZE)
    pages = 1 + np.arange(requests * each).reshape(requests, each)
    scattered = np.random.default_rng(0).permutation(pages.reshape(-1)).reshape(pages.shape)
    for attn in (1, 2):
        source, destination = (manifest(spec, n, 1, requests * each + 1, requests + 1) for n in (1, attn))
        plan = CopyPlan(source, destination)
        sizes = [region.num_bytes for region in source.members[0].regions]  # enough for either side
        link = Link(kind, devices, sizes)
        for order, to in (("pages in order", pages), ("pages scattered", scattered)):
            batches = [
                np.concatenate([plan.paged(0, 0, pages[i], to[i]), plan.slots(0, 0, i + 1, i + 1)])
                for i in range(requests)
            ]
            link.seconds(batches[0], 2)  # kernels and buffers
            one, moved = link.seconds(batches[0], rounds), int(batches[0][:, 4].sum())
            many = link.sustained(batches, requests * rounds)
            yield {
                "what": f"{name}, {tokens} tokens, TP 1 to rank 0 of TP {attn}, {order}",
                "runs": len(batches[0]),
                "MB": round(moved / 1e6, 1),
                **{f"{leg}, us": round(1e6 * took) for leg, took in link.legs(batches[0], 4 * rounds).items()},
                "ms": round(1e3 * one, 2),
                "GB/s": round(moved / 1e9 / one, 3),
                "of the peer copy": f"{moved / 1e9 / one / limit:.0%}",
                f"GB/s of {requests} at once": round(moved / 1e9 / many, 3),
                "of it": f"{moved / 1e9 / many / limit:.0%}",
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
    ask.add_argument("--mib", type=int, default=256, help="MiB of `speed`, and of the peer copy")
    ask.add_argument("--requests", type=int, default=8, help="requests that `device` has under way at once")
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
            report(device(name, asked.tokens, asked.requests, asked.mib << 20, asked.rounds), asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
