"""Tessera on one GPU at the shapes and workloads of well-known measurements: `python bench/gpu.py [--json]`.

Dummy weights, random prompts, greedy, the engine without text. Each workload runs once to warm up (kernels are
compiled, then graphs recorded) and then `--rounds` times; the best counts. Beside tokens/s stands the share of what the
card could do at most: for one token after the other the bytes that a step must read (weights once, of the experts only
those that were touched, keys, values and states) over the measured copy bandwidth; for prompts the operations over the
measured rate of a matrix product. Launches and gaps come from the profiler, over a short run of the same kind.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from commit import commit
from limits import Card, measure_card, work_of
from ours import Ours
from tessera.core.messages import StepReport
from touched import experts_touched
from traced import traced

SHAPES = Path(__file__).resolve().parent / "shapes"
PROFILED = 12  # tokens of a profiled run
WATCHED = 16  # tokens of a watched prompt: those of all requests fit in a step or two, so that all are decoded together


@dataclass(frozen=True, slots=True)
class Workload:
    """So many requests at once, prompts and answers of so many tokens."""

    name: str
    requests: int
    prompt: int
    new: int


WORKLOADS = {
    w.name: w
    for w in (
        Workload("1", 1, 512, 256),
        Workload("64", 64, 1024, 256),
        Workload("512", 512, 1024, 256),
        Workload("prefill", 64, 4096, 1),
    )
}

# Output tokens/s (prefill: all tokens/s) of vLLM 0.25.0 on one NVIDIA H200, 2026-11-21.
VLLM = {
    "qwen3-8b": {"1": 188.7, "64": 4496.0, "512": 5964.0, "prefill": 40339.0},
    "dsv2lite": {"1": 291.0, "64": 7468.0, "512": 13532.0, "prefill": 87742.0},
    "qwen3next16": {"1": 462.0, "64": 4880.0, "512": 11994.0, "prefill": 136599.0},
}


@dataclass(frozen=True, slots=True)
class Row:
    """One workload. `tokens_per_s`: output, for "prefill" all. `step_ms`: median of decode steps. `experts`: touched a
    layer and step, in the steps with the most tokens, `rows`. `limit`: the least time that the card needs over the time
    taken, of the decode steps or the prompts. `top`: kernels by microseconds a step.
    """

    shape: str
    workload: str
    tokens_per_s: float
    times_vllm: float | None
    step_ms: float
    experts: float
    rows: int
    limit: float
    launches: float
    busy: float
    gap_ms: float
    top: dict[str, float]


def prompts(workload: Workload, vocab_size: int, seed: int) -> list[list[int]]:
    """Random token ids."""
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab_size) for _ in range(workload.prompt)] for _ in range(workload.requests)]


def without_prompts(step: StepReport) -> bool:
    """Every range of the step is one token of an answer."""
    return step.num_new_token == 0 < step.num_output_token


def run(ours: Ours, shape: str, workload: Workload, card: Card, rounds: int) -> Row:
    """Warms up, measures, profiles."""
    spec, vocab = ours.core.spec, ours.core.spec.vocab_size
    best, steps = 0.0, []
    for turn in range(rounds + 1):
        measured = ours(prompts(workload, vocab, turn), workload.new)
        seconds = max(t[-1] for t in measured.times)
        count = workload.requests * (workload.new if workload.new > 1 else workload.prompt)
        if turn and count / seconds > best:
            best, steps = count / seconds, ours.steps
    short = Workload(workload.name, workload.requests, min(workload.prompt, 256), PROFILED)
    decoding = workload.new > 1
    watched = Workload(workload.name, workload.requests, WATCHED, 4) if decoding else workload
    with experts_touched(ours, decoding) as touched:
        ours(prompts(watched, vocab, 77), watched.new)
    experts = touched.experts
    decodes = sorted(s.seconds for s in steps if without_prompts(s)) or [0.0]
    step_s = decodes[len(decodes) // 2]
    work = work_of(spec, ours.core.resolved.config, experts)
    if not decoding:
        limit = card.seconds_of_prompts(work, workload.requests, workload.prompt) * best / count
        profile = traced(lambda: ours(prompts(workload, vocab, 99), 1), ours, bool)
    else:
        ours(prompts(short, vocab, 98), PROFILED)  # its steps have sizes of their own
        context = workload.prompt + workload.new // 2
        limit = card.seconds_of_decode(work, workload.requests, context) / step_s if step_s else 0.0
        profile = traced(lambda: ours(prompts(short, vocab, 99), PROFILED), ours, without_prompts)
    peer = VLLM.get(shape, {}).get(workload.name)
    return Row(
        shape,
        workload.name,
        best,
        best / peer if peer else None,
        step_s * 1e3,
        experts,
        touched.rows,
        limit,
        profile.launches,
        profile.busy,
        profile.gap_ms,
        profile.top,
    )


@contextmanager
def started(folder: Path, flags: dict[str, Any]) -> Iterator[tuple[Ours, float]]:
    """The engine, and the seconds that it took until its first token."""
    began = time.perf_counter()
    asked = {"model_path": str(folder), "load_format": "dummy", "skip_tokenizer_init": True, "device": "cuda"}
    with Ours({**asked, "disable_radix_cache": True, "log_level": "warning", **flags}) as ours:
        with ours.core.stages.timed("first token"):
            ours([[1]], 1, settled=False)
        yield ours, time.perf_counter() - began


def main() -> None:
    """Prints a table, or with --json a line for each workload."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=sorted(VLLM), help="Names under bench/shapes, or folders.")
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--flags", type=json.loads, default={}, help="Further flags of the engine, as JSON.")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    card, about = measure_card(), versions()
    told = sys.stderr if args.json else sys.stdout
    limits = f"copy {card.bytes_per_s / 1e12:.2f} TB/s, bf16 product {card.flops_per_s / 1e12:.0f} TFLOP/s"
    print(f"{card.name}: {limits}, {', '.join(f'{name} {value}' for name, value in about.items())}", file=told)
    for shape in args.shapes:
        folder = Path(shape) if Path(shape).is_dir() else SHAPES / shape
        flags = {"max_running_requests": 512, "context_length": 8192, **args.flags}
        with started(folder, flags) as (ours, seconds):
            size = torch.cuda.memory_allocated() / 1e9
            print(
                f"{shape}: ready after {seconds:.1f} s, {size:.1f} GB: {ours.core.stages.line()}", file=told, flush=True
            )
            for name in args.workloads:
                row = run(ours, shape, WORKLOADS[name], card, args.rounds)
                print(json.dumps({"device": card.name, **about, **asdict(row)}) if args.json else line(row), flush=True)
        del ours
        torch.cuda.empty_cache()


def versions() -> dict[str, str]:
    """What a figure depends on beside the device."""
    return {"torch": torch.__version__, "triton": version("triton"), "commit": commit()}


def line(row: Row) -> str:
    """A row of the table."""
    times = f"{row.times_vllm:.2f}x vLLM" if row.times_vllm else ""
    return (
        f"{row.shape:12} {row.workload:8} {row.tokens_per_s:10.1f} tokens/s {times:12} step {row.step_ms:7.2f} ms, "
        f"{row.limit:4.0%} of the limit, {row.experts:5.1f} experts by {row.rows} rows, {row.launches:6.0f} launches, "
        f"busy {row.busy:4.0%}, gaps {row.gap_ms:6.2f} ms a step"
    )


if __name__ == "__main__":
    main()
