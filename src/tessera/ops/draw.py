"""Drawing tokens on a CPU without sorting the vocabulary. N rows, M of them drawn, V vocabulary, C candidates.

The same tokens as `sample.draw_reference`, whatever the ties: what is skipped cannot be drawn, and the noise of a token
is the same function of (seed, position, id) wherever it is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.ops.sample import Drawing, choose, draw_reference, gumbel, probabilities, scaled_rows

CANDIDATES = 1024  # rows whose filters leave more than this many tokens are sorted


def draw(logits: Tensor, drawing: Drawing | None) -> Tensor:
    """See `sample.draw_reference`. On a device it is that: how many candidates there are is only known there."""
    if logits.device.type != "cpu":
        return draw_reference(logits, drawing)
    tokens = logits.max(-1).indices  # the first of equal ones, as argmax, three times as fast
    if drawing is not None:
        scaled = scaled_rows(logits, drawing)
        tokens[drawing.rows] = _drawn(scaled, probabilities(scaled, drawing), drawing)
    return tokens


def _drawn(scaled: Tensor, probs: Tensor | None, drawing: Drawing) -> Tensor:
    """Tokens [M]: rows that a rank or a mass limits by their likeliest tokens, the others as they lie."""
    limited = torch.zeros(len(scaled), dtype=torch.bool)
    if drawing.top_k is not None:
        limited |= (drawing.top_k > 0) & (drawing.top_k < scaled.shape[1])
    if drawing.top_p is not None:
        limited |= drawing.top_p < 1
    out = torch.empty(len(scaled), dtype=torch.int64)
    for rows, among in ((limited.nonzero()[:, 0], _among_likeliest), ((~limited).nonzero()[:, 0], _among_all)):
        if len(rows) == len(scaled):
            return among(scaled, probs, drawing)
        if len(rows):
            out[rows] = among(scaled[rows], None if probs is None else probs[rows], drawing.part(rows))
    return out


def _among_all(scaled: Tensor, probs: Tensor | None, drawing: Drawing) -> Tensor:
    """Rows without a limit, in the order of ids. min-p needs no order: it compares with the largest."""
    scores = scaled + gumbel(drawing.seeds[:, None], drawing.positions[:, None], torch.arange(scaled.shape[1]))
    if drawing.min_p is not None:
        assert probs is not None
        scores.masked_fill_(probs < drawing.min_p[:, None].clamp(max=1) * probs.amax(-1, keepdim=True), float("-inf"))
    return scores.max(-1).indices


def _among_likeliest(scaled: Tensor, probs: Tensor | None, drawing: Drawing) -> Tensor:
    """Rows with a limit: enough of the likeliest tokens, sorted; rows for which they are not enough, all sorted."""
    values, ids, counts = likeliest(scaled, min(drawing.max_top_k or CANDIDATES, CANDIDATES, scaled.shape[1]))
    valid = torch.arange(values.shape[1]) < counts[:, None]
    own = None if probs is None else probs.gather(1, ids)
    tokens, complete = choose(values, own, ids, drawing, valid), counts >= scaled.shape[1]
    if drawing.top_k is not None:
        complete |= (drawing.top_k > 0) & (drawing.top_k <= counts)
    if drawing.top_p is not None:
        assert own is not None
        before = (own.cumsum(-1) - own).gather(1, counts[:, None] - 1)[:, 0]
        complete |= (before > drawing.top_p) & (drawing.top_p < 1)
    left = (~complete).nonzero()[:, 0]
    if len(left):
        ordered, order = scaled[left].sort(dim=-1, descending=True, stable=True)
        own = None if probs is None else probs[left].gather(1, order)
        tokens[left] = choose(ordered, own, order, drawing.part(left))
    return tokens


def likeliest(scaled: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(values, ids [M, C], how many of them [M]): each row's first elements in the order of a stable descending sort.

    At least `count`, and all that tie with the last of these: which of them `topk` returns is not defined.
    """
    least = scaled.topk(count, -1).values[:, -1:]
    rows, ids = (scaled >= least).nonzero(as_tuple=True)
    counts = rows.bincount(minlength=len(scaled))
    place = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    values = scaled.new_full((len(scaled), int(counts.max())), float("-inf"))
    values[rows, place] = scaled[rows, ids]
    of = torch.zeros(values.shape, dtype=torch.int64)
    of[rows, place] = ids
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values, of.gather(1, order), counts
