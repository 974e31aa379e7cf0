"""Drawing: the fast way gives the tokens of the plain one, whatever the filters and ties; the noise is Gumbel's."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from tessera.ops import draw as fast
from tessera.ops import sample as plain
from tessera.ops.draw import draw, likeliest
from tessera.ops.sample import Drawing, draw_reference, gumbel

# How logits are made: with ties everywhere, with ties as bfloat16 makes them, peaked, flat, with banned tokens.
LOGITS = {
    "ties": lambda n, v: torch.randint(0, 3, (n, v)).float(),
    "bfloat16": lambda n, v: (4 * torch.randn(n, v)).bfloat16().float(),
    "peaked": lambda n, v: 30 * torch.randn(n, v),
    "flat": torch.zeros,
    "banned": lambda n, v: torch.randn(n, v).masked_fill(torch.rand(n, v) < 0.97, float("-inf")),
    "float64": lambda n, v: torch.randn(n, v, dtype=torch.float64),
}
FILTERS = {"top_k": [-1, 1, 2, 7, 40, 5000], "top_p": [1.0, 0.05, 0.5, 0.95, 0.9999], "min_p": [0.0, 0.05, 0.5, 1.0]}


def _drawing(rows: list[int], choices: dict[str, list[float]], seed: int) -> Drawing:
    columns = {name: torch.tensor(values) for name, values in choices.items()}
    if (top_p := columns.get("top_p")) is not None:
        columns["top_p"] = top_p.float()
    ranks = choices.get("top_k")
    return Drawing(
        rows=torch.tensor(rows, dtype=torch.int64),
        temperature=torch.tensor([(0.3, 1.0, 1.7)[row % 3] for row in rows]),
        seeds=torch.arange(len(rows)) * 977 + seed,
        positions=torch.arange(len(rows)) * 3 + 5,
        max_top_k=int(max(ranks)) if ranks and min(ranks) > 0 else 0,
        **columns,
    )


@given(st.data())
def test_fast_is_plain(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1 << 16)))
    num_rows, vocab = data.draw(st.integers(1, 6)), data.draw(st.sampled_from([1, 5, 100, 3000]))
    logits = LOGITS[data.draw(st.sampled_from(sorted(LOGITS)))](num_rows, vocab)
    logits[:, 0] = logits[:, 0].clamp(min=-1)  # not everything is banned
    rows = data.draw(st.lists(st.integers(0, num_rows - 1), unique=True))
    used = data.draw(st.sets(st.sampled_from(sorted(FILTERS))))
    size = len(rows)
    choices = {n: data.draw(st.lists(st.sampled_from(FILTERS[n]), min_size=size, max_size=size)) for n in used}
    drawing = _drawing(rows, choices, data.draw(st.integers(0, 1 << 40))) if rows else None
    candidates, fast.CANDIDATES = fast.CANDIDATES, data.draw(st.sampled_from([1, 3, 64, 1024]))
    at_once, plain.DRAW_ELEMENTS = plain.DRAW_ELEMENTS, data.draw(st.sampled_from([1, 200, 6000, 1 << 20]))
    try:
        assert draw(logits, drawing).tolist() == draw_reference(logits, drawing).tolist()
    finally:
        fast.CANDIDATES, plain.DRAW_ELEMENTS = candidates, at_once


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("count", [1, 10, 300])
def test_the_likeliest_are_the_head_of_a_stable_sort(kind: str, count: int) -> None:
    scaled = LOGITS[kind](5, 300)
    values, ids, counts = likeliest(scaled, count)
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    for row, n in enumerate(counts.tolist()):
        assert n >= count
        assert torch.equal(values[row, :n], ordered[row, :n])
        assert torch.equal(ids[row, :n], order[row, :n])


def test_greedy_rows_take_the_first_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    assert draw(logits, None).tolist() == [1, 0]


def test_a_row_draws_the_same_alone_and_among_others() -> None:
    """A row that asks for no filter is not touched by those of its neighbours, down to rounding of their sums."""
    logits = torch.randn(2, 5000).mul(1e-3)
    for seed in range(20):
        alone = draw(logits[:1], _drawing([0], {}, seed))
        for how in (draw, draw_reference):
            both = how(logits, _drawing([0, 1], {"top_p": [1.0, 0.5], "min_p": [0.0, 0.1]}, seed))
            assert both[0] == alone[0]


def test_nothing_filtered_out_is_drawn() -> None:
    logits = torch.randn(1, 50) * 0.2
    best = set(logits[0].topk(5).indices.tolist())
    drawn = {int(draw(logits, _drawing([0], {"top_k": [5]}, seed))[0]) for seed in range(200)}
    assert drawn == best, "all five are drawn, and no other"


def test_tokens_are_drawn_as_often_as_they_should() -> None:
    """Frequencies over 20,000 seeds against the probabilities: chi-square with 7 degrees, 99.9 % below 24.3."""
    logits = torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0, -2.0, 2.0, 1.5])
    count = 20_000
    noise = gumbel(torch.arange(count)[:, None], torch.tensor(17), torch.arange(8))
    found = (logits + noise).argmax(-1).bincount(minlength=8).double()
    expected = logits.double().softmax(-1) * count
    assert float(((found - expected) ** 2 / expected).sum()) < 24.3


def test_noise_is_standard_gumbel_in_every_argument() -> None:
    """Quantiles along seeds, positions and ids: Kolmogorov's distance of 50,000 values, 99.9 % below 1.95 / sqrt(n)."""
    n = 50_000
    at, fixed = torch.arange(n), torch.tensor(3)
    for arguments in ((at, fixed, fixed), (fixed, at, fixed), (fixed, fixed, at)):
        values = gumbel(*arguments)
        assert values.dtype == torch.float64
        assert values.isfinite().all()
        uniform = torch.exp(-torch.exp(-values.sort().values))
        assert float((uniform - (at + 0.5) / n).abs().max()) < 1.95 / math.sqrt(n)
        neighbours = torch.corrcoef(torch.stack((values[:-1], values[1:])))[0, 1]
        assert abs(float(neighbours)) < 4 / math.sqrt(n)


def test_noise_is_splitmix64_of_seed_position_and_id() -> None:
    """Written out in whole numbers: seeds that users keep must draw the same in later versions."""
    golden, one, two, mask = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, (1 << 64) - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * one) & mask
        z = ((z ^ (z >> 27)) * two) & mask
        return z ^ (z >> 31)

    for seed, position, token in ((0, 0, 0), (1, 7, 5), (1 << 62, 100_000, 151_935)):
        key = mix((mix((seed + golden) & mask) + position * one + golden) & mask)
        u = ((mix((key + (token + 1) * golden) & mask) >> 11) + 0.5) * 2.0**-53
        found = gumbel(*(torch.tensor(n) for n in (seed, position, token)))
        assert float(found) == pytest.approx(-math.log(-math.log1p(-u)), abs=1e-12)
