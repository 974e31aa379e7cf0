"""Three small question sets with known answers, and how an answer is scored.

They have the *form* of well-known sets (GSM8K: Cobbe et al. 2021, arXiv:2110.14168; GPQA: Rein et al. 2023,
arXiv:2311.12022) and none of their text: every question is made here, by a seeded generator, so an accuracy run
needs no download. The real sets can be read from a file with `load_data`.

`gsm8k`   word problems on whole numbers, worked line by line, ending in `#### 42`
`gpqa`    four choices; the answer gives the choice and its letter: `47. Answer: C`
`recall`  pairs listed far back in the prompt, one is asked for; the answer is four digits and nothing else

A question belongs to the held-out split if a hash of its text says so: no held-out question can be trained on,
whatever the seed. Pure Python: no torch, no tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LETTERS = "ABCD"
ANSWER_TOKENS = 512  # most of an answer to a question of a file
SPLITS = ("train", "heldout")
PEOPLE = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jack", "Kim", "Leo")
THINGS = ("apples", "books", "coins", "eggs", "pens", "shells", "stamps", "cards")
COLOURS = ("red", "blue", "green", "black", "white", "pink", "grey", "gold")
NAMES = (
    "ada", "bob", "cal", "deb", "eli", "fay", "gus", "hal", "ida", "jim", "kay", "lou", "mia", "ned", "ora", "pat",
    "quin", "ray", "sue", "tom", "una", "vic", "wes", "xena", "yan", "zoe", "amy", "bill", "cora", "dov", "emma",
    "fred",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """`prompt`: the user's message. `answer`: the worked answer, to the letter. `target`: what is scored."""

    prompt: str
    answer: str
    target: str


def split_of(prompt: str) -> str:
    """`train` or `heldout` (one question in eight), from the text alone."""
    return SPLITS[hashlib.blake2b(prompt.encode(), digest_size=1).digest()[0] < 32]


@dataclass(frozen=True)
class Task:
    """A named set of questions. `make` draws one from a generator; `fixed` holds those read from a file instead.

    `max_tokens` covers every worked answer under the tokenizer of the models in `tessera/assets`.
    """

    name: str
    max_tokens: int
    extract: Callable[[str], str | None]
    make: Callable[[random.Random], Question] | None = None
    fixed: tuple[Question, ...] = ()

    def questions(self, split: str, n: int, seed: int = 0) -> list[Question]:
        """`n` different questions of a split; the same arguments always give the same list.

        Questions read from a file have no splits: the first `n` are returned, in the file's order.
        """
        if split not in SPLITS:
            raise ValueError(f"split: found {split!r}, allowed {', '.join(SPLITS)}")
        if self.make is None:
            return list(self.fixed[:n])
        rng = random.Random(f"{self.name}/{split}/{seed}")
        found: dict[str, Question] = {}
        while len(found) < n:
            question = self.make(rng)
            if split_of(question.prompt) == split:
                found.setdefault(question.prompt, question)
        return list(found.values())

    def score(self, question: Question, completion: str) -> bool:
        """Whether the completion's final answer is the question's target."""
        return self.extract(completion) == question.target


# --- gsm8k -----------------------------------------------------------------------------------------------------------


def make_gsm8k(rng: random.Random) -> Question:
    """A start and two events: `37 + 48 = 85`, `85 - 29 = 56`, `#### 56`. Every value lies in 1..200."""
    who, other = rng.sample(PEOPLE, 2)
    thing = rng.choice(THINGS)
    lines: list[str] = []
    if rng.random() < 0.4:
        boxes, each = rng.randint(2, 9), rng.randint(2, 12)
        value = boxes * each
        story = [f"{who} has {boxes} boxes of {each} {thing}."]
        lines.append(f"{boxes} * {each} = {value}")
    else:
        value = rng.randint(10, 99)
        story = [f"{who} has {value} {thing}."]
    for _ in range(2):
        step = rng.randint(2, 60)
        if value > 110 or (value > 20 and rng.random() < 0.5):
            step = rng.randint(2, min(value - 1, 90))
            verb = rng.choice((f"{who} gives {step} to {other}.", f"{who} loses {step}.", f"{who} sells {step}."))
            lines.append(f"{value} - {step} = {value - step}")
            value -= step
        else:
            verb = rng.choice((f"{who} buys {step} more.", f"{who} finds {step}.", f"{other} gives {who} {step}."))
            lines.append(f"{value} + {step} = {value + step}")
            value += step
        story.append(verb)
    story.append(f"How many {thing} does {who} have now?")
    return Question(" ".join(story), "\n".join([*lines, f"#### {value}"]), str(value))


def extract_number(completion: str) -> str | None:
    """The last `#### n`, without separators of thousands and without a trailing `.0`."""
    found = re.findall(r"####\s*\$?(-?[\d,]+(?:\.\d+)?)", completion)
    if not found:
        return None
    return re.sub(r"\.0+$", "", found[-1].replace(",", "")).lstrip("0") or "0"


# --- gpqa ------------------------------------------------------------------------------------------------------------


def four_choices(question: str, choices: list[str], right: int) -> Question:
    """The text of a four-choice question; `right` counts from 0. The answer gives the choice, then its letter."""
    listed = "\n".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
    return Question(f"{question}\n{listed}", f"{choices[right]}. Answer: {LETTERS[right]}", LETTERS[right])


