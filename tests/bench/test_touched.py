"""Promise: the share of the limit that is printed is counted from steps as large as those that were timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.bench.scripts import script
from tests.tiny import FLAGS, HYBRID, QWEN3

from tessera.ops.segments import make_segments
from tessera.run.batch import Input

counting = script("touched")

CHUNK = 8
PROMPTS = [list(range(3, 11)), list(range(20, 28)), list(range(40, 48)), list(range(60, 68))]


def ranges(*lengths: int) -> tuple[Input, ...]:
    """The input of a step whose ranges have these lengths."""
    of_each = np.array(lengths, np.int32)
    zeros = np.zeros(len(lengths), np.int32)
    segments = make_segments(zeros, of_each, np.ones((len(lengths), 4), np.int32), zeros, 16)
    return (Input(torch.zeros(sum(lengths), dtype=torch.int32), segments, (sum(lengths),)),)


def step(touched: Any, inputs: tuple[Input, ...], *ids: list[list[int]]) -> None:
    """A step whose layers chose `ids`."""
    touched.begin()
    for layer, of_layer in enumerate(ids):
        touched.note(layer, torch.tensor(of_layer))
    touched.end(inputs)


def test_steps_with_the_most_rows_of_one_token_count() -> None:
    touched = counting.Touched(2, decodes=True)
    step(touched, ranges(8), [[e] for e in range(8)], [[e] for e in range(8)])  # a prompt: not a step of decode
    step(touched, ranges(1), [[0]], [[1]])
    step(touched, ranges(1, 1, 1), [[0], [1], [2]], [[4], [4], [5]])
    step(touched, ranges(1, 1, 1), [[0], [0], [0]], [[4], [4], [4]])
    step(touched, ranges(1), [[0]], [[1]])  # the last sequence
    assert touched.rows == 3
    assert touched.experts == (3 + 2 + 1 + 1) / 4


def test_of_prompts_the_largest_step_counts() -> None:
    touched = counting.Touched(1, decodes=False)
    step(touched, ranges(2, 2), [[0, 1], [1, 2], [3, 4], [4, 5]])
    step(touched, ranges(1), [[0, 1]])
    assert (touched.rows, touched.experts) == (4, 6.0)


def test_what_two_halves_of_a_step_chose_is_one_number() -> None:
    touched = counting.Touched(1, decodes=True)
    touched.begin()
    touched.note(0, torch.tensor([[0, 1]]))
    touched.note(0, torch.tensor([[1, 2]]))
    touched.end(ranges(1) + ranges(1))
    assert (touched.rows, touched.experts) == (2, 3.0)


def test_without_experts_there_is_nothing() -> None:
    touched = counting.Touched(0, decodes=True)
    step(touched, ranges(1))
    assert touched.experts == 0.0


@pytest.mark.parametrize("decodes", [True, False])
def test_an_engine_that_ends_with_one_sequence(tmp_path: Path, decodes: bool) -> None:
    """Prompts of one chunk each: the last sequence is decoded alone, for longer than all others together."""
    with engine(tmp_path, HYBRID, chunked_prefill_size=CHUNK) as ours:
        with counting.experts_touched(ours, decodes) as touched:
            ours(PROMPTS, 6)
        assert touched.rows == (4 if decodes else CHUNK)
        assert HYBRID["num_experts_per_tok"] < touched.experts <= HYBRID["num_experts"]
        before = touched.rows, touched.experts
        ours(PROMPTS + PROMPTS, 6)  # and the engine goes on unwatched
        assert (touched.rows, touched.experts) == before


def test_a_model_without_experts(tmp_path: Path) -> None:
    with engine(tmp_path, QWEN3) as ours, counting.experts_touched(ours, True) as touched:
        ours(PROMPTS, 3)
    assert touched.experts == 0.0


def engine(folder: Path, config: dict[str, object], **flags: object) -> Any:
    """A tiny engine of random weights, without text."""
    (folder / "config.json").write_text(json.dumps(config))
    asked = {**FLAGS, "model_path": str(folder), "load_format": "dummy", "skip_tokenizer_init": True}
    return counting.Ours({**asked, "disable_radix_cache": True, **flags})
