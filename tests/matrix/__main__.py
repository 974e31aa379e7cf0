"""`make matrix ARGS="--minutes 60"`: the matrix as far as the time goes; what passed at this commit is not run again.

Each point is a line of `runs/matrix.jsonl`. Exit code 1 when one has failed, or its requests ran out of time ("late").
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from matrix.points import ACCEPTED, REFUSED, Point, by_processes, covering, layouts
from matrix.results import AGAIN, ROOT, Results, commit, counted
from matrix.serving import Verdict, Way, judge

MANY = 4  # ranks


@dataclass(frozen=True)
class Stage:
    """Some points, in the order in which they are run. `way`: see `judge`."""

    name: str
    points: Sequence[Point]
    way: Way = "threads"


def stages() -> list[Stage]:
    """What counts most goes first."""
    return [
        Stage("refused, all", REFUSED),
        Stage("pairwise", covering(ACCEPTED, 2)),
        Stage("three-wise", covering(ACCEPTED, 3)),
        Stage("ranks as processes over gloo", by_processes(), "gloo"),
        Stage("every layout, short", layouts(), "short"),
        Stage("all", ACCEPTED),
    ]


def run(point: Point, way: Way) -> Verdict:
    """The verdict on a point; one that breaks has failed."""
    try:
        return judge(point, way)
    except TimeoutError as error:
        return Verdict("late", why=str(error))
    except Exception:
        return Verdict("failed", why=traceback.format_exc())


def work(results: Results, plan: Sequence[Stage], until: float) -> None:
    """Runs what has not passed yet, until the time is over."""
    for stage in plan:
        for point in results.left(stage.points, stage.way):
            if time.monotonic() >= until:
                return
            began = time.monotonic()
            verdict = run(point, stage.way)
            together = sorted(sorted(kinds) for kinds in verdict.together)
            told = {"worst": verdict.worst, "why": verdict.why, "together": together}
            results.add(point, stage.way, verdict.outcome, time.monotonic() - began, **told)
            if verdict.outcome != "refused" and point.tp > MANY:
                gc.collect()  # of sixteen ranks that is a gigabyte
            if verdict.outcome in AGAIN:
                sys.stdout.write(f"{verdict.outcome.upper()} {point} ({stage.way})\n  {verdict.why}\n")
                sys.stdout.flush()


def table(results: Results, plan: Sequence[Stage]) -> Iterator[str]:
    """A line for each stage."""
    yield "| stage | points | passed | refused | failed | late | left | seconds | worst logprob |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for stage in plan:
        lines = results.lines(stage.points, stage.way)
        worst = max((line["worst"] for line in lines), default=0.0)
        cells = [stage.name, *counted(lines, len(stage.points)), f"{worst:.1e}"]
        yield f"| {' | '.join(map(str, cells))} |"


def main() -> int:
    """Runs, and prints what is known at this commit."""
    parser = argparse.ArgumentParser(prog="make matrix", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="no point begins later")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "matrix.jsonl")
    parser.add_argument("--only", metavar="TEXT", default="", help="stages in whose name this is")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the ranks are threads already
    results, plan = Results(options.results, commit()), [s for s in stages() if options.only in s.name]
    work(results, plan, time.monotonic() + 60 * options.minutes)
    wrong = [line for stage in plan for line in results.wrong(stage.points, stage.way)]
    sys.stdout.write("\n".join([f"At commit {results.commit}:", *table(results, plan), *wrong]) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
