"""Microseconds that the planner spends on a step: `python bench/planner.py [--json]`.

A step is what the step loop pays on the host: new requests and the results of the step before (`apply`), then the next
step (`next_step`). `unchanged`: all rows decode. `10 % changing`: in every step a tenth of the rows ends, and as many
new requests arrive and enter. `scarce`: many requests at once, and pages or slots for a few of them: what is computed
twice, because rows were preempted, and how many rows run.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections import deque
from dataclasses import asdict, dataclass

import numpy as np

from tessera.core.messages import SamplingParams, Submit
from tessera.plan.config import PlannerConfig
from tessera.plan.scheduler import Planner
from tessera.plan.step import PartDone, Step, StepDone

ROWS = (16, 256, 1024, 4096)
PAGE_SIZE = 16
PROMPT = 32
WARM_UP = 8


def _planner(rows: int, max_context: int) -> Planner:
    pages = 1 + rows * (2 + max_context // PAGE_SIZE)
    config = PlannerConfig(rows, pages, PAGE_SIZE, max_context, chunk_size=1 << 20, mixed=True, max_in_flight=2)
    return Planner(config)


def _submits(first: int, count: int, max_new: int) -> list[Submit]:
    params = SamplingParams(max_new_tokens=max_new)
    tokens = list(range(PROMPT))
    return [Submit(str(first + i), tokens, params) for i in range(count)]


def _done(step: Step, ending: int, turn: int) -> StepDone:
    """Results of a step in which `ending` rows end, others each time."""
    part = step.parts[0]
    rows = part.rows[part.samples]
    finished = np.zeros(len(rows), np.bool_)
    if ending:
        finished[(turn * ending + np.arange(ending)) % len(rows)] = True
    return StepDone(step.index, (PartDone(rows, np.ones((len(rows), 1), np.int32), finished),))


def measure(rows: int, ending: int, steps: int) -> tuple[list[float], list[float]]:
    """Microseconds of each of `steps` steps at `rows` running rows of which `ending` are replaced in each step: on the
    clock, and of the processor (which leaves out what other processes took)."""
    max_context = PROMPT + 4 * steps
    planner = _planner(rows, max_context)
    planner.apply(_submits(0, rows, 3 * steps))
    step = planner.next_step()
    assert step is not None
    submitted, took, worked = rows, [], []
    gc.collect()
    gc.freeze()  # else the collector walks what other measurements left
    for turn in range(steps + WARM_UP):
        events = [_done(step, ending, turn), *_submits(submitted, ending, 3 * steps)]
        submitted += ending
        begin, began = time.perf_counter_ns(), time.process_time_ns()
        planner.apply(events)
        step = planner.next_step()
        worked.append((time.process_time_ns() - began) / 1e3)
        took.append((time.perf_counter_ns() - begin) / 1e3)
        assert step is not None
        assert len(step.parts[0].rows) == rows
    gc.unfreeze()
    planner.check()
    return took[WARM_UP:], worked[WARM_UP:]


def best(rows: int, changing: int, steps: int, repeat: int) -> dict[str, float]:
    """The quietest of `repeat` runs: that with the smallest median on the clock."""
    runs = [measure(rows, changing, steps) for _ in range(repeat)]
    took, worked = min(runs, key=lambda run: float(np.median(run[0])))
    figures = {"rows": rows, "changing": changing}
    for name, times in (("us", took), ("cpu_us", worked)):
        median, p99 = np.percentile(times, (50, 99))
        figures |= {f"median_{name}": float(median), f"p99_{name}": float(p99)}
    return figures


@dataclass(frozen=True, slots=True)
class Scarce:
    """What became of `requests` requests at once. `rows`: that decode, in the mean over steps that only decode;
    `again`: tokens that were computed anew, as a share of the prompts; `us`: of the planner, per step."""

    requests: int
    pages: int
    slots: int
    steps: int
    rows: float
    preempted: int
    again: float
    us: float


def scarce(requests: int, pages: int, slots: int, prompt: int = 1024, new: int = 256, mixed: bool = False) -> Scarce:
    """All requests at once, to their end. `slots`: 0 for a model without recurrent state."""
    config = PlannerConfig(
        requests, pages, PAGE_SIZE, prompt + new, slots, chunk_size=8192, mixed=mixed, max_in_flight=2
    )
    planner, tokens, params = Planner(config), list(range(prompt)), SamplingParams(max_new_tokens=new)
    planner.apply([Submit(str(i), tokens, params) for i in range(requests)])
    flying: deque[Step] = deque()
    steps, computed, decoding, took = 0, 0, [], 0
    while not planner.idle:
        began = time.perf_counter_ns()
        while (step := planner.next_step()) is not None:
            flying.append(step)
        took += time.perf_counter_ns() - began
        part = flying[0].parts[0]
        lengths, drawn = part.lengths, part.rows[part.samples]
        if (lengths == 1).all():
            decoding.append(len(lengths))
        computed, steps = computed + int(lengths[lengths > 1].sum()), steps + 1
        finished = (part.starts + lengths)[part.samples] + 1 >= prompt + new
        done = PartDone(drawn, np.ones((len(drawn), 1), np.int32), finished)
        began = time.perf_counter_ns()
        planner.apply([StepDone(flying.popleft().index, (done,))])
        took += time.perf_counter_ns() - began
    planner.check()
    preempted, again = planner.ranks[0].state.num_preempted, computed / (requests * prompt) - 1
    return Scarce(requests, pages, slots, steps, float(np.mean(decoding)), preempted, again, took / steps / 1e3)


# Of a model whose states leave few pages; of one with states for 64; of one whose pages nearly suffice.
SCARCE = ((512, 4500, 513), (512, 40000, 65), (512, 35601, 0))


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Microseconds that the planner spends on a step.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--repeat", type=int, default=3, help="runs of each point, of which the quietest counts")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args(argv)
    points = [(rows, changing) for rows in ROWS for changing in (0, rows // 10 + (rows < 100))]
    results = [best(rows, changing, args.steps, args.repeat) for rows, changing in points]
    short = [scarce(*point) for point in SCARCE]
    if args.json:
        print(json.dumps({"steps": args.steps, "results": results, "scarce": [asdict(found) for found in short]}))
        return
    print("| rows | changing | median us | p99 us | median CPU us | p99 CPU us |\n|---|---|---|---|---|---|")
    for r in results:
        figures = " | ".join(f"{r[name]:.0f}" for name in ("median_us", "p99_us", "median_cpu_us", "p99_cpu_us"))
        print(f"| {r['rows']:.0f} | {r['changing']:.0f} | {figures} |")
    print("\n| requests | pages | slots | steps | rows | preempted | computed again | us a step |")
    print("|---|---|---|---|---|---|---|---|")
    for s in short:
        held = f"{s.requests} | {s.pages} | {s.slots} | {s.steps} | {s.rows:.0f} | {s.preempted}"
        print(f"| {held} | {s.again:.0%} | {s.us:.0f} |")


if __name__ == "__main__":
    main()
