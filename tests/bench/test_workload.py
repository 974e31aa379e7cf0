"""What a benchmark asks is what was described: lengths, token ids, files; the same seed asks the same."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.bench.workload import Lengths, random_asks, read_asks
from tessera.client import Ask
from tessera.core.errors import RequestError

LIKE = Ask(temperature=0.5, ignore_eos=True)


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(1, 50), st.integers(0, 9))
def test_random_prompts(longest: int, most: int, ratio: float, vocab: int, seed: int) -> None:
    lengths = Lengths(longest, most, ratio)
    asks = random_asks(5, lengths, vocab, random.Random(seed), LIKE)
    for ask in asks:
        assert ask.tokens is not None
        assert max(round(longest * ratio), 1) <= len(ask.tokens) <= longest
        assert max(round(most * ratio), 1) <= (ask.max_tokens or 0) <= most
        assert all(0 <= token < vocab for token in ask.tokens)
        assert (ask.temperature, ask.ignore_eos) == (0.5, True)
    assert asks == random_asks(5, lengths, vocab, random.Random(seed), LIKE)


def test_a_ratio_of_one_is_the_length_itself() -> None:
    (ask,) = random_asks(1, Lengths(9, 5), 10, random.Random(0), LIKE)
    assert (len(ask.tokens or ()), ask.max_tokens) == (9, 5)


def read(path: Path, *rows: object, count: int | None = None) -> list[Ask]:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return read_asks(path, count, Lengths(1, 6), random.Random(0), LIKE)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    rows = ({"prompt": "a"}, {"prompt": [1, 2], "output_len": 3}, {"messages": chat, "more": 1})
    asks = read(tmp_path / "a.jsonl", *rows)
    assert [(a.text, a.tokens, a.messages, a.max_tokens) for a in asks] == [
        ("a", None, None, 6),
        (None, [1, 2], None, 3),
        (None, None, chat, 6),
    ]
    assert [a.text for a in read(tmp_path / "a.jsonl", *rows, count=4)] == ["a", None, None, "a"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"question": "a"}, "line 2: expected an object with either"),
        ({"prompt": "a", "messages": []}, "line 2: expected an object with either"),
        ("{", "line 2: "),
        ([1], "line 2: expected an object"),
        ({"prompt": 5}, "line 2: prompt is int"),
        ({"prompt": "a", "output_len": "x"}, "line 2: output_len is str"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_line(tmp_path: Path, row: object, problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        read(tmp_path / "a.jsonl", {"prompt": "good"}, row)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="found no prompts"):
        read(tmp_path / "a.jsonl")
