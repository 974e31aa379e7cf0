"""The matrix as plain data: its axes, its points, which of them must be refused, and covers of it by few points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, product
from random import Random
from typing import Any

Refusal = tuple[str, str]  # the flags of both sides


@dataclass(frozen=True)
class Point:
    """One way to serve. `attn` and `dp`: ranks of a group of the attention, and groups; `dense`: all ranks share a
    dense MLP, or each has its own; `travel`: tokens go where their experts are."""

    model: str
    attn: int
    dp: int
    ep: int
    dense: str
    lm_head: bool
    travel: bool
    mixed: bool
    overlap: bool
    chunk: int

    @property
    def tp(self) -> int:
        """All ranks."""
        return self.attn * self.dp

    @property
    def layout(self) -> tuple[object, ...]:
        """The axes of the ranks."""
        return self.attn, self.dp, self.ep, self.dense, self.lm_head, self.travel

    def flags(self) -> dict[str, Any]:
        """As a user asks for it."""
        asked: dict[str, Any] = {"tp": self.tp, "ep": self.ep, "chunked_prefill_size": self.chunk}
        if self.dense == "1":
            asked["moe_dense_tp_size"] = 1
        if self.dp > 1:
            asked |= {"dp": self.dp, "enable_dp_attention": True}
        if self.overlap:
            asked |= {"enable_two_batch_overlap": True, "tbo_min_tokens": 2}
        if self.travel:
            asked |= {"moe_a2a_padded_tokens": 12}  # steps of decodes travel in one size, others are counted
        switches = {"enable_dp_lm_head": self.lm_head, "enable_mixed_chunk": self.mixed}
        return {**asked, **switches, "moe_a2a_backend": "all_to_all" if self.travel else "none"}

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())


AXES: dict[str, tuple[Any, ...]] = {
    "model": ("random-gqa", "abacus-hybrid", "abacus-mla"),
    "attn": (1, 2, 4),
    "dp": (1, 2, 4),
    "ep": (1, 2, 4),
    "dense": ("tp", "1"),
    "lm_head": (False, True),
    "travel": (False, True),
    "mixed": (False, True),
    "overlap": (False, True),
    "chunk": (7, 64),
}
# Those of few ranks first; else in no order, so that what a cover leaves open is varied all the same.
POINTS = [Point(*values) for values in product(*AXES.values())]
Random(2).shuffle(POINTS)
POINTS.sort(key=lambda point: point.tp)

RULES: tuple[tuple[Callable[[Point], bool], Refusal], ...] = (
    (lambda p: p.tp % p.ep > 0, ("--ep-size", "--tp-size")),
    (lambda p: p.lm_head and p.dp == 1, ("--enable-dp-lm-head", "--enable-dp-attention")),
    (lambda p: p.travel and p.ep == 1, ("--moe-a2a-backend", "--ep-size")),
)


def refusals(point: Point) -> list[Refusal]:
    """The flags that its refusals must name; none: it must run."""
    return [flags for wrong, flags in RULES if wrong(point)]


ACCEPTED = [point for point in POINTS if not refusals(point)]
REFUSED = [point for point in POINTS if refusals(point)]


def cover(rows: Sequence[Sequence[object]], strength: int) -> list[int]:
    """Places of few rows that together show every combination of values of `strength` columns that some row shows.

    Greedy: the row that shows most that is new, of those the first.
    """
    shown = [frozenset(combinations(enumerate(row), strength)) for row in rows]
    left, chosen = frozenset().union(*shown), []
    while left:
        best = max(range(len(rows)), key=lambda i: len(shown[i] & left))
        chosen.append(best)
        left -= shown[best]
    return chosen


def covering(points: Sequence[Point], strength: int) -> list[Point]:
    """A cover of points, those of few ranks first."""
    rows = [tuple(asdict(point).values()) for point in points]
    return sorted((points[i] for i in cover(rows, strength)), key=lambda point: point.tp)


def by_processes() -> list[Point]:
    """Points of the packaged models for ranks that are processes: the model is read by each, so it is in a folder."""
    few = [point for point in ACCEPTED if 1 < point.tp <= 4 and point.model.startswith("abacus")]
    return covering(few, 2)


def layouts() -> list[Point]:
    """Every layout of every model once; the other axes are drawn so that all of their values are met."""
    found: dict[tuple[object, ...], list[Point]] = {}
    for point in ACCEPTED:
        found.setdefault((point.model, *point.layout), []).append(point)
    return [same[i % len(same)] for i, same in enumerate(found.values())]


def features() -> list[Point]:
    """Every combination of what is no layout, and of how tokens meet experts, in one layout of every model."""
    return [p for p in ACCEPTED if (p.attn, p.dp, p.ep, p.dense, p.lm_head) == (1, 2, 2, "tp", False)]
