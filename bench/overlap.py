"""What two-batch overlap gains on two GPUs, by the size of a step: `python bench/overlap.py --shape dsv2lite`.

DP attention and experts on two ranks, all-to-all, prompts of 4,096 tokens (fewer where a step holds less); steps that
have a size run as CUDA graphs. Each size runs whole and as two halves, turn about; the median of `--rounds`. With
`--trace FILE` the last size is traced on rank 0 once more in both forms (FILE.whole.gz, FILE.halves.gz), and the time
is told in which a collective ran beside other kernels, and in which nothing did. `bench/timeline.py` draws a trace.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as multiprocessing
from torch.profiler import ProfilerActivity, profile

from tessera.comm.connect import Place, connect
from tessera.core.messages import SamplingParams
from tessera.core.weights import weight_table
from tessera.models.folder import open_source
from tessera.plan.halves import cut
from tessera.plan.step import Change, Enter, Part, Step, ints
from tessera.run.build import build_runner
from tessera.run.graphs import padded
from tessera.run.runner import Runner
from tessera.run.startup import prepare

SHAPES = Path(__file__).resolve().parent / "shapes"
PROMPT = 4096
FLAGS = {
    "load_format": "dummy", "skip_tokenizer_init": True, "device": "cuda", "tp_size": 2, "dp_size": 2, "ep_size": 2,
    "enable_dp_attention": True, "enable_two_batch_overlap": True, "disable_radix_cache": True,
    "context_length": 8192, "max_running_requests": 64, "chunked_prefill_size": 16384,
    "max_total_tokens": 40000, "page_size": 16,
}  # fmt: skip
PARAMS = SamplingParams(max_new_tokens=8, temperature=0.0, ignore_eos=True)


class Steps:
    """Steps of prompts, one after the other, the same rows and pages each time."""

    def __init__(self, page_size: int, recurrent: bool, vocab_size: int) -> None:
        self._page, self._recurrent, self._vocab = page_size, recurrent, vocab_size
        self._index, self._taken = 0, ints()

    def __call__(self, num_tokens: int, halves: bool) -> Step:
        """Every DP rank computes `num_tokens` of new prompts."""
        length = min(num_tokens, PROMPT)
        count = num_tokens // length
        rows = np.arange(count, dtype=np.int32)
        rng = np.random.default_rng(self._index)
        each = -(-(length + 1) // self._page)
        enters = tuple(
            Enter(
                row, f"{self._index}-{row}", 0, rng.integers(3, self._vocab, length).astype(np.int32), length, 0,
                np.arange(1 + row * each, 1 + (row + 1) * each, dtype=np.int32), row + 1 if self._recurrent else -1,
                PARAMS, 0,
            )
            for row in range(count)
        )  # fmt: skip
        zero = ints([e.slot for e in enters]) if self._recurrent else ints()
        change = Change(leave=self._taken, enter=enters, zero_slots=zero)
        ones = np.ones(count, np.int32)
        part = Part(rows, 0 * rows, length * ones, ones, np.ones(count, np.bool_), change)
        step = Step(self._index, (part, part))
        self._index, self._taken = self._index + 1, rows
        return replace(step, cuts=(cut(part, 0.48, 64).num_tokens,) * 2) if halves else step


def timed(runner: Runner, step: Step) -> float:
    """Milliseconds until a step is collected."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    runner.collect(runner.launch(step))
    torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e3


def rank_main(
    rank: int, port: int, shape: str, sizes: Sequence[int], rounds: int, trace: str | None, more: dict[str, Any]
) -> None:
    """One rank: measures; rank 0 tells."""
    device = torch.device("cuda", rank)
    torch.set_num_threads(1)
    flags: dict[str, Any] = {**FLAGS, "model_path": str(SHAPES / shape), **more}
    prepared = prepare(flags, {})
    config, spec = prepared.resolved.config, prepared.spec
    address = f"127.0.0.1:{port}"
    comm = connect(Place(config.mesh.mesh, rank, device, address, "nccl", 120.0, 120.0, peers=config.mesh.peers))
    source = open_source(prepared.folder, spec, weight_table(spec, config.mesh.mesh), "dummy", 0)
    runner = build_runner(config, spec, source, None, None, rank, comm, device)
    steps = Steps(config.memory.page_size, spec.recurrent, spec.vocab_size)
    for size in sizes:
        for halves in (False, True):
            step = steps(size, halves)
            timed(runner, step)  # as it is
            if (recorded := padded(step, config.kernels.graphs)) is not None:
                runner.record(recorded)
        times: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(rounds + 2):
            for halves in (False, True):
                taken = timed(runner, steps(size, halves))
                if turn > 1:
                    times[halves].append(taken)
        whole, split = (statistics.median(times[halves]) for halves in (False, True))
        if rank == 0:
            say(shape=shape, **more, tokens=size, whole_ms=whole, halves_ms=split, gain=whole / split)
    for halves in (False, True) if trace is not None else ():
        step = steps(sizes[-1], halves)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
            timed(runner, step)
        if rank == 0:
            say(shape=shape, **more, tokens=sizes[-1], halves=halves, **beside(profiler))
            name = f"{trace}.{'halves' if halves else 'whole'}"
            profiler.export_chrome_trace(name)
            with Path(name).open("rb") as plain, gzip.open(f"{name}.gz", "wb") as packed:
                shutil.copyfileobj(plain, packed)
            Path(name).unlink()
    comm.close()


def beside(profiler: Any) -> dict[str, Any]:
    """Milliseconds of collectives, of other kernels, of collectives while other kernels ran, of neither; and of the
    kernels that took most."""
    wire, other, spent = [], [], Counter[str]()
    for e in profiler.events():
        if e.device_type == torch.autograd.DeviceType.CUDA:
            span = (e.time_range.start, e.time_range.end)
            (wire if "nccl" in e.name.lower() or e.name in ("send", "receive") else other).append(span)
            spent[e.name[:48]] += (span[1] - span[0]) / 1e3
    every, wire, other = merged(wire + other), merged(wire), merged(other)
    both = sum(max(0.0, min(b, d) - max(a, c)) for a, b in wire for c, d in other)
    return {
        "wire_ms": total(wire), "other_ms": total(other), "beside_ms": both / 1e3,
        "idle_ms": (every[-1][1] - every[0][0]) / 1e3 - total(every),
        "top": {name: round(ms, 2) for name, ms in spent.most_common(16)},
    }  # fmt: skip


def total(spans: list[tuple[float, float]]) -> float:
    """Microseconds of spans, as milliseconds."""
    return sum(b - a for a, b in spans) / 1e3


def merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans without overlaps."""
    out: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    assert all(a[1] <= b[0] for a, b in pairwise(out))
    return out


def say(**fields: object) -> None:
    """A line of JSON."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="dsv2lite")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--a2a", choices=["none", "all_to_all"], default="all_to_all")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--nccl", action="store_true", help="no collectives through the memory of the peers")
    parser.add_argument("--trace")
    args = parser.parse_args()
    if torch.cuda.device_count() < 2:
        parser.error(f"needs 2 CUDA devices, found {torch.cuda.device_count()}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    more = {
        "moe_a2a_backend": args.a2a, "disable_cuda_graph": args.no_graphs, "disable_custom_all_reduce": args.nccl,
    }  # fmt: skip
    rest = (port, args.shape, args.sizes, args.rounds, args.trace, more)
    multiprocessing.spawn(rank_main, rest, nprocs=2)


if __name__ == "__main__":
    main()
