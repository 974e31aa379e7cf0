"""The packaged models on every task, by this engine and by transformers, answer by answer: `python bench/evals.py`.

transformers computes in float32, as in `training/evaluate.py` (left-padded batches of 50); the engine in float32 and in
the dtype that it chooses by itself, all questions at once. In float32 every answer must be the same text: where one is
not, it is printed and the exit code is 1. Writes `bench/results/evals.md`; with `--device cuda`, where the engine is on
a GPU and transformers is not, `evals_cuda.md` beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from commit import commit
from tessera.commands.local import LocalClient
from tessera.evals.run import Plan, Result, evaluate
from tessera.evals.tasks import TASKS, Question, Task
from tessera.models.folder import ASSETS, packaged_models
from tessera.run.hardware import cores
from tessera.serve.engine import Engine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = {"cpu": ROOT / "bench" / "results" / "evals.md", "cuda": ROOT / "bench" / "results" / "evals_cuda.md"}
BATCH = 50
HEAD = """# Accuracy of the packaged models

{num} held-out questions a task (seed 0), greedy, {parallel} at a time. *transformers*: the same questions in float32 by
`training/evaluate.py`. *differ*: answers whose text is not the same. Tokens/s: output tokens a second of the whole run,
prompts included. Written by `python bench/evals.py` at {commit}: {machine}; load averages
of the machine at the end (1, 5 and 15 minutes; above the cores, tokens/s say little): {load}.

| model | task | dtype | tessera | transformers | differ | output tokens/s |
|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """One model on one task in one dtype; `theirs`: what transformers answered, `score`: theirs."""

    model: str
    dtype: str
    ours: Result
    theirs: list[str]
    score: float

    @property
    def differing(self) -> list[int]:
        """Questions whose answers are not the same text."""
        return [i for i, (a, text) in enumerate(zip(self.ours.answers, self.theirs, strict=True)) if a.text != text]

    def line(self) -> str:
        """As Markdown."""
        scores = f"{self.ours.score:.3f} | {self.score:.3f} | {len(self.differing)} | {self.ours.throughput:.0f}"
        return f"| {self.model} | {self.ours.task} | {self.dtype} | {scores} |\n"


def reference(model: str, task: Task, questions: list[Question]) -> list[str]:
    """What transformers answers."""
    ours = importlib.import_module("evaluate")  # of training/
    loaded, tokenizer = ours.load(ASSETS / model)
    parts = [questions[i : i + BATCH] for i in range(0, len(questions), BATCH)]
    return [text for part in parts for text in ours.greedy(loaded, tokenizer, task, part)]


def measure(model: str, num: int, parallel: int, device: str) -> list[Row]:
    """Every task of one model, in each dtype."""
    asked = {name: task.questions("heldout", num) for name, task in TASKS.items()}
    theirs = {name: reference(model, task, asked[name]) for name, task in TASKS.items()}
    rows = []
    for dtype in ("float32", "auto"):
        with Engine(model, dtype=dtype, device=device, log_level="warning") as engine:
            if dtype == "auto" and engine.config.model.dtype == "float32":
                break
            for name, task in TASKS.items():
                ours = asyncio.run(evaluate(LocalClient(engine), task, asked[name], Plan(parallel)))
                score = sum(map(task.score, asked[name], theirs[name])) / num
                rows.append(Row(model, engine.config.model.dtype, ours, theirs[name], score))
                sys.stdout.write(rows[-1].line())
    return rows


def main() -> int:
    """Measures, prints what differs, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-questions", type=int, default=200)
    parser.add_argument("--parallel", type=int, default=128)
    parser.add_argument("--device", choices=sorted(RESULTS), default="cpu")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "training"))
    rows = [
        row for model in packaged_models() for row in measure(model, args.num_questions, args.parallel, args.device)
    ]
    machine = f"{platform.machine()}, {cores()} cores, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    if args.device == "cuda":
        machine += f", {torch.cuda.get_device_name()}"
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    head = HEAD.format(num=args.num_questions, parallel=args.parallel, machine=machine, load=load, commit=commit())
    RESULTS[args.device].write_text(head + "".join(row.line() for row in rows))
    wrong = [(row, i) for row in rows if row.dtype == "float32" for i in row.differing]
    for row, i in wrong:
        found = row.ours.answers[i]
        sys.stdout.write(f"{row.model}, {found.question!r}: {found.text!r} and not {row.theirs[i]!r}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
