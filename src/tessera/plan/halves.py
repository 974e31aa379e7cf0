"""Where a step is cut in two, so that one half computes while the other waits on the wire (two-batch overlap).

One rule for every part, asked in one place: the planner asks it once for all ranks and writes the answer into the step,
so ranks cannot disagree. It looks at lengths alone, and knows no kinds of steps.

A cut may fall inside one sequence, between halves A and B. B's tokens then attend to keys that A writes in the same
layer, and B's recurrent state goes on from A's. So whoever runs the halves must run each stage of A before the same
stage of B (of each layer: A's part before B's part). Nothing more is needed: A never reads what B writes, since ranges
keep their order and a range's first tokens are A's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tessera.plan.step import Part


def cut(part: Part, share: float, grain: int) -> int:
    """How many tokens of a part are half A: between two ranges as near the middle as can be; of two equally near the
    first.

    Where the smaller half would have less than `share` of the tokens (0: never) the range in the middle is cut inside
    if that is nearer, at a multiple of `grain` tokens from its start, where the chunks of recurrent layers end anyway.
    So ranges of up to `grain` tokens (decodes, drafts to verify) are never cut inside. A part of no ranges is cut at 0.
    """
    if not len(part.lengths):
        return 0
    ends = np.cumsum(part.lengths)
    total = int(ends[-1])
    middle = int(np.searchsorted(2 * ends, total))
    end = int(ends[middle])
    begin = end - int(part.lengths[middle])
    at = _nearest(total, begin, end)
    if min(at, total - at) < share * total:
        below = begin + (total // 2 - begin) // grain * grain
        at = _nearest(total, at, *(token for token in (below, below + grain) if begin < token < end))
    return at


def cuts(parts: Sequence[Part], share: float, grain: int) -> tuple[int, ...]:
    """Tokens of each part's first half (see `cut`)."""
    return tuple(cut(part, share, grain) for part in parts)


def _nearest(total: int, *tokens: int) -> int:
    return min(tokens, key=lambda token: (abs(2 * token - total), token))
