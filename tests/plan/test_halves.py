"""A step splits, whatever it is: the halves are the part, in order, and the rule is one for all of them."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given

from plan.fake import World, request
from tessera.core.errors import ConfigError
from tessera.plan.halves import cut
from tessera.plan.scheduler import PlannerConfig
from tessera.plan.step import Change, Part, Step, empty_part, ints

CHANGE = Change(leave=ints([99]))


def part(*lengths: int, logits: tuple[int, ...] = (), samples: tuple[bool, ...] = ()) -> Part:
    """A part of ranges of these lengths, in rows counted down, with starts of their own."""
    rows = ints(range(len(lengths) + 5, 5, -1))
    return Part(
        rows, rows * 10, ints(lengths), ints(logits or lengths), np.array(samples or [True] * len(lengths)), CHANGE
    )


@st.composite
def parts(draw: st.DrawFn) -> Part:
    """Prompts first, ranges of a few tokens or of one after them; each kind may be missing."""
    lengths = draw(st.lists(st.integers(2, 300), max_size=4))
    lengths += draw(st.lists(st.just(draw(st.integers(2, 5))), max_size=5)) + [1] * draw(st.integers(0, 5))
    if not lengths:
        return empty_part(CHANGE)
    logits = tuple(draw(st.sampled_from([0, 1, n // 2, n])) for n in lengths)
    return part(*lengths, logits=logits, samples=tuple(k > 0 and draw(st.booleans()) for k in logits))


def tokens(*halves: Part) -> list[tuple[int, int]]:
    """(row, position) of every token, in order."""
    columns = [zip(h.rows.tolist(), h.starts.tolist(), h.lengths.tolist(), strict=True) for h in halves]
    return [(row, start + i) for column in columns for row, start, length in column for i in range(length)]


def logits(*halves: Part) -> list[tuple[int, int]]:
    """(row, position) of every token that needs logits, in order."""
    return tokens(*(Part(h.rows, h.starts + h.lengths - h.num_logits, h.num_logits, *[h.samples] * 2) for h in halves))


def draws(*halves: Part) -> list[int]:
    """Rows that draw a token, in order."""
    return [row for h in halves for row in h.rows[h.samples].tolist()]


@given(parts(), st.floats(0, 1))
@example(empty_part(CHANGE), 0.0)
@example(part(1), 0.0)
@example(part(1), 1.0)
@example(part(7), 0.5)
def test_the_halves_are_the_part_in_order(whole: Part, where: float) -> None:
    at = round(where * whole.num_tokens)
    first, second = whole.split(at)
    assert first.num_tokens == at
    assert tokens(first, second) == tokens(whole)
    assert logits(first, second) == logits(whole)
    assert draws(first, second) == draws(whole)
    assert (first.change, second.change.empty) == (whole.change, True)
    for half in (first, second):
        assert (half.lengths > 0).all()
        assert (half.num_logits <= half.lengths).all()
        assert len({len(c) for c in (half.rows, half.starts, half.lengths, half.num_logits, half.samples)}) == 1


@given(parts(), st.sampled_from([0.0, 0.3, 0.48, 0.5]), st.sampled_from([1, 3, 64]))
def test_the_rule_is_total_and_as_even_as_it_may_be(whole: Part, share: float, grain: int) -> None:
    found, total = cut(whole, share, grain), whole.num_tokens
    ends = [0, *np.cumsum(whole.lengths).tolist()]
    before = max(i for i, end in enumerate(ends) if end <= found)  # ranges that are half A's whole
    inside = found - ends[before]
    uneven = [abs(2 * at - total) for at in ends]
    assert 0 <= found <= total
    assert abs(2 * found - total) <= min(uneven)
    if inside:
        assert (inside % grain, whole.lengths[before] > grain) == (0, True)
        assert (total - min(uneven)) / 2 < share * total, "cut inside where a boundary would have done"
    elif total and (total - min(uneven)) / 2 < share * total and grain == 1:
        assert min(uneven) <= 1, "not cut inside though no boundary is good enough"


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((), 0),  # idle
        ((1,), 0),  # one token: one half is empty
        ((1,) * 7, 3),  # decodes, by sequences
        ((4,) * 5, 8),  # drafts to verify: by sequences, though 8 of 20 is less than the share
        ((256, 256), 256),  # prompts at a boundary that is good enough
        ((250, 256), 250),
        ((500, 4), 256),  # inside the long one
        ((200, 1, 1, 1), 128),  # mixed
        ((64, 1), 64),  # no longer than the grain
    ],
)
def test_where_parts_are_cut(lengths: tuple[int, ...], expected: int) -> None:
    assert cut(part(*lengths) if lengths else empty_part(), 0.48, 64) == expected


def test_a_share_of_nothing_never_cuts_inside() -> None:
    assert cut(part(500, 4), 0.0, 64) == 500


def test_a_step_is_split_on_all_ranks_or_on_none() -> None:
    world = World(PlannerConfig(2, 50, 4, 40, num_dp=3, split_from=6, split_grain=1))
    world.submit(request("long", [1, 2, 3, 4, 1, 2, 3], 2, ignore_eos=True))
    world.submit(request("short", [1], 1))
    world.finish()
    assert [step.cuts for step in world.steps] == [(3, 0, 0), ()]
    first, second = world.steps[0].halves
    assert [p.num_tokens for p in first.parts + second.parts] == [3, 0, 0, 4, 1, 0]
    assert world.steps[1].halves == (world.steps[1],)


def test_halves_of_a_whole_step_are_the_step() -> None:
    step = Step(3, (part(4), empty_part()))
    assert step.halves == (step,)


@pytest.mark.parametrize("wrong", [{"split_share": 0.6}, {"split_share": -0.1}, {"split_grain": 0}, {"split_from": -1}])
def test_a_bad_rule_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        PlannerConfig(2, 50, 4, 40, **wrong)  # type: ignore[arg-type]
