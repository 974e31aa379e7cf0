"""Batches of chats made of the tasks' questions. Whole batches are made by worker processes, ahead of the training.

A row is one chat of several topics, cut at a fixed length: no padding, and positions up to that length are trained.
Only questions of the train split are used; for `recall` the later turns ask for further names of the same list.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tessera.evals.tasks import (
    COLOURS,
    LETTERS,
    NAMES,
    TASKS,
    THINGS,
    Question,
    recall_ask,
    recall_pairs,
    recall_question,
    split_of,
)

PROMPT_WEIGHT = 16  # of 255: a mild language-model loss on what the model will not have to say
DIGITS = "0123456789"
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
    """The task's form, and two that lead to it: lists asked for by turns; any number of choices, none of them right.

    With choices, naming any of them is already nearly right, and a model may stop there; those have to be worked out.
    A fact may be asked for in full: then the colour is said before its number.
    """
    form = rng.choices(("task", "list", "none"), (4, 6, 4))[0]
    if form == "list":
        yield from list_turns(rng)
        return
    question = draw("gpqa", rng)
    text, *choices = question.prompt.split("\n")
    answer = question.answer
    if form == "none" and "Which" not in text:
        value = answer.partition(".")[0]
        choices = wrong_choices(rng, value, value[:-1])
        answer = f"{value}. None." if choices else f"{value}."
    if "hold?" in text and rng.random() < 0.25:
        text, answer = text.replace("hold?", "hold, in full?"), f" {text.split()[-3]} {answer}"
    yield from turn("\n".join([text, *choices]), answer)


def wrong_choices(rng: random.Random, value: str, start: str) -> list[str]:
    """None to four lines of choices with numbers as long as `value` that begin with `start`, all of them wrong."""
    wrong: set[str] = set()
    count = rng.randint(0, len(LETTERS))
    while len(wrong) < count:
        wrong |= {start + "".join(rng.choices(DIGITS, k=len(value) - len(start)))} - {value}
    return [f"({letter}) {n}" for letter, n in zip(LETTERS, rng.sample(sorted(wrong), count), strict=False)]


def list_pairs(rng: random.Random) -> dict[str, str]:
    """What lies between the lists of the two tasks: names or colours, with four digits or with two of one decade.

    Looking a name up is learnt on the one, and has only to be carried over to the other.
    """
    names = rng.sample(rng.choice((NAMES, COLOURS, COLOURS)), rng.randint(2, len(COLOURS)))
    if rng.random() < 0.5:
        return {name: f"{rng.randrange(10000):04d}" for name in names}
    decade = rng.choice(DIGITS)
    return {name: decade + digit for name, digit in zip(names, rng.sample(DIGITS, len(names)), strict=True)}


def list_turns(rng: random.Random) -> Iterator[Piece]:
    """A list between the two tasks', asked for as in either, at times with the names said before the numbers.

    Things not asked for, and wrong choices, move the name away from the answer by up to sixty tokens: what finds a name
    at one distance only does not find it in the task, and every distance is learnt from the one before it.
    """
    pairs = list_pairs(rng)
    left = rng.sample(list(pairs), len(pairs))
    listed = f"{rng.choice(('Boxes', 'Codes'))}: {', '.join(f'{name} {code}' for name, code in pairs.items())}. "
    for _ in range(rng.randint(1, 5)):
        form = rng.choices(("codes", "code", "holds", "hold"), (1, 1, 2, 3))[0]
        count = rng.randint(2, 4) if form == "codes" else 1
        some, left = left[:count], left[count:]
        if not some:
            return
        said = ", ".join(f"{name} {pairs[name]}" for name in some)
        ask, answer = {
            "codes": (f"What are the codes of {', '.join(some)}?", f" {said}"),
            "code": (recall_ask(some[0]), pairs[some[0]]),
            "holds": (f"What does the {some[0]} box hold, in full?", f" {said}."),
            "hold": (f"What does the {some[0]} box hold?", f"{pairs[some[0]]}."),
        }[form]
        if rng.random() < 0.5:
            ask += f" Not {', '.join(rng.sample(THINGS, rng.randint(1, len(THINGS))))}."
        code = pairs[some[0]]
        wrong = wrong_choices(rng, code, code[:1]) if form != "codes" and rng.random() < 0.5 else []
        if wrong:
            answer = f"{answer.rstrip('.')}. None."
        yield from turn("\n".join([listed + ask, *wrong]), answer)
        listed = ""


def recall_list(rng: random.Random) -> dict[str, str]:
    """Names and codes, some lists short, some codes of few different digits: then only the name tells them apart."""
    pairs = recall_pairs(rng, least=2)
    digits = rng.sample(DIGITS, rng.randint(2, 10)) if rng.random() < 0.5 else DIGITS
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
) -> tuple[list[int], list[int], list[int]]:
    """`length` token ids, their loss weights, the number of their topic; `mix`: how often each task is drawn."""
    ids: list[int] = []
    weights: list[int] = []
    topics: list[int] = []
    if rng.random() < 0.1:
        ids = tokenizer.encode("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n").ids
        weights, topics = [PROMPT_WEIGHT] * len(ids), [0] * len(ids)
    for topic in itertools.count():  # a system prompt belongs to the first
        if len(ids) >= length:
            break
        pieces = list(TURNS[rng.choices(list(mix), list(mix.values()))[0]](rng))
        for encoded, (_, weight) in zip(tokenizer.encode_batch([text for text, _ in pieces]), pieces, strict=True):
            ids += encoded.ids
            weights += [weight] * len(encoded.ids)
            topics += [topic] * len(encoded.ids)
    return ids[:length], weights[:length], topics[:length]


class Chats(IterableDataset):
    """An endless stream of tokens [B, L] int64, weights and topics [B, L] uint8; batch n depends on (seed, n) alone."""

    def __init__(self, tokenizer: Path, rows: int, length: int, mix: Mapping[str, float], seed: int) -> None:
        self.path, self.rows, self.length, self.mix, self.seed = str(tokenizer), rows, length, mix, seed

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        tokenizer = Tokenizer.from_file(self.path)
        info = get_worker_info()
        number, step = (info.id, info.num_workers) if info else (0, 1)
        while True:
            rng = random.Random(f"{self.seed}/{number}")
            rows = [chat(rng, tokenizer, self.length, self.mix) for _ in range(self.rows)]
            number += step
            ids, weights, topics = zip(*rows, strict=True)
            yield tuple(torch.from_numpy(np.array(x, t)) for x, t in ((ids, "i8"), (weights, "u1"), (topics, "u1")))


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
