"""Figures are what was measured: arrivals, limits, times of tokens, and failures that do not hide."""

from __future__ import annotations

import asyncio
import random
from statistics import fmean

import numpy as np
import pytest

from evals.scripted import Scripted
from tessera.bench.figures import details, figures
from tessera.bench.serving import Drive, Timing, drive
from tessera.bench.workload import arrivals
from tessera.client import Ask
from tessera.core.errors import PeerError

ASKS = [Ask(tokens=[i] * 3, max_tokens=4) for i in range(20)]


def words(ask: Ask) -> list[str | Exception]:
    return ["a", "b", "c", "d"]


def test_every_request_is_measured_in_its_place() -> None:
    run = asyncio.run(drive(Scripted(words, pause=0.002), ASKS, [0.0] * 20))
    for timing in run.timings:
        assert (timing.num_prompt, timing.num_tokens, timing.text, timing.error) == (7, 4, "abcd", None)
        assert timing.first >= 0.002
        assert len(timing.gaps) == 3
        assert timing.first + sum(timing.gaps) <= timing.whole <= run.seconds


@pytest.mark.parametrize("concurrency", [1, 3, None])
def test_no_more_requests_at_a_time_than_asked(concurrency: int | None) -> None:
    client = Scripted(words, pause=0.001)
    seen: list[tuple[int, int]] = []
    asyncio.run(drive(client, ASKS, [0.0] * 20, concurrency, lambda *n: seen.append(n)))
    assert client.most == (concurrency or 20)
    assert seen == [(i, 20) for i in range(1, 21)]


def test_requests_are_sent_at_their_times_and_not_before() -> None:
    times = [0.0, 0.01, 0.05, 0.05, 0.08]
    run = asyncio.run(drive(Scripted(words), ASKS[:5], times))
    first = run.timings[0].sent
    for timing, at in zip(run.timings, times, strict=True):
        assert timing.sent - first >= at - 0.003
    assert run.seconds >= 0.08


def test_arrivals_are_a_poisson_process_or_all_at_once() -> None:
    assert arrivals(5, None, random.Random(0)) == [0.0] * 5
    times = arrivals(4000, 50.0, random.Random(0))
    gaps = np.diff(times)
    assert times[0] == 0.0
    assert fmean(gaps) == pytest.approx(0.02, rel=0.05)
    assert np.std(gaps) == pytest.approx(0.02, rel=0.1)  # of an exponential: its mean
    assert times == arrivals(4000, 50.0, random.Random(0))


def test_a_failure_is_noted_and_the_others_go_on() -> None:
    def say(ask: Ask) -> list[str | Exception]:
        assert ask.tokens is not None
        return ["a", PeerError("gone")] if ask.tokens[0] == 4 else words(ask)

    run = asyncio.run(drive(Scripted(say), ASKS, [0.0] * 20))
    found = figures(run)
    assert (found["completed"], found["failed"]) == (19, 1)
    assert found["total_output_tokens"] == 19 * 4
    assert run.timings[4].error == "gone"
    assert details(run.timings)["errors"][4] == "gone"


def test_tokens_that_come_together_share_the_time() -> None:
    class Bursts(Scripted):
        async def stream(self, ask: Ask):  # type: ignore[no-untyped-def]
            async for piece in super().stream(ask):
                piece.num_tokens *= 4
                yield piece

    (timing,) = asyncio.run(drive(Bursts(words, pause=0.004), ASKS[:1], [0.0])).timings
    assert timing.num_tokens == 16
    assert len(timing.gaps) == 12
    assert timing.gaps[0] == timing.gaps[3] >= 0.001


def test_figures_are_those_of_the_definitions() -> None:
    timings = [
        Timing(0.0, first=0.1, gaps=[0.02, 0.04], whole=0.2, num_prompt=10, num_tokens=3),
        Timing(0.0, first=0.3, gaps=[], whole=0.3, num_prompt=20, num_tokens=1),
        Timing(0.0, whole=9.0, num_prompt=99, error="no"),
    ]
    found = figures(Drive(timings, 2.0))
    assert found["total_input_tokens"] == 30
    assert found["output_throughput"] == 2.0
    assert found["total_throughput"] == 17.0
    assert found["request_throughput"] == 1.0
    assert found["concurrency"] == pytest.approx(0.25)
    assert found["mean_ttft_ms"] == pytest.approx(200)
    assert found["median_itl_ms"] == pytest.approx(30)
    assert found["p99_itl_ms"] == pytest.approx(39.8)
    assert found["mean_tpot_ms"] == pytest.approx(50)  # (200 - 100) / 2, of the first request alone
    assert found["max_e2e_latency_ms"] == pytest.approx(300)


def test_what_was_not_measured_is_none() -> None:
    found = figures(Drive([Timing(error="no")], 1.0))
    assert found["mean_ttft_ms"] is found["p99_itl_ms"] is None
    assert found["output_throughput"] == 0
