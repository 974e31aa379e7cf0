"""An accuracy run: questions to a client, a few at a time, as often as asked; scores and speed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from tessera.client import Ask, Client, answer
from tessera.core.messages import choice_seed
from tessera.evals.tasks import Question, Task


@dataclass(frozen=True, slots=True)
class Plan:
    """How a set is asked: `parallel` questions at a time, the whole set `repeat` times.

    Greedy unless `temperature` is above 0; then every question of every round has a seed of its own, from `seed`.
    """

    parallel: int = 128
    repeat: int = 1
    max_tokens: int | None = None
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Answered:
    """One question of one round. `finish`: why the answer ended."""

    round: int
    question: str
    target: str
    text: str
    right: bool
    num_tokens: int
    finish: str | None


@dataclass(frozen=True, slots=True)
class Result:
    """Answers in the order of rounds and questions; `seconds` from the first question to the last answer."""

    task: str
    num_questions: int
    plan: Plan
    answers: tuple[Answered, ...]
    seconds: float

    @property
    def scores(self) -> list[float]:
        """Share of right answers, of each round."""
        rounds = [[a.right for a in self.answers if a.round == i] for i in range(self.plan.repeat)]
        return [fmean(one) for one in rounds]

    @property
    def score(self) -> float:
        """Mean of the rounds."""
        return fmean(self.scores)

    @property
    def output_tokens(self) -> int:
        """Tokens generated in all rounds."""
        return sum(a.num_tokens for a in self.answers)

    @property
    def throughput(self) -> float:
        """Output tokens a second."""
        return self.output_tokens / self.seconds

    @property
    def num_cut(self) -> int:
        """Answers that ended because `max_tokens` was reached."""
        return sum(a.finish == "length" for a in self.answers)

    def as_data(self, details: bool = False) -> dict[str, Any]:
        """Plain data; `details`: every answer too."""
        told = {
            "task": self.task,
            "num_questions": self.num_questions,
            **asdict(self.plan),
            "score": self.score,
            "scores": self.scores,
            "num_cut": self.num_cut,
            "output_tokens": self.output_tokens,
            "latency": self.seconds,
            "output_throughput": self.throughput,
        }
        return told | ({"answers": [asdict(a) for a in self.answers]} if details else {})


Advance = Callable[[int, int], None]


async def evaluate(
    client: Client, task: Task, questions: Sequence[Question], plan: Plan, advance: Advance = lambda done, total: None
) -> Result:
    """Asks every question. A request that fails ends the run with its error: it is no wrong answer.

    `advance(done, total)` is called after each answer.
    """
    asked = [(turn, question) for turn in range(plan.repeat) for question in questions]
    found: dict[int, Answered] = {}
    waiting = iter(range(len(asked)))

    async def work() -> None:
        for index in waiting:
            found[index] = await _ask(client, task, plan, index, *asked[index])
            advance(len(found), len(asked))

    began = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(plan.parallel, len(asked))):
                group.create_task(work())
    except ExceptionGroup as many:
        raise many.exceptions[0] from many
    seconds = time.perf_counter() - began
    return Result(task.name, len(questions), plan, tuple(found[i] for i in range(len(asked))), seconds)


async def _ask(client: Client, task: Task, plan: Plan, index: int, turn: int, question: Question) -> Answered:
    ask = Ask(
        messages=({"role": "user", "content": question.prompt},),
        max_tokens=plan.max_tokens or task.max_tokens,
        temperature=plan.temperature,
        seed=choice_seed(plan.seed, index) if plan.temperature > 0 else None,
    )
    got = await answer(client, ask)
    right = task.score(question, got.text)
    return Answered(turn, question.prompt, question.target, got.text, right, got.num_tokens, got.finish)
