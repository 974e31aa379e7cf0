"""`tessera eval`: accuracy on questions with known answers."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from tessera.commands.clients import session
from tessera.commands.terminal import pairs, progress, say, write
from tessera.core.errors import ConfigError, Conflict
from tessera.evals.run import Plan, Result, evaluate
from tessera.evals.tasks import TASKS, Question, Task, load_data

NUM_QUESTIONS = 200
FORM = """Give JSON lines such as {"question": "1 + 1?", "answer": "#### 2"}, or with four "choices" as well."""


def run(options: Namespace, asked: Mapping[str, object], environ: Mapping[str, str]) -> int:
    """Asks all questions and prints the score; 1 when it is below `--min-score`."""
    task, questions = _questions(options)
    plan = Plan(options.parallel, options.repeat, options.max_tokens, options.temperature, options.seed)
    with session(options, asked, environ) as here, progress(task.name) as advance:
        result = here.runner.run(evaluate(here.client, task, questions, plan, advance))
    if options.json:
        write(json.dumps(result.as_data(options.output_details), indent=2, ensure_ascii=False))
    else:
        _print(result, options.data)
    if options.min_score is not None and result.score < options.min_score:
        say(f"tessera: the score {result.score:.3f} is below --min-score {options.min_score:g}")
        return 1
    return 0


def _questions(options: Namespace) -> tuple[Task, list[Question]]:
    if options.data is None:
        task = TASKS[options.task]
        return task, task.questions("heldout", options.num_questions or NUM_QUESTIONS, options.seed)
    flag = f"--data {options.data}"
    try:
        task = load_data(options.data)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError([Conflict((flag,), str(error), FORM)]) from error
    if task.name != options.task:
        reason = f"its questions are of the {task.name} form"
        raise ConfigError([Conflict((f"--task {options.task}", flag), reason, f"Use --task {task.name}.")])
    return task, task.questions("heldout", options.num_questions or len(task.fixed))


def _print(result: Result, data: Path | None) -> None:
    rows: dict[str, object] = {
        "questions": f"{result.num_questions} {'made here' if data is None else f'of {data}'}",
        "score": f"{result.score:.3f}",
        "output tokens": result.output_tokens,
        "seconds": f"{result.seconds:.1f}",
        "output tokens/s": f"{result.throughput:.1f}",
    }
    if result.plan.repeat > 1:
        rows["scores"] = ", ".join(f"{score:.3f}" for score in result.scores)
    if result.num_cut:
        rows["cut at max tokens"] = result.num_cut
    pairs(result.task, rows)
