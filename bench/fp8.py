"""What fp8 costs in accuracy: the packaged models on every task, on a CPU, against bf16: `python bench/fp8.py`.

Each variant answers the same held-out questions greedily; then it scores, token by token, the answers that bf16 gave.
Writes `bench/results/fp8.md`.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from commit import commit
from tessera.evals.tasks import TASKS, Question
from tessera.models.folder import find_model, packaged_models
from tessera.run.hardware import cores
from tessera.serve.assets import load_assets
from tessera.serve.engine import Engine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "fp8.md"
WEIGHTS: dict[str, Any] = {"quantization": "fp8"}
PAGES: dict[str, Any] = {"kv_cache_dtype": "fp8_e4m3"}
TWIN: dict[str, Any] = {"fp8_gemm_backend": "torch"}
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "float32": {"dtype": "float32"},
    "fp8 weights": {**WEIGHTS, **TWIN},
    "fp8 weights, dequantised": {**WEIGHTS, "fp8_gemm_backend": "dequantize"},
    "fp8 pages (e4m3)": PAGES,
    "fp8 pages (e5m2)": {"kv_cache_dtype": "fp8_e5m2"},
    "fp8 weights and pages": {**WEIGHTS, **TWIN, **PAGES},
}
HEAD = """# Accuracy in fp8

`python bench/fp8.py`: the packaged models, {num} held-out questions a task (seed 0), greedy, {date}, commit {commit}.
Machine: {machine}.

*same*: answers whose text is that of bf16. Then distances of logprobs from those of bf16: the mean over the tokens of
the questions, which no model can know, and the mean and the largest over those of bf16's answers. float32 tells how far
bf16 is from the exact model. fp8 weights: quantised while loading in blocks of 128 x 128; activations in groups of 128
by the plain twin of the GPU's products, or not at all (dequantised, what a CPU does by itself). Pages: keys and values,
latents of abacus-mla.

| model | variant | task | score | same | questions | answers | largest |
|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Answers:
    """Of one task: texts, tokens, score."""

    texts: list[str]
    tokens: list[list[int]]
    score: float


def answers(engine: Engine, prompts: list[list[int]], name: str, questions: Sequence[Question]) -> Answers:
    """Greedy answers to all questions at once."""
    task = TASKS[name]
    found = engine.generate(input_ids=prompts, sampling_params={"temperature": 0, "max_new_tokens": task.max_tokens})
    texts = [one["text"] for one in found]
    score = sum(map(task.score, questions, texts)) / len(questions)
    return Answers(texts, [one["output_ids"] for one in found], score)


def logprobs(engine: Engine, prompts: list[list[int]], tokens: list[list[int]]) -> list[torch.Tensor]:
    """Of the tokens of all prompts but their first, one after the other; and of all answers."""
    sequences = [prompt + answer for prompt, answer in zip(prompts, tokens, strict=True)]
    found = engine.generate(
        input_ids=sequences, sampling_params={"max_new_tokens": 0}, return_logprob=True, logprob_start_len=0
    )
    of_prompts, of_answers = [], []
    for prompt, scored in zip(prompts, found, strict=True):
        entries = [entry[0] for entry in scored["meta_info"]["input_token_logprobs"]]
        of_prompts += entries[1 : len(prompt)]
        of_answers += entries[len(prompt) :]
    return [torch.tensor(of_prompts), torch.tensor(of_answers)]


def measure(model: str, num: int) -> list[str]:
    """The rows of one model."""
    assets = load_assets(find_model(model), None, None)
    assert assets.tokenizer is not None
    assert assets.template is not None
    asked = {name: task.questions("heldout", num) for name, task in TASKS.items()}
    prompts = {}
    for name, questions in asked.items():
        texts = [assets.template.render([{"role": "user", "content": q.prompt}], True, False, {}) for q in questions]
        prompts[name] = [assets.tokenizer.encode(text, False) for text in texts]
    rows: list[str] = []
    base: dict[str, tuple[Answers, list[torch.Tensor]]] = {}
    for variant, flags in VARIANTS.items():
        asked_flags = {"dtype": "bfloat16", "device": "cpu", "log_level": "warning", **flags}
        with Engine(model, **asked_flags) as engine:
            for name, questions in asked.items():
                found = answers(engine, prompts[name], name, questions)
                own = base[name][0].tokens if name in base else found.tokens
                scored = logprobs(engine, prompts[name], own)
                first, reference = base.setdefault(name, (found, scored))
                same = sum(a == b for a, b in zip(found.texts, first.texts, strict=True)) / len(questions)
                asking, answering = ((a - b).abs() for a, b in zip(scored, reference, strict=True))
                apart = f"{asking.mean():.4f} | {answering.mean():.5f} | {answering.max():.3f}"
                rows.append(f"| {model} | {variant} | {name} | {found.score:.3f} | {same:.2f} | {apart} |\n")
                sys.stdout.write(rows[-1])
                sys.stdout.flush()
    return rows


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-questions", type=int, default=100)
    args = parser.parse_args()
    rows = [row for model in packaged_models() for row in measure(model, args.num_questions)]
    machine = f"{platform.machine()}, {cores()} cores, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    head = HEAD.format(num=args.num_questions, date=date.today(), commit=commit(), machine=machine)
    RESULTS.write_text(head + "".join(rows))


if __name__ == "__main__":
    main()
