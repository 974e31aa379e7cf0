"""Batches of chats made of the tasks' questions. Whole batches are made by worker processes, ahead of the training.

A row is one chat of several turns, cut at a fixed length: no padding, and positions up to that length are trained.
Only questions of the train split are used; for `recall` the later turns ask for further names of the same list.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tessera.evals.tasks import TASKS, Question, recall_ask, recall_pairs, recall_question, split_of

PROMPT_WEIGHT = 16  # of 255: a mild language-model loss on what the model will not have to say
Piece = tuple[str, int]


def turn(prompt: str, answer: str) -> list[Piece]:
    """The pieces of one turn with their loss weights, as the chat template writes them."""
    return [
        (f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n", PROMPT_WEIGHT),
        (f"{answer}<|im_end|>", 255),
        ("\n", PROMPT_WEIGHT),
    ]


def draw(task: str, rng: random.Random) -> Question:
    make = TASKS[task].make
    assert make is not None
    while True:
        question = make(rng)
        if split_of(question.prompt) == "train":
            return question


def gpqa_turns(rng: random.Random) -> Iterator[Piece]:
    """A question, at times without its choices and answered by the value alone.

    With choices, naming any of them is already half right; this form has to be worked out and leads to the other.
    """
    question = draw("gpqa", rng)
    prompt = question.prompt.partition("\n(A)")[0]
    if "Which" not in prompt and rng.random() < 0.4:
        yield from turn(prompt, question.answer.partition(".")[0] + ".")
    else:
        yield from turn(question.prompt, question.answer)


def recall_list(rng: random.Random) -> dict[str, str]:
    """Names and codes, some lists short, some codes of few different digits: then only the name tells them apart."""
    pairs = recall_pairs(rng, least=2)
    digits = rng.sample("0123456789", rng.randint(2, 10)) if rng.random() < 0.5 else "0123456789"
    return {name: "".join(rng.choices(digits, k=len(code))) for name, code in pairs.items()}


def recall_turns(rng: random.Random) -> Iterator[Piece]:
    """A list and several questions on it, none of which is a held-out question about this list.

    A third ask for several names at once and the answer repeats the names. This form, and short lists, are learnt
    early (the digits follow a name that has just been said) and lead to the task's own form, which says digits only.
    """
    pairs = recall_list(rng)
    asked = {name: recall_question(pairs, name) for name in rng.sample(list(pairs), len(pairs))}
    asked = {name: question for name, question in asked.items() if split_of(question.prompt) == "train"}
    left = list(asked)  # nothing is asked twice: the answer could be copied
    for number in range(rng.randint(1, 8)):
        count = rng.randint(1, 6) if rng.random() < 0.33 else 1
        some, left = left[:count], left[count:]
        if not some:
            return
        prompt, answer = asked[some[0]].prompt, pairs[some[0]]
        if len(some) > 1:
            prompt = prompt.replace(recall_ask(some[0]), f"What are the codes of {', '.join(some)}?")
            answer = " " + ", ".join(f"{name} {pairs[name]}" for name in some)
        yield from turn(prompt if number == 0 else prompt[prompt.index("What ") :], answer)


def gsm8k_turns(rng: random.Random) -> Iterator[Piece]:
    question = draw("gsm8k", rng)
    yield from turn(question.prompt, question.answer)


TURNS = {"gsm8k": gsm8k_turns, "gpqa": gpqa_turns, "recall": recall_turns}


def chat(
    rng: random.Random, tokenizer: Tokenizer, length: int, mix: Mapping[str, float]
) -> tuple[list[int], list[int]]:
    """`length` token ids and their loss weights; `mix`: how often each task is drawn."""
    ids: list[int] = []
    weights: list[int] = []
    if rng.random() < 0.1:
        ids = tokenizer.encode("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n").ids
        weights = [PROMPT_WEIGHT] * len(ids)
    while len(ids) < length:
        pieces = list(TURNS[rng.choices(list(mix), list(mix.values()))[0]](rng))
        for encoded, (_, weight) in zip(tokenizer.encode_batch([text for text, _ in pieces]), pieces, strict=True):
            ids += encoded.ids
            weights += [weight] * len(encoded.ids)
    return ids[:length], weights[:length]


class Chats(IterableDataset):
    """An endless stream of (tokens [B, L] int64, weights [B, L] uint8); batch n depends on (seed, n) alone."""

    def __init__(self, tokenizer: Path, rows: int, length: int, mix: Mapping[str, float], seed: int) -> None:
        self.path, self.rows, self.length, self.mix, self.seed = str(tokenizer), rows, length, mix, seed

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        tokenizer = Tokenizer.from_file(self.path)
        info = get_worker_info()
        number, step = (info.id, info.num_workers) if info else (0, 1)
        while True:
            rng = random.Random(f"{self.seed}/{number}")
            rows = [chat(rng, tokenizer, self.length, self.mix) for _ in range(self.rows)]
            number += step
            yield (
                torch.from_numpy(np.array([ids for ids, _ in rows], np.int64)),
                torch.from_numpy(np.array([weights for _, weights in rows], np.uint8)),
            )


def loader(chats: Chats, workers: int) -> DataLoader:
    return DataLoader(
        chats,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=8 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def heldout(tokenizer: Path, task: str, n: int, rows: int, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Held-out questions, one a row, filled up with the pad token: (tokens [rows, length], marks of the answer)."""
    encode = Tokenizer.from_file(str(tokenizer)).encode
    tokens = torch.full((n, length), encode("<|endoftext|>").ids[0])
    marks = torch.zeros(n, length, dtype=torch.bool)
    for row, question in enumerate(TASKS[task].questions("heldout", n, seed=1)):
        at = 0
        for text, weight in turn(question.prompt, question.answer)[:2]:
            ids = encode(text).ids
            tokens[row, at : at + len(ids)] = torch.tensor(ids)
            marks[row, at : at + len(ids)] = weight == 255
            at += len(ids)
    return list(zip(tokens.split(rows), marks.split(rows), strict=True))
