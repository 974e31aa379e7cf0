"""`make matrix ARGS="--minutes 60"`: the matrix as far as the time goes; what passed at this commit is not run again.

Each point is a line of `runs/matrix.jsonl`. Exit code 1 when one has failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from matrix.points import ACCEPTED, REFUSED, Point, by_processes, covering, layouts
from matrix.serving import Verdict, Way, judge

ROOT = Path(__file__).parents[2]
Key = tuple[str, str, str]
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


class Results:
    """The file of results, one line for each point that was run."""

    def __init__(self, path: Path, commit: str) -> None:
        self.path, self.commit = path, commit
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self._found: dict[Key, dict[str, Any]] = {}
        for line in map(json.loads, lines):
            self._found[line["commit"], line["point"], line["way"]] = line

    def of(self, point: Point, way: Way) -> dict[str, Any] | None:
        """What is known of a point at this commit."""
        return self._found.get((self.commit, str(point), way))

    def add(self, point: Point, way: Way, verdict: Verdict, seconds: float) -> None:
        """A point was run."""
        line = {
            "commit": self.commit,
            "point": str(point),
            "way": way,
            "outcome": verdict.outcome,
            "worst": verdict.worst,
            "why": verdict.why,
            "together": sorted(sorted(kinds) for kinds in verdict.together),
            "seconds": round(seconds, 2),
            "at": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self._found[self.commit, str(point), way] = line
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def run(point: Point, way: Way) -> Verdict:
    """The verdict on a point; one that breaks has failed."""
    try:
        return judge(point, way)
    except Exception:
        return Verdict("failed", why=traceback.format_exc())


def work(results: Results, plan: Sequence[Stage], until: float) -> None:
    """Runs what has not passed yet, until the time is over."""
    for stage in plan:
        for point in stage.points:
            known = results.of(point, stage.way)
            if known is not None and known["outcome"] != "failed":
                continue
            if time.monotonic() >= until:
                return
            began = time.monotonic()
            verdict = run(point, stage.way)
            results.add(point, stage.way, verdict, time.monotonic() - began)
            if verdict.outcome != "refused" and point.tp > MANY:
                gc.collect()  # of sixteen ranks that is a gigabyte
            if verdict.outcome == "failed":
                sys.stdout.write(f"FAILED {point} ({stage.way})\n  {verdict.why}\n")
                sys.stdout.flush()


def table(results: Results, plan: Sequence[Stage]) -> Iterator[str]:
    """A line for each stage."""
    yield "| stage | points | passed | refused | failed | left | seconds | worst logprob |"
    yield "|---|---|---|---|---|---|---|---|"
    for stage in plan:
        lines = [line for point in stage.points if (line := results.of(point, stage.way)) is not None]
        counts = [sum(line["outcome"] == name for line in lines) for name in ("passed", "refused", "failed")]
        seconds, worst = sum(line["seconds"] for line in lines), max((line["worst"] for line in lines), default=0.0)
        cells = [stage.name, len(stage.points), *counts, len(stage.points) - len(lines), round(seconds), f"{worst:.1e}"]
        yield f"| {' | '.join(map(str, cells))} |"


def commit() -> str:
    """The commit, with a + where the tree differs from it."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


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
    failed = [(p, stage.way) for stage in plan for p in stage.points if _failed(results.of(p, stage.way))]
    report = [f"At commit {results.commit}:", *table(results, plan), *(f"FAILED {p} ({s})" for p, s in failed)]
    sys.stdout.write("\n".join(report) + "\n")
    return 1 if failed else 0


def _failed(line: dict[str, Any] | None) -> bool:
    return line is not None and line["outcome"] == "failed"


if __name__ == "__main__":
    sys.exit(main())
