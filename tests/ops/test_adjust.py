"""What penalties, bias and bans do to logits, against the same said token by token, in blocks of any size."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import torch
from hypothesis import given

from tessera.ops import sample
from tessera.ops.sample import Adjustments, Penalties, adjust

VOCAB = 7


def penalised(logit: float, token: int, prompt: list[int], output: list[int], p: tuple[float, float, float]) -> float:
    """One logit. `p`: presence, frequency, repetition."""
    presence, frequency, repetition = p
    if token in prompt or token in output:
        logit = logit / repetition if logit > 0 else logit * repetition
    return logit - frequency * Counter(output)[token] - presence * (token in output)


Said = tuple[list[int], list[int], tuple[float, float, float]]  # prompt, output, and as above
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=6)
ASKED = st.tuples(st.sampled_from([0.0, 0.5, -1.0]), st.sampled_from([0.0, 0.25]), st.sampled_from([1.0, 0.5, 2.0]))


@given(st.lists(st.tuples(TOKENS, TOKENS, ASKED), min_size=1, max_size=6), st.data())
def test_of_each_row_its_own(sequences: list[Said], data: st.DataObject) -> None:
    num_rows, width = len(sequences), 1 + max(len(prompt) + len(output) for prompt, output, _ in sequences)
    rows = data.draw(st.permutations(range(num_rows)))[: data.draw(st.integers(1, num_rows))]
    logits = torch.randn(num_rows, VOCAB, dtype=torch.float64)
    tokens = torch.randint(0, VOCAB, (len(rows), width), dtype=torch.int32)  # what lies beyond the end is of others
    for line, row in zip(tokens, rows, strict=True):
        prompt, output, _ = sequences[row]
        line[: len(prompt) + len(output)] = torch.tensor(prompt + output, dtype=torch.int32)
    lengths = torch.tensor([(len(sequences[row][0]), len(sequences[row][1])) for row in rows], dtype=torch.int64)
    first, last = lengths[:, 0], lengths.sum(1)
    columns = torch.tensor([sequences[row][2] for row in rows])
    bias = (torch.tensor([rows[0]]), torch.tensor([3]), torch.tensor([0.75]))
    banned = (torch.tensor([0]), torch.tensor([5]))
    expected = logits.clone()
    for row in rows:
        for token in range(VOCAB):
            expected[row, token] = penalised(float(logits[row, token]), token, *sequences[row])
    expected[rows[0], 3] += 0.75
    expected[0, 5] = float("-inf")
    penalties = Penalties(torch.tensor(rows), tokens, first, last, columns[:, 0], columns[:, 1], columns[:, 2])
    at_once, sample.DRAW_ELEMENTS = sample.DRAW_ELEMENTS, data.draw(st.sampled_from([1, 2 * VOCAB, 5 * VOCAB, 1 << 24]))
    try:
        torch.testing.assert_close(adjust(logits, Adjustments(penalties, bias, banned)), expected)
    finally:
        sample.DRAW_ELEMENTS = at_once