def make_gpqa(rng: random.Random) -> Question:
    """One of: look a fact up, find the largest or smallest number, add two numbers.

    The choices are two-digit numbers of one decade, so the second digit decides: a decoded token, not the prefill's.
    """
    question, right, wrong = rng.choice((_fact, _extreme, _sum))(rng)
    choices = rng.sample([right, *wrong], 4)
    return four_choices(question, [str(n) for n in choices], choices.index(right))


def _decade(rng: random.Random) -> list[int]:
    start = 10 * rng.randint(1, 9)
    return rng.sample(range(start, start + 10), 4)


def _fact(rng: random.Random) -> tuple[str, int, list[int]]:
    right, *wrong = numbers = _decade(rng)
    colours = rng.sample(COLOURS, 4)
    facts = rng.sample([f"{colour} {count}" for colour, count in zip(colours, numbers, strict=True)], 4)
    return f"Boxes: {', '.join(facts)}. What does the {colours[0]} box hold?", right, wrong


def _extreme(rng: random.Random) -> tuple[str, int, list[int]]:
    numbers = sorted(_decade(rng))
    if rng.random() < 0.5:
        return "Which number is the largest?", numbers[-1], numbers[:-1]
    return "Which number is the smallest?", numbers[0], numbers[1:]


def _sum(rng: random.Random) -> tuple[str, int, list[int]]:
    right, *wrong = _decade(rng)
    step = rng.randint(2, 9)
    return f"What is {right - step} + {step}?", right, wrong


def extract_letter(completion: str) -> str | None:
    """The letter of the last `Answer: X`; without one, the first letter that stands alone."""
    named = re.findall(r"[Aa]nswer(?:\s+is)?\s*:?\s*\(?([A-D])\b", completion)
    if named:
        return named[-1]
    alone = re.search(r"\b([A-D])\b", completion)
    return alone.group(1) if alone else None


# --- recall ----------------------------------------------------------------------------------------------------------


def recall_question(pairs: dict[str, str], name: str) -> Question:
    """Ask for the code of `name` among `pairs`."""
    listed = ", ".join(f"{key} {code}" for key, code in pairs.items())
    return Question(f"Codes: {listed}. {recall_ask(name)}", pairs[name], pairs[name])


def recall_ask(name: str) -> str:
    """The asking sentence alone, as a later turn on the same list uses it."""
    return f"What is the code of {name}?"


def recall_pairs(rng: random.Random, least: int = 6) -> dict[str, str]:
    """Up to twenty names, each with four random digits."""
    return {name: f"{rng.randrange(10000):04d}" for name in rng.sample(NAMES, rng.randint(least, 20))}


def make_recall(rng: random.Random) -> Question:
    """Pairs 20 to 170 tokens back; the digits after the first are decoded with the cached state alone."""
    pairs = recall_pairs(rng)
    return recall_question(pairs, rng.choice(list(pairs)))


def extract_code(completion: str) -> str | None:
    """The first run of digits."""
    found = re.search(r"\d+", completion)
    return found.group() if found else None


TASKS: dict[str, Task] = {
    "gsm8k": Task("gsm8k", 64, extract_number, make_gsm8k),
    "gpqa": Task("gpqa", 12, extract_letter, make_gpqa),
    "recall": Task("recall", 8, extract_code, make_recall),
}


# --- files -----------------------------------------------------------------------------------------------------------


def load_data(path: str | Path) -> Task:
    """A task from a `.jsonl` file, one kind of question per file.

    `{"question", "answer"}` with `#### n` in the answer is the gsm8k form; `{"question", "choices", "answer"}` with
    four choices and a letter, an index from 0 or the choice itself as the answer is the gpqa form.
    """
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not rows:
        raise ValueError(f"{path}: found no questions; expected one JSON object on each line")
    form = "gpqa" if "choices" in rows[0] else "gsm8k"
    read = _read_choices if form == "gpqa" else _read_worked
    fixed = tuple(read(row, f"{path}, question {number}") for number, row in enumerate(rows, 1))
    return Task(form, ANSWER_TOKENS, TASKS[form].extract, fixed=fixed)


def _read_worked(row: dict[str, str], where: str) -> Question:
    target = extract_number(str(row.get("answer", "")))
    if "question" not in row or target is None:
        raise ValueError(f'{where}: found keys {sorted(row)}; expected "question" and an "answer" ending in `#### n`')
    return Question(row["question"], row["answer"], target)


def _read_choices(row: dict[str, object], where: str) -> Question:
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or len(choices) != 4 or "question" not in row:
        raise ValueError(f'{where}: found keys {sorted(row)}; expected "question", four "choices" and "answer"')
    texts = [str(choice) for choice in choices]
    if isinstance(answer, int) and 0 <= answer < 4:
        right = answer
    elif isinstance(answer, str) and len(answer) == 1 and answer in LETTERS:
        right = LETTERS.index(answer)
    elif answer in choices:
        right = choices.index(answer)
    else:
        raise ValueError(f"{where}: found answer {answer!r}; expected A to D, 0 to 3 or one of the choices")
    return four_choices(str(row["question"]), texts, right)
