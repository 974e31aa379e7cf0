"""Sampling as a pure function of logits and parameters. N rows, V vocabulary.

A token is drawn by Gumbel-max: argmax of `logits / temperature + gumbel(seed, position, token id)`. The noise depends
on nothing else, so batching, preemption, a sharded vocabulary, speculation and hand-over keep the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

DRAW_ELEMENTS = 1 << 24  # logits that are penalised or drawn from at once: what that holds would else be gigabytes
DRAW_BYTES = 60  # held at most for each of them, in fp32, while rows are drawn by all filters (`draw_reference`);
# what penalties hold for them is less
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


@dataclass(frozen=True, slots=True)
class Rows:
    """What some rows of the logits ask for: all tensors are of these M rows, of which `rows` says which they are."""

    rows: Tensor  # [M] int64

    def part(self, rows: Tensor | slice) -> Self:
        """Those of some of its rows."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: c[rows] for name, c in columns.items() if isinstance(c, Tensor)})

    def blocks(self, vocab_size: int) -> Iterator[Self]:
        """All its rows in turn, as many at once as have `DRAW_ELEMENTS` logits together."""
        size = max(DRAW_ELEMENTS // vocab_size, 1)
        for first in range(0, len(self.rows), size):
            yield self.part(slice(first, first + size))


@dataclass(frozen=True, slots=True)
class Penalties(Rows):
    """What rows have said and shall not say again. The prompt ends at position `first`, the output at `last`."""

    tokens: Tensor  # [M, L]
    first: Tensor  # [M]
    last: Tensor  # [M]
    presence: Tensor  # [M]
    frequency: Tensor  # [M]
    repetition: Tensor  # [M]


@dataclass(frozen=True, slots=True)
class Adjustments:
    """Changes to the logits before anything is drawn; None where no row asks for it."""

    penalties: Penalties | None = None
    bias: tuple[Tensor, Tensor, Tensor] | None = None  # rows, token ids (int64), values
    banned: tuple[Tensor, Tensor] | None = None  # rows, token ids: end tokens before min_new_tokens


@dataclass(frozen=True, slots=True)
class Drawing(Rows):
    """How tokens are drawn; rows that are not in it are greedy. Filters are None where no row asks for them, which then
    cost nothing."""

    temperature: Tensor  # > 0
    seeds: Tensor  # int64
    positions: Tensor  # int64, position of the token that is drawn
    top_k: Tensor | None = None  # int64; -1 (or V and more) is off
    top_p: Tensor | None = None
    min_p: Tensor | None = None
    max_top_k: int = 0  # the largest top_k when every row has one, else 0


def token_counts(tokens: Tensor, first: Tensor, last: Tensor, vocab_size: int) -> Tensor:
    """How often each token is at positions `first <= p < last`: tokens [M, L], first and last [M] -> [M, V] fp32."""
    at = torch.arange(tokens.shape[1], device=tokens.device)
    inside = (at >= first[:, None]) & (at < last[:, None])
    counts = torch.zeros(len(tokens), vocab_size, dtype=torch.float32, device=tokens.device)
    return counts.scatter_add_(1, tokens.long().clamp(0, vocab_size - 1), inside.to(counts.dtype))


def adjust(logits: Tensor, adjustments: Adjustments) -> Tensor:
    """Penalties, then logit bias, then bans; in place on logits [N, V], which it returns.

    Repetition (prompt and output) divides positive and multiplies negative logits; presence and frequency (output only)
    are subtracted.
    """
    if adjustments.penalties is not None:
        for part in adjustments.penalties.blocks(logits.shape[1]):
            logits[part.rows] = _penalised(logits[part.rows], part)
    if adjustments.bias is not None:
        rows, ids, values = adjustments.bias
        logits.index_put_((rows, ids), values.to(logits.dtype), accumulate=True)
    if adjustments.banned is not None:
        logits[adjustments.banned] = float("-inf")
    return logits


def _penalised(logits: Tensor, p: Penalties) -> Tensor:
    seen = token_counts(p.tokens, torch.zeros_like(p.last), p.last, logits.shape[1]) > 0
    factor = torch.where(seen, p.repetition[:, None], 1.0).to(logits.dtype)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    counts = token_counts(p.tokens, p.first, p.last, logits.shape[1])
    minus = counts * p.frequency[:, None] + (counts > 0) * p.presence[:, None]
    return logits - minus.to(logits.dtype)


def _mix(z: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014) on int64, which wraps as uint64 does."""
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift: the sign is not dragged along."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def gumbel(seeds: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, in the shape that int64 `seeds`, `positions` and `ids` broadcast to.

    Element by element a pure function of (seed, position, token id): splitmix64 started from a mix of the first two.
    """
    key = _mix(_mix(seeds + _GOLDEN) + positions * _MIX_1 + _GOLDEN)
    bits = _shift(_mix(key + (ids + 1) * _GOLDEN), 11)
    # u in (0, 1) is exact near 0, where -log1p(-u) is small and the noise large: the tail that decides is not coarse.
    u = (bits.to(torch.float64) + 0.5) * 2.0**-53
    return -torch.log(-torch.log1p(-u))


def keep_mask(scaled: Tensor, probs: Tensor | None, drawing: Drawing) -> Tensor:
    """Which of the tokens top-k, top-p and min-p leave: bool [M, C] for the C likeliest tokens, *sorted* descending.

    `scaled`: their logits; `probs`: their probabilities among all tokens, where top-p or min-p asks. All three look at
    the distribution before any of them (SGLang's joint order). The likeliest token always stays.
    """
    keep = torch.ones_like(scaled, dtype=torch.bool)
    rank = torch.arange(scaled.shape[1], device=scaled.device)
    if drawing.top_k is not None:
        keep &= (rank < drawing.top_k[:, None]) | (drawing.top_k[:, None] <= 0)
    if drawing.top_p is not None:
        assert probs is not None
        # The sum may round to more than 1; a row that asks for no top-p loses nothing all the same.
        keep &= (probs.cumsum(-1) - probs <= drawing.top_p[:, None]) | (drawing.top_p[:, None] >= 1)
    if drawing.min_p is not None:
        assert probs is not None
        keep &= probs >= drawing.min_p[:, None] * probs[:, :1]
    keep[:, 0] = True
    return keep


def scaled_rows(logits: Tensor, drawing: Drawing) -> Tensor:
    """[M, V]: the logits of the drawn rows over their temperatures."""
    return logits[drawing.rows] / drawing.temperature[:, None].to(logits.dtype)


def probabilities(scaled: Tensor, drawing: Drawing) -> Tensor | None:
    """[M, V] where a filter asks for them."""
    return None if drawing.top_p is None and drawing.min_p is None else scaled.softmax(-1)


def choose(scaled: Tensor, probs: Tensor | None, ids: Tensor, drawing: Drawing, valid: Tensor | None = None) -> Tensor:
    """One token of each row, int64 [M], from candidates sorted descending [M, C]; `valid`: which are candidates."""
    keep = keep_mask(scaled, probs, drawing)
    if valid is not None:
        keep &= valid
    scores = scaled + gumbel(drawing.seeds[:, None], drawing.positions[:, None], ids)
    best = scores.masked_fill_(~keep, float("-inf")).argmax(-1, keepdim=True)
    return ids.gather(1, best)[:, 0]


def draw_reference(logits: Tensor, drawing: Drawing | None) -> Tensor:
    """Tokens int64 [N] drawn from adjusted logits [N, V]; None: every row is greedy (ties go to the lowest id)."""
    tokens = logits.argmax(-1)
    if drawing is not None:
        for part in drawing.blocks(logits.shape[1]):
            tokens[part.rows] = _drawn(logits, part)
    return tokens


def _drawn(logits: Tensor, drawing: Drawing) -> Tensor:
    scaled = scaled_rows(logits, drawing)
    probs = probabilities(scaled, drawing)
    ordered, ids = scaled.sort(dim=-1, descending=True, stable=True)
    return choose(ordered, None if probs is None else probs.gather(1, ids), ids, drawing)


def token_logprobs(logits: Tensor, ids: Tensor, top_n: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logprobs of tokens: logits [N, V], ids [N] or [N, A] -> those of `ids` (same shape), the `top_n` best [N, n] and
    their ids."""
    total = logits.logsumexp(-1, keepdim=True)
    own = logits.gather(1, ids.view(len(ids), -1)) - total
    best, best_ids = logits.topk(top_n, -1)
    return own.view(ids.shape), best - total, best_ids
