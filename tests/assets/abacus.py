"""The packaged models at work: in an engine, and in a bare decoder whose caches can be damaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from tokenizers import Tokenizer
from torch import Tensor

from models.harness import Rank, make_rank
from tessera.core.mesh import SINGLE
from tessera.core.messages import SamplingParams, Submit
from tessera.core.weights import weight_table
from tessera.evals.tasks import TASKS, Question
from tessera.models.folder import find_model, open_source, read_model
from tiny import TinyModel, serve

MODELS = ("abacus-hybrid", "abacus-mla")
LENGTH = 256  # tokens of the longest prompt and its answer
Fault = Callable[[dict[str, Tensor]], None]


@cache
def model(name: str) -> TinyModel:
    spec = read_model(find_model(name))
    return TinyModel(spec, open_source(find_model(name), spec, weight_table(spec, SINGLE)))


@cache
def tokenizer(name: str) -> Tokenizer:
    return Tokenizer.from_file(str(find_model(name) / "tokenizer.json"))


def questions(task: str, count: int) -> list[Question]:
    """Of the held-out split: no model has seen them."""
    return TASKS[task].questions("heldout", count, seed=7)


def prompt(name: str, question: Question) -> list[int]:
    """As the chat template writes it."""
    text = f"<|im_start|>user\n{question.prompt}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer(name).encode(text).ids


def served(name: str, task: str, count: int) -> float:
    """Share of right answers of an engine in float32, greedy, all questions at once."""
    asked = questions(task, count)
    params = SamplingParams(temperature=0.0, max_new_tokens=TASKS[task].max_tokens)
    submits = [Submit(f"q{i}", prompt(name, question), params) for i, question in enumerate(asked)]
    run = serve(model(name), submits, dtype="float32", max_total_tokens=16384)
    assert {answer.finish for answer in run.answers.values()} == {"stop"}
    texts = [tokenizer(name).decode(run.answers[f"q{i}", 0].tokens) for i in range(count)]
    return sum(map(TASKS[task].score, asked, texts)) / count


@dataclass
class Prefilled:
    """Prompts of a task, computed by a bare decoder; from there it can be decoded again and again."""

    name: str
    task: str
    asked: list[Question]
    rank: Rank
    first: Tensor  # the token after each prompt: the prefill gives it, whatever becomes of the caches
    lengths: list[int]

    def accuracy(self, fault: Fault | None = None) -> float:
        """Share of right answers when the caches are damaged between the prefill and the first decoded token."""
        whole = {key: pool.clone() for key, pool in self.rank.caches.items()}
        if fault is not None:
            fault(self.rank.caches)
        texts = [tokenizer(self.name).decode(tokens) for tokens in self._decoded()]
        for key, pool in whole.items():
            self.rank.caches[key].copy_(pool)
        return sum(map(TASKS[self.task].score, self.asked, texts)) / len(self.asked)

    def _decoded(self) -> list[list[int]]:
        """Greedy tokens of every prompt up to the end of its answer."""
        eos = model(self.name).spec.eos
        self.rank.computed[:] = self.lengths
        said = [[token] for token in self.first.tolist()]
        open_ones = [s for s, tokens in enumerate(said) if tokens[-1] not in eos]
        while open_ones and len(said[open_ones[0]]) < TASKS[self.task].max_tokens:
            logits = self.rank.run([(s, said[s][-1:]) for s in open_ones])
            for s, token in zip(open_ones, logits.argmax(-1).tolist(), strict=True):
                said[s].append(token)
            open_ones = [s for s in open_ones if said[s][-1] not in eos]
        return [tokens[:-1] if tokens[-1] in eos else tokens for tokens in said]


@cache
def prefilled(name: str, task: str, count: int) -> Prefilled:
    """`count` held-out questions in one prefill, float32."""
    asked = questions(task, count)
    tokens = [prompt(name, question) for question in asked]
    rank = make_rank(model(name).spec, model(name).source, sequences=count, length=LENGTH)
    logits = rank.run(list(enumerate(tokens)))
    lengths = [len(t) for t in tokens]
    ends = torch.tensor(lengths).cumsum(0) - 1
    return Prefilled(name, task, asked, rank, logits[ends].argmax(-1), lengths)
