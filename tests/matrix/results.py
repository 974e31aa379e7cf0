"""What is known of points of a matrix: a file of JSON lines, one for each point that was run, by commit."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
Line = dict[str, Any]
OUTCOMES = ("passed", "refused", "failed", "late")
AGAIN = ("failed", "late")  # late: requests ran out of time, which says nothing of what they would have answered


class Results:
    """The lines of one commit. A point is anything with a text; `way`: how it is run."""

    def __init__(self, path: Path, commit: str) -> None:
        self.path, self.commit = path, commit
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
        self._found: dict[tuple[str, str], Line] = {
            (line["point"], line["way"]): line for line in lines if line["commit"] == commit
        }

    def of(self, point: object, way: str) -> Line | None:
        """What is known of a point."""
        return self._found.get((str(point), way))

    def left(self, points: Sequence[Any], way: str) -> Iterator[Any]:
        """Points of which nothing is known, or that have failed or come late, each when it is asked for."""
        for point in points:
            known = self.of(point, way)
            if known is None or bad(known):
                yield point

    def add(self, point: object, way: str, outcome: str, seconds: float, **more: Any) -> None:
        """A point was run."""
        line = {"commit": self.commit, "point": str(point), "way": way, "outcome": outcome, **more}
        line |= {"seconds": round(seconds, 2), "at": time.strftime("%Y-%m-%d %H:%M:%S")}
        self._found[str(point), way] = line
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self, points: Sequence[object], way: str) -> list[Line]:
        """What is known of these points."""
        return [line for point in points if (line := self.of(point, way)) is not None]

    def wrong(self, points: Sequence[object], way: str) -> list[str]:
        """Those of them that have failed or come late, as lines for people."""
        return [f"{line['outcome'].upper()} {line['point']} ({way})" for line in self.lines(points, way) if bad(line)]


def bad(line: Line) -> bool:
    """Whether a point is to be run again."""
    return line["outcome"] in AGAIN


def counted(lines: Sequence[Line], num_points: int) -> list[object]:
    """Cells of a table: points, how many of each outcome, how many are left, seconds."""
    outcomes = [sum(line["outcome"] == name for line in lines) for name in OUTCOMES]
    return [num_points, *outcomes, num_points - len(lines), round(sum(line["seconds"] for line in lines))]


def commit() -> str:
    """The commit, with a + where the tree differs from it."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
