"""Several engines behind one front: requests are spread, a dead one is named, and what follows is what was asked."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import time
import traceback
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import calls
from serve.fake_engine import HANG
from serve.processes import fake_server, gone, health, model_folder
from serve.support import in_loop
from serve.test_processes import Asking
from tessera.core.errors import DeadlineError, PeerError
from tessera.core.messages import Abort, Inbound, Output, Outputs, SamplingParams, Submit
from tessera.serve.client import EngineClient, Stream
from tessera.serve.replica import Replica
from tessera.serve.schema import Item
from waits import NOTICED_S, PATIENCE_S, wait_until

SLOW = {"DELAY": "0.02"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return model_folder(tmp_path)


# -- the client --------------------------------------------------------------------------------------------------------


class Several:
    """A client of three engines that only listen."""

    def __init__(self, balance: str) -> None:
        self.sent: list[list[Inbound]] = [[], [], []]
        self.client = EngineClient([sent.append for sent in self.sent], balance=balance)
        for replica in self.client.replicas:
            replica.warm.set()

    def ask(self, size: int = 1, **place: Any) -> Stream:
        return self.client.submit([Item([1], SamplingParams(max_new_tokens=size), **place)])

    def took(self) -> list[int]:
        """How many requests each engine got."""
        return [sum(isinstance(m, Submit) for m in sent) for sent in self.sent]

    def where(self, stream: Stream) -> int:
        return next(i for i, sent in enumerate(self.sent) for m in sent if getattr(m, "request_id", "") in stream.ids)

    def finish(self, stream: Stream) -> None:
        for request_id in stream.ids:
            self.client.deliver(Outputs([Output(request_id, 0, [5], finish="stop")]), self.where(stream))


SPREAD = {
    "round_robin": ([50, 1, 1, 1], [0, 1, 2, 0]),
    "total_requests": ([50, 1, 1, 1], [0, 1, 2, 1]),  # the second has ended when the fourth comes
    "total_tokens": ([50, 20, 12, 12], [0, 1, 2, 1]),
}


@pytest.mark.parametrize("balance", SPREAD)
@in_loop
async def test_requests_are_spread_as_asked(balance: str) -> None:
    several, (sizes, homes) = Several(balance), SPREAD[balance]
    streams = [several.ask(size) for size in sizes[:3]]
    several.finish(streams[1])
    streams[1].close()
    streams.append(several.ask(sizes[3]))
    assert [several.where(stream) for stream in streams] == homes
    for stream in streams:
        stream.close()
    assert len(several.client) == 0
    for replica in several.client.replicas:
        assert (replica.load.num_requests, replica.load.num_tokens) == (0, 0)


@in_loop
async def test_a_request_names_its_replica_or_follows_its_room_and_the_engine_hears_no_rank() -> None:
    several = Several("follow_bootstrap_room")
    streams = [several.ask(bootstrap_room=8), several.ask(bootstrap_room=3), several.ask(dp_rank=1, bootstrap_room=3)]
    assert [several.where(stream) for stream in streams] == [2, 0, 1]
    submits = [m for sent in several.sent for m in sent if isinstance(m, Submit)]
    assert {(m.dp_rank, m.bootstrap_room) for m in submits} == {(None, 8), (None, 3)}
    for i, stream in enumerate(streams):
        stream.close()
        home = several.sent[[2, 0, 1][i]]
        assert isinstance(home[-1], Abort), "only its engine is told"


@in_loop
async def test_prompts_of_one_request_are_spread_and_answered_together() -> None:
    several = Several("round_robin")
    stream = several.client.submit([Item([i], SamplingParams()) for i in range(6)])
    assert several.took() == [2, 2, 2]
    for i, sent in enumerate(several.sent):
        submits = [m for m in sent if isinstance(m, Submit)]
        several.client.deliver(Outputs([Output(m.request_id, 0, [7], finish="stop") for m in submits]), i)
    assert len(await stream.read()) == 6
    assert not stream.open


@in_loop
async def test_of_a_dead_replica_all_get_an_error_that_names_it_and_the_others_take_over() -> None:
    several = Several("round_robin")
    streams = [several.ask() for _ in range(3)]
    several.client.replicas[1].fail(PeerError("it was ended by SIGKILL"))
    with pytest.raises(PeerError, match="replica 1: it was ended by SIGKILL"):
        await streams[1].read()
    several.finish(streams[0])
    assert (await streams[0].read())[0].tokens == [5]
    for stream in streams:
        stream.close()
    for _ in range(6):
        several.ask()
    assert several.took() == [4, 1, 4]
    with pytest.raises(PeerError, match="replica 1"):
        several.ask(dp_rank=1)
    assert several.client.trouble is None
    several.client.fail(PeerError("all over"))
    assert several.client.trouble == "all over"


@in_loop
async def test_a_replica_that_hangs_is_passed_by_and_one_that_starts_anew_is_waited_for() -> None:
    several = Several("round_robin")
    hung, starting, _ = several.client.replicas
    hung.silence = 0.0
    starting.fail(PeerError("gone"))
    starting.renew(several.sent[1].append)
    for _ in range(3):
        several.ask()
    assert several.took() == [0, 0, 3]
    assert "has not ticked" in (hung.trouble or "")
    assert "replica 1: the model is being loaded" in (starting.trouble or "")
    starting.warm.set()
    hung.silence = 100.0
    await asyncio.sleep(0)
    for _ in range(4):
        several.ask()
    assert several.took() == [2, 2, 3], "those that have taken fewest so far go first"


ACTIONS = st.sampled_from(["ask", "ask", "ask", "finish", "close", "fail", "renew", "hang"])


@given(balance=st.sampled_from(sorted(SPREAD)), acts=st.lists(st.tuples(ACTIONS, st.integers(0, 2)), max_size=40))
def test_whatever_happens_loads_are_those_of_what_runs(balance: str, acts: list[tuple[str, int]]) -> None:
    async def play() -> None:
        several, streams = Several(balance), list[tuple[Stream, int]]()
        for act, number in acts:
            replica = several.client.replicas[number]
            if act == "ask":
                with contextlib.suppress(PeerError, DeadlineError):
                    n = 1 + number
                    streams.append((several.ask(n, num_choices=n, num_kept=n), n))
            elif act in ("finish", "close") and streams:
                stream, _ = streams.pop(number % len(streams))
                if act == "finish":
                    several.finish(stream)
                stream.close()
            elif act == "fail":
                replica.fail(PeerError("gone"))
            elif act == "renew" and replica.failure is not None:
                replica.renew(several.sent[number].append)
                replica.warm.set()
            elif act == "hang":
                replica.silence = 0.0 if number else 300.0
            for one in several.client.replicas:
                mine = [n for stream, n in streams if several.where(stream) == one.number]
                assert (one.load.num_requests, one.load.num_tokens) == (sum(mine), sum(n * (1 + n) for n in mine))
        for stream, _ in streams:
            stream.close()
        assert len(several.client) == 0
        assert not any(one.load.num_requests or one.load.num_tokens for one in several.client.replicas)

    asyncio.run(play())


# -- the server --------------------------------------------------------------------------------------------------------


def ask(url: str, **more: Any) -> httpx.Response:
    return calls.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 3, **more})


def test_two_replicas_answer_behind_one_front(folder: Path) -> None:
    with fake_server(folder, dp_size=2, load_balance_method="total_requests") as server:
        url = server.ready()
        assert len(server.engines(2)) == 2
        assert {ask(url).json()["choices"][0]["text"] for _ in range(4)} == {"The"}
        wait_until(
            lambda: [server.text.count(f"DP{rank} Prefill") for rank in (0, 1)] == [3, 3]
        )  # with the first token of each
        for _ in range(3):
            assert ask(url, data_parallel_rank=1).status_code == 200
        wait_until(lambda: server.text.count("DP1 Prefill") == 6)
        assert ask(url, data_parallel_rank=2).status_code == 400
        assert [r["status"] for r in calls.get(f"{url}/health").json()["replicas"]] == ["ok", "ok"]
        assert calls.get(f"{url}/health_generate").status_code == 200
        assert len(calls.get(f"{url}/server_info").json()["state"]["replicas"]) == 2
        metrics = calls.get(f"{url}/metrics").text
        for rank in "01":
            assert f'tessera:num_running_reqs{{dp_rank="{rank}",model_name="tiny"}}' in metrics
        assert server.text.count("max-queued-requests: ") == 1, "decisions are printed once"


def in_flight_on_both(url: str) -> tuple[Asking, Asking]:
    """A request on each replica, begun."""
    asking = Asking(url, stream=True, data_parallel_rank=0), Asking(url, stream=True, data_parallel_rank=1)
    for one in asking:
        assert one.begun.wait(PATIENCE_S)
    return asking


def test_the_end_of_a_replica_is_the_end_of_the_server_unless_asked_otherwise(folder: Path) -> None:
    with fake_server(folder, SLOW, dp_size=2) as server:
        url = server.ready()
        asking = in_flight_on_both(url)
        other, victim = server.engines(2)
        began = time.monotonic()
        victim.kill()
        assert server.code() == 1
        assert time.monotonic() - began < NOTICED_S
        for one in asking:
            one.join(PATIENCE_S)
            assert "replica 1: the engine process was ended by SIGKILL" in one.text
        assert "PeerError: replica 1: the engine process was ended by SIGKILL" in server.text
        gone(other)


def test_the_other_replicas_go_on_if_asked(folder: Path) -> None:
    with fake_server(folder, SLOW, dp_size=2, on_failure="continue") as server:
        url = server.ready()
        first, second = in_flight_on_both(url)
        server.engines(2)[1].kill()
        second.join(PATIENCE_S)
        assert "replica 1: the engine process was ended by SIGKILL" in second.text
        first.join(PATIENCE_S)
        assert '"finish_reason":"length"' in first.text
        assert {ask(url).status_code for _ in range(4)} == {200}
        refused = ask(url, data_parallel_rank=1)
        assert (refused.status_code, "replica 1" in refused.text) == (503, True)
        told = calls.get(f"{url}/health")
        assert told.status_code == 200
        assert [("SIGKILL" in r["status"]) for r in told.json()["replicas"]] == [False, True]
        assert "the others go on" in server.text
        gauge = 'tessera:num_running_reqs{dp_rank="1",model_name="tiny"} 0.0'
        assert gauge in calls.get(f"{url}/metrics").text, "nothing runs on what is dead"
        server.engine().kill()
        assert server.code() == 1
        assert "replica 0: the engine process was ended by SIGKILL" in server.text


@pytest.mark.parametrize("dp_size", [1, 2])
def test_an_engine_is_started_anew_if_asked_but_not_for_ever(folder: Path, dp_size: int) -> None:
    with fake_server(folder, SLOW, dp_size=dp_size, on_failure="restart", max_restarts=2) as server:
        url = server.ready()
        for count in (1, 2):
            asking = Asking(url, stream=True, data_parallel_rank=dp_size - 1)
            assert asking.begun.wait(PATIENCE_S)
            server.engines(dp_size)[-1].kill()
            asking.join(PATIENCE_S)
            assert "ended by SIGKILL" in asking.text
            wait_until(lambda n=count: server.text.count("it is started anew") == n)
            if dp_size == 1:
                wait_until(lambda: health(url) == 503)
            else:
                assert ask(url).status_code == 200, "the other goes on"
            wait_until(lambda: ask(url, data_parallel_rank=dp_size - 1).status_code == 200)
            wait_until(lambda: health(url) == 200)
        server.engines(dp_size)[-1].kill()
        assert server.code() == 1
        assert "which is all (--max-restarts)" in server.text


def test_restarts_that_fail_are_counted_and_a_first_start_is_never_repeated(folder: Path) -> None:
    with fake_server(folder, {"FAULT": "again"}, on_failure="restart", max_restarts=2) as server:
        server.ready()
        server.engine().kill()
        assert server.code() == 1
        assert server.text.count("it is started anew") == 2
        assert "the checkpoint is gone" in server.text
    with fake_server(folder, {"FAULT": "load"}, on_failure="restart") as server:
        assert server.code() == 1
        assert "started anew" not in server.text


def test_an_engine_that_hangs_is_started_anew_too(folder: Path) -> None:
    with fake_server(folder, on_failure="restart", watchdog_timeout=5.0) as server:
        url = server.ready()
        hung = ask(url, prompt=[HANG])
        assert (hung.status_code, "has not stepped" in hung.text) == (503, True)
        wait_until(lambda: ask(url).status_code == 200)
        assert "it is started anew: 1 of 3 times" in server.text


def test_an_engine_that_hangs_ends_the_server_as_a_rank_that_hangs_does(folder: Path) -> None:
    """Known fault: under `--on-failure exit` it stayed, and /health said 503 until somebody looked."""
    with fake_server(folder, watchdog_timeout=2.0) as server:
        url, engine = server.ready(), server.engine()
        engine.suspend()
        hung = Asking(url)
        assert server.code() == 1
        hung.join(PATIENCE_S)
        assert (hung.status, "has not stepped" in hung.text) == (503, True)
        assert re.search(r"DeadlineError: the engine has not stepped for \d s \(allowed: 2 s\)", server.text)
        gone(engine)


def test_a_front_that_was_stopped_itself_blames_no_engine(folder: Path) -> None:
    """As by Ctrl-Z in a terminal: it has heard of none for long, and hears of all of them now."""
    with fake_server(folder, watchdog_timeout=2.0) as server:
        url = server.ready()
        server.signal(signal.SIGSTOP)
        time.sleep(5.0)
        server.signal(signal.SIGCONT)
        time.sleep(1.0)
        assert ask(url).status_code == 200
        assert health(url) == 200


@in_loop
async def test_a_replica_that_hangs_is_named_once() -> None:
    several = Several("round_robin")
    stream, hung = several.ask(), several.client.replicas[0]
    hung.give_up()
    for error in (hung.failure, several.client.replicas[0].silent()):
        assert str(error).startswith("replica 0: the engine has not stepped")
    with pytest.raises(DeadlineError, match=r"^replica 0: the engine"):
        await stream.read()
    stream.close()


def test_a_start_that_is_slower_than_the_watchdog_is_no_failure_and_an_idle_engine_neither(folder: Path) -> None:
    """Known fault: both used up all restarts."""
    with fake_server(folder, {"FAULT": "late"}, on_failure="restart", watchdog_timeout=2) as server:
        url = server.ready()
        assert "watchdog-timeout: 2 s once it serves (a start may be silent for 300 s)" in server.text
        server.engine().kill()
        server.wait_for("started anew: 1 of 3")
        wait_until(lambda: health(url) == 200)
        time.sleep(3)
        assert health(url) == 200
        assert server.text.count("it is started anew") == 1
        hung = ask(url, prompt=[HANG])
        assert "has not stepped for" in hung.text
        assert "(allowed: 2 s)" in hung.text


def test_a_signal_while_a_replica_starts_anew_leaves_nothing(folder: Path) -> None:
    with fake_server(folder, SLOW, dp_size=2, on_failure="restart") as server:
        server.ready()
        server.engines(2)[1].kill()
        server.wait_for("it is started anew")
        below = server.children()
        server.process.terminate()
        assert server.code() == 0
        for child in below:
            gone(child)
        assert server.text.count("it is started anew") == 1


def test_an_end_in_order_is_no_failure(folder: Path) -> None:
    with fake_server(folder, dp_size=2, on_failure="restart") as server:
        server.ready()
        server.process.terminate()
        assert server.code() == 0
        assert "anew" not in server.text


def test_an_engine_that_has_ended_keeps_no_frames_of_the_requests_that_it_refused() -> None:
    """Known fault: all raised one error object, whose traceback grew with each of them."""
    replica = Replica(0, "", lambda message: None, 5.0)
    replica.failure = PeerError("rank 1 has ended")
    for _ in range(20):
        with pytest.raises(PeerError) as caught:
            replica.submit(Submit("r", [1], SamplingParams()), lambda output: None)
    assert len(traceback.extract_tb(caught.value.__traceback__)) == 2, "the caller's, and where it is raised"
