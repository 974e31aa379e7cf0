"""Microseconds that the planner spends on a step: `python -m tessera.bench.planner [--json]`.

A step is what the step loop pays on the host: new requests and the results of the step before (`apply`), then the next
step (`next_step`). `unchanged`: all rows decode. `10 % changing`: in every step a tenth of the rows ends, and as many
new requests arrive and enter.
"""

from __future__ import annotations

import argparse
import gc
import json
import time

import numpy as np

from tessera.core.messages import SamplingParams, Submit
from tessera.plan.config import PlannerConfig
from tessera.plan.scheduler import Planner
from tessera.plan.step import PartDone, Step, StepDone

ROWS = (16, 256, 1024, 4096)
PAGE_SIZE = 16
PROMPT = 32


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


def measure(rows: int, ending: int, steps: int) -> list[float]:
    """Microseconds of each of `steps` steps at `rows` running rows of which `ending` are replaced in each step."""
    max_context = PROMPT + 4 * steps
    planner = _planner(rows, max_context)
    planner.apply(_submits(0, rows, 3 * steps))
    step = planner.next_step()
    assert step is not None
    submitted, took = rows, []
    gc.collect()
    gc.freeze()
    for turn in range(steps + 8):
        events = [_done(step, ending, turn), *_submits(submitted, ending, 3 * steps)]
        submitted += ending
        begin = time.perf_counter_ns()
        planner.apply(events)
        step = planner.next_step()
        took.append((time.perf_counter_ns() - begin) / 1e3)
        assert step is not None
        assert len(step.parts[0].rows) == rows
    planner.check()
    return took[8:]


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Microseconds that the planner spends on a step.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args(argv)
    results = []
    for rows in ROWS:
        for changing in (0, rows // 10 + (rows < 100)):
            took = measure(rows, changing, args.steps)
            median, p99 = np.percentile(took, (50, 99))
            results.append({"rows": rows, "changing": changing, "median_us": float(median), "p99_us": float(p99)})
    if args.json:
        print(json.dumps({"steps": args.steps, "results": results}))
        return
    print(f"{'rows':>6} {'changing':>9} {'median us':>10} {'p99 us':>10}")
    for r in results:
        print(f"{r['rows']:>6} {r['changing']:>9} {r['median_us']:>10.1f} {r['p99_us']:>10.1f}")


if __name__ == "__main__":
    main()
