"""A step: what all ranks run once, as a value.

A step gives each sequence a range of tokens. Decode is a range of 1, a chunk is n, verifying k drafts is k + 1, an idle
rank has no ranges. Sequences live in rows of a row table that every rank mirrors; a step carries only the difference
(rows that enter or leave, pages that were added, copies) and the ranges. There is no mode: `label` is for logs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from tessera.core.messages import SamplingParams

Ints = NDArray[np.int32]
Bools = NDArray[np.bool_]


def ints(values: object = ()) -> Ints:
    """A one-dimensional int32 array."""
    return np.asarray(values, dtype=np.int32)


NO_INTS = ints()
NO_PAIRS = np.zeros((0, 2), np.int32)
NO_TRIPLES = np.zeros((0, 3), np.int32)


class Enter(msgspec.Struct, frozen=True, eq=False, gc=False):
    """A sequence enters row `row`: its known tokens (prompt, and what was generated before a preemption), pages, slot.

    `start`: position that its first range starts at; what lies before is in the pages (and in the slot) already.
    `slot` is -1 for models without recurrent state. `num_prompt` of the tokens are the prompt, `num_cached` of those
    came from the prefix cache when the sequence first entered. `arrived`: a prefill server computed it up to `start`.
    `leaves`: a decode server goes on with it, and tells what is drawn here.
    """

    row: int
    request_id: str
    choice: int
    tokens: Ints
    num_prompt: int
    start: int
    pages: Ints
    slot: int
    params: SamplingParams
    seed: int
    num_cached: int = 0
    arrived: bool = False
    leaves: bool = False


@dataclass(frozen=True, slots=True)
class Change:
    """The difference between the row table before a step and at it, applied in the order of the fields.

    `pages`: triples (row, index in the row's page table, page). `page_copies`, `slot_copies`: pairs (source,
    destination) in the pools; all sources are read before any range of the step is written. `zero_slots`: slots that
    start from nothing.
    """

    leave: Ints = field(default_factory=lambda: NO_INTS)
    enter: tuple[Enter, ...] = ()
    pages: Ints = field(default_factory=lambda: NO_TRIPLES)
    page_copies: Ints = field(default_factory=lambda: NO_PAIRS)
    slot_copies: Ints = field(default_factory=lambda: NO_PAIRS)
    zero_slots: Ints = field(default_factory=lambda: NO_INTS)

    @property
    def empty(self) -> bool:
        """Nothing differs."""
        return not (
            self.enter
            or len(self.leave)
            or len(self.pages)
            or len(self.page_copies)
            or len(self.slot_copies)
            or len(self.zero_slots)
        )


NO_CHANGE = Change()


class Send(msgspec.Struct, frozen=True, eq=False, gc=False):
    """Pages, and perhaps a slot (else -1), of a prompt that a decode server is to have once the step has computed them.

    Written by every rank of the DP rank to DP rank `dp_rank` of `peer`: `pages` to `to_pages`, `slot` to `to_slot`.
    `key`: whose (see `handoff.py`). `last`: nothing follows. What it names stays as it is until all have reported.
    """

    key: int
    ticket: int
    peer: str
    dp_rank: int
    pages: Ints
    to_pages: Ints
    slot: int = -1
    to_slot: int = -1
    last: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """One DP rank's share of a step: parallel columns, one entry per range.

    Range i computes tokens `starts[i] .. starts[i] + lengths[i] - 1` of the sequence in `rows[i]`. The last
    `num_logits[i]` of them need logits. `samples[i]`: the range ends at the last known token, so a token is drawn.
    Longer ranges come first, ranges of one token last, so prefill rows precede riding decodes. `sends` belong to the
    step as a whole: they are not in its halves.
    """

    rows: Ints
    starts: Ints
    lengths: Ints
    num_logits: Ints
    samples: Bools
    change: Change = NO_CHANGE
    sends: tuple[Send, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of all ranges."""
        return int(self.lengths.sum())

    def split(self, at: int) -> tuple[Part, Part]:
        """Two parts whose ranges together are this one's: the first `at` tokens, and the rest.

        Total for every part and every `0 <= at <= num_tokens`, also inside one range; either half may be empty. The
        change goes with the first half, which runs first at every layer. Logits stay with the positions they belong to.
        """
        assert 0 <= at <= self.num_tokens, f"cannot split {self.num_tokens} tokens at {at}"
        ends = np.cumsum(self.lengths, dtype=np.int32)
        in_first = np.clip(at - (ends - self.lengths), 0, self.lengths).astype(np.int32)
        in_second = (self.lengths - in_first).astype(np.int32)
        logits_second = np.minimum(self.num_logits, in_second).astype(np.int32)
        first = self._cut(in_first > 0, self.starts, in_first, self.num_logits - logits_second, in_second == 0)
        second = self._cut(in_second > 0, self.starts + in_first, in_second, logits_second, in_second > 0)
        return Part(*first, change=self.change), Part(*second)

    def _cut(
        self, keep: Bools, starts: Ints, lengths: Ints, logits: Ints, ends_here: Bools
    ) -> tuple[Ints, Ints, Ints, Ints, Bools]:
        return self.rows[keep], starts[keep], lengths[keep], logits[keep], (self.samples & ends_here)[keep]


def empty_part(change: Change = NO_CHANGE) -> Part:
    """The part of a rank with nothing to compute."""
    return Part(NO_INTS, NO_INTS, NO_INTS, NO_INTS, np.zeros(0, np.bool_), change)


@dataclass(frozen=True, slots=True)
class Step:
    """What all ranks run once: one part per DP rank. `index` counts steps (the epoch of the row table).

    `cuts`: tokens of each part's first half where the step is to run as two (see `halves`); empty: it runs whole.
    """

    index: int
    parts: tuple[Part, ...]
    cuts: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of all parts."""
        return sum(part.num_tokens for part in self.parts)

    @property
    def halves(self) -> tuple[Step, ...]:
        """The steps that this one runs as: two halves on every rank, or itself. What they draw is in this one's order.

        The change belongs to the first, and is applied before either begins.
        """
        if not self.cuts:
            return (self,)
        pairs = [part.split(at) for part, at in zip(self.parts, self.cuts, strict=True)]
        return Step(self.index, tuple(a for a, _ in pairs)), Step(self.index, tuple(b for _, b in pairs))


@dataclass(frozen=True, slots=True)
class PartDone:
    """What a DP rank saw of its part: for each sampling range, in order, its row, the tokens drawn, and how it ended.

    `tokens`: int32 [num sampling ranges, up to 1 + num_draft], -1 where nothing was accepted. `finished`: row ended
    (EOS, stop token or length) and must not be planned again.
    """

    rows: Ints
    tokens: Ints
    finished: Bools


class StepDone(msgspec.Struct, tag=True, frozen=True, eq=False):
    """A step came back from all ranks."""

    index: int
    parts: tuple[PartDone, ...]


class Clock(msgspec.Struct, tag=True, frozen=True):
    """The time is `now` (seconds, any origin, never backwards): the only way time reaches the planner."""

    now: float
