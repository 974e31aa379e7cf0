"""An accuracy run counts what was answered: every question, in order, as often as asked, and a failure is no answer."""

from __future__ import annotations

import asyncio

import pytest

from evals.scripted import Scripted
from tessera.client import Ask
from tessera.core.errors import PeerError
from tessera.evals.run import Plan, evaluate
from tessera.evals.tasks import TASKS, Question

TASK = TASKS["gsm8k"]
QUESTIONS = [Question(f"question {i}", f"#### {i}", str(i)) for i in range(10)]


def number(ask: Ask) -> int:
    assert ask.messages is not None
    return int(ask.messages[-1]["content"].split()[-1])


def test_scores_of_each_round_and_counts_of_all() -> None:
    turns: dict[int, int] = {}

    def say(ask: Ask) -> list[str | Exception]:
        i = number(ask)
        turns[i] = turns.get(i, -1) + 1
        right = i < 8 if turns[i] == 0 else i < 5
        return ["####", f" {i if right else 99}"]

    seen: list[tuple[int, int]] = []
    result = asyncio.run(
        evaluate(Scripted(say), TASK, QUESTIONS, Plan(parallel=3, repeat=2), lambda *n: seen.append(n))
    )
    assert result.scores == [0.8, 0.5]
    assert result.score == pytest.approx(0.65)
    assert result.output_tokens == 40
    assert result.num_cut == 0
    assert [a.target for a in result.answers] == [q.target for q in QUESTIONS] * 2
    assert [a.round for a in result.answers] == [0] * 10 + [1] * 10
    assert seen == [(i, 20) for i in range(1, 21)]
    told = result.as_data(details=True)
    assert (told["score"], told["scores"], len(told["answers"])) == (result.score, result.scores, 20)
    assert told["output_throughput"] == pytest.approx(40 / told["latency"])
    assert "answers" not in result.as_data()


@pytest.mark.parametrize("parallel", [1, 4, 50])
def test_no_more_questions_at_a_time_than_asked(parallel: int) -> None:
    client = Scripted(lambda ask: ["#### 1"], pause=0.001)
    asyncio.run(evaluate(client, TASK, QUESTIONS, Plan(parallel)))
    assert client.most == min(parallel, len(QUESTIONS))


def test_greedy_questions_have_no_seed_and_drawn_ones_one_each() -> None:
    client = Scripted(lambda ask: ["x"])
    asyncio.run(evaluate(client, TASK, QUESTIONS, Plan(repeat=2)))
    assert {ask.seed for ask in client.asked} == {None}
    seeds = []
    for _ in range(2):
        client = Scripted(lambda ask: ["x"])
        asyncio.run(evaluate(client, TASK, QUESTIONS, Plan(repeat=2, temperature=0.5, seed=3)))
        seeds.append([ask.seed for ask in client.asked])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 20


def test_answers_have_the_room_of_the_task_unless_told() -> None:
    client = Scripted(lambda ask: ["x"])
    asyncio.run(evaluate(client, TASK, QUESTIONS[:1], Plan()))
    asyncio.run(evaluate(client, TASK, QUESTIONS[:1], Plan(max_tokens=5)))
    assert [ask.max_tokens for ask in client.asked] == [TASK.max_tokens, 5]


def test_a_request_that_fails_ends_the_run_and_stops_the_others() -> None:
    def say(ask: Ask) -> list[str | Exception]:
        return [PeerError("gone")] if number(ask) == 3 else ["a"] * 1000

    client = Scripted(say, pause=0.001)
    with pytest.raises(PeerError, match="gone"):
        asyncio.run(evaluate(client, TASK, QUESTIONS, Plan()))
    assert client.running == 0
    assert client.stopped == 10
