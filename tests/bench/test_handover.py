"""The benchmark of the hand-over says what it promises: copies by pair of layouts, speed by engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parent.parent.parent / "bench" / "handover.py"
WAIT = SCRIPT.with_name("handover_wait.py")


def lines(*arguments: str, script: Path = SCRIPT) -> list[dict[str, Any]]:
    """What it writes as JSON."""
    command = [sys.executable, str(script), *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_equal_layouts_need_a_run_for_each_page_layer_and_rank() -> None:
    found = lines("plans", "--models", "abacus-hybrid", "--tokens", "640")
    pages, layers = 10, 2
    for ranks, line in zip((1, 2), found, strict=False):
        assert line["pairs of ranks"] == ranks
        assert line["runs, pages in order"] == layers * ranks
        assert line["runs, pages scattered"] <= pages * layers * ranks
    assert len(found) == 6


def test_it_measures_the_engine_of_one_host_against_a_copy() -> None:
    (local,) = lines("speed", "--engines", "local", "--mib", "16", "--rounds", "1")
    assert local["engine"] == "local"
    for length in ("16 KiB", "256 KiB", "16 MiB"):
        ours, plain = local[length].split(" / ")
        assert min(float(ours), float(plain)) > 0


def test_it_says_where_the_time_of_a_hand_over_goes() -> None:
    """Between devices where there are any: here in memory of the host. That the legs are those of their round is
    asserted where they are measured. Nothing is compared with the best of other rounds: on a busy machine any round of
    a few, and any leg of a round, may wait for a core ten times as long as it takes."""
    arguments = ("--models", "abacus-hybrid", "--tokens", "128", "--requests", "3", "--mib", "1", "--rounds", "2")
    limit, *found = lines("device", *arguments)
    assert limit["GB/s"] > 0
    assert [line["runs"] for line in found] == sorted(line["runs"] for line in found)
    for line in found:
        legs = sum(line[f"{leg}, us"] for leg in ("posted", "heard", "launched", "copied", "acknowledged"))
        assert min(line["ms"], legs) > 0, line
        assert line["GB/s of 3 at once"] > 0


def test_it_measures_from_the_last_copy_to_the_first_token() -> None:
    found = lines("--rounds", "2", "--tokens", "40", "--chunk", "64", script=WAIT)
    assert [line["prefill"] for line in found] == ["quiet", "busy"] * 2
    assert all(0 < line["told, median"] <= line["first token, median"] for line in found), found
