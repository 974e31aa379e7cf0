"""Times our kernels on a CUDA device against its limits: `bench/kernels.py GROUP [--sweep] [--json]`.

A case says how many bytes must move and how many operations must be done; the device's own copy and matrix product,
measured first, say how long that takes at best. Each case is checked against its plain twin, and marked with ! where it
is further from it than it should be; then captured in a CUDA graph over several sets of inputs, together larger than
the cache, as the layers of a model are; the time is the median of its replays, per call. `--sweep` tries the other
options that a case names, `--tried` those that match a pattern, for instance those of a library; `--only` is a pattern
of names.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton

from kernel_case import Case
from tessera.core.errors import ConfigError

GROUPS = {name: f"kernels_{name}" for name in ("attention", "delta", "fp8", "linear", "moe", "norm")}
TOLERANCE = 1e-2
REFUSED = (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError, ConfigError)


@dataclass(frozen=True)
class Limits:
    """Bytes and bf16 operations per second that the device reaches; `memory`: the better of a copy and a sum."""

    memory: float
    matmul: float

    def share(self, case: Case, seconds: float) -> float:
        """Of the least time that the case could take."""
        return max(case.num_bytes / self.memory, case.operations / self.matmul) / seconds


def seconds(launch: Callable[[], Any], repeats: int = 15) -> float:
    """Median time of what `launch` puts on the device, by replays of a graph."""
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


def measure_limits() -> Limits:
    """A copy and a sum of 2 GB, and a product of 8192 x 8192 random numbers."""
    x, y = (torch.randn(1 << 29, device="cuda") for _ in range(2))
    memory = max(2 * x.nbytes / seconds(lambda: torch.add(x, 1, out=y)), x.nbytes / seconds(x.sum))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return Limits(memory, 2 * 8192**3 / seconds(lambda: a @ b))


def rows(cases: Iterator[Case], limits: Limits, tried: str) -> Iterator[dict[str, Any]]:
    """One row for what the tables choose, and one for each variant that matches `tried`, the fastest first."""
    for case in cases:
        sets = [case.make() for _ in range(case.num_sets)]
        found = []
        for options in options_of(case, tried):
            try:
                error = case.check(sets[0], case.run(sets[0], **options))
                took = seconds(partial(_all, case, sets, options)) / len(sets)
            except REFUSED as reason:
                sys.stderr.write(f"{case.name} {options}: {str(reason)[:160]}\n")
                continue
            found.append(_row(case, options, error, took, limits))
        yield from found[:1]
        yield from sorted(found[1:], key=lambda row: row["us"])


def options_of(case: Case, tried: str) -> list[dict[str, Any]]:
    """None, for what the tables choose, and those of the variants that match the pattern."""
    return [{}, *(options for options in case.variants if re.search(tried, named(options)))]


def named(options: dict[str, Any]) -> str:
    """A variant as one word a number."""
    return " ".join(f"{name}={value}" for name, value in options.items())


def _all(case: Case, sets: list[Any], options: dict[str, Any]) -> None:
    for inputs in sets:
        case.run(inputs, **options)


def _row(case: Case, options: dict[str, Any], error: float, took: float, limits: Limits) -> dict[str, Any]:
    return {
        "case": case.name,
        "options": named(options) or "table",
        "us": round(took * 1e6, 2),
        "GB/s": round(case.num_bytes / took / 1e9),
        "TFLOP/s": round(case.operations / took / 1e12, 1),
        "share": round(limits.share(case, took), 3),
        "error": float(f"{error:.2g}"),
        "wrong": not error <= TOLERANCE,
    }


def line(row: dict[str, Any]) -> str:
    """A row of the table, with its error last."""
    *values, wrong = row.values()
    return " | ".join(str(value) for value in values) + ("!" if wrong else "")


def cases_of(group: str, only: str) -> Iterator[Case]:
    """The cases of a group whose names match `only`, made one at a time: each may hold gigabytes."""
    for name, make in importlib.import_module(GROUPS[group]).cases().items():
        if re.search(only, name):
            yield make(name)


def compile_part(group: str, only: str, tried: str, part: int, parts: int) -> None:
    """Runs every `parts`-th variant once: its kernels are then in the cache on disk."""
    at = 0
    for case in cases_of(group, only):
        inputs = None
        for options in options_of(case, tried):
            at += 1
            if at % parts == part:
                inputs = inputs or case.make()
                with contextlib.suppress(*REFUSED):  # told when it is its turn
                    case.run(inputs, **options)


def compile_all(group: str, only: str, tried: str, jobs: int) -> None:
    """Compiles the variants in processes side by side."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=compile_part, args=(group, only, tried, part, jobs)) for part in range(jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def main() -> None:
    """Prints a table, or with --json one object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--sweep", action="store_const", const="", dest="tried", help="--tried everything")
    parser.add_argument("--tried", default="$^")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile before anything is timed")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    if asked.jobs:
        compile_all(asked.group, asked.only, asked.tried, asked.jobs)
    limits = measure_limits()
    head = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "memory GB/s": round(limits.memory / 1e9),
        "matmul TFLOP/s": round(limits.matmul / 1e12),
    }
    found = []
    if not asked.json:
        sys.stdout.write(" ".join(f"{name} {value}" for name, value in head.items()) + "\n")
    for row in rows(cases_of(asked.group, asked.only), limits, asked.tried):
        found.append(row)
        if not asked.json:
            sys.stdout.write(line(row) + "\n")
            sys.stdout.flush()
    if asked.json:
        sys.stdout.write(json.dumps(head | {"rows": found}) + "\n")
    if wrong := sum(row["wrong"] for row in found):
        sys.exit(f"{wrong} of {len(found)} results (marked with !) are further than {TOLERANCE} from their plain twins")


if __name__ == "__main__":
    main()
