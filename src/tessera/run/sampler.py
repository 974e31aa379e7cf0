"""Sampling as a launch of its own, after the forward: what the drawn positions ask for, drawing, and logprobs.

`plan_draws` and `plan_prompt_scores` run on the host when a step is launched and say exactly what the device has to do,
so that a step of plain greedy rows is one argmax; `Sampler` runs on the device and never waits for it. Logprobs are the
model's own: of the logits before penalties, bias, temperature and filters. N drawn positions, M of them, A asked ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.core.config.needs import Sketch
from tessera.core.tensors import DTYPE_BYTES, wide_dtype
from tessera.ops.sample import (
    DRAW_BYTES,
    DRAW_ELEMENTS,
    Adjustments,
    Drawing,
    Penalties,
    adjust,
    token_logprobs,
)
from tessera.ops.upload import upload
from tessera.run.batch import Wanted
from tessera.run.rowparams import BIAS, DRAW, LOGPROB, MIN_NEW, MIN_P, PENALTY, TOP_K, TOP_P, RowParams
from tessera.run.table import RowTable, Sequence

BLOCK_ELEMENTS = 1 << 25  # logits of prompt positions at a time: 128 MB in float32

SCORED = 16  # bytes that scoring them takes for each

Longs = NDArray[np.int64]
ToLogits = Callable[[Tensor, tuple[int, ...]], Tensor]


def draw_bytes(sketch: Sketch) -> int:
    """Bytes of what a step holds from the product with the head on, when every row draws and asks for all filters:
    logits as the product gives them, as they come together and as they are, in fp32 or wider; then the drawing
    of a block of rows, which takes more than its penalties, or the scores of a block of prompt positions."""
    logits, wide = sketch.rows * sketch.spec.vocab_size, DTYPE_BYTES[wide_dtype(sketch.dtype)]
    block = min(logits, max(DRAW_ELEMENTS, sketch.spec.vocab_size))
    after = max(block * DRAW_BYTES, BLOCK_ELEMENTS * SCORED)
    return logits * (3 * sketch.element + wide) + after


@dataclass(frozen=True, slots=True)
class Scores:
    """Logprobs wanted: of which rows (host and device), how many of the likeliest, further ids [M, A]."""

    host_rows: Longs
    rows: Tensor
    top_n: int
    asked: Tensor


@dataclass(frozen=True, slots=True)
class DrawPlan:
    """What a step's drawn positions ask for; None where no row does."""

    drawn: Tensor | None = None  # rows that are not greedy
    filters: int = 0
    max_top_k: int = 0
    penalised: Tensor | None = None
    longest: int = 0  # tokens that the penalised rows look back on
    bias: tuple[Tensor, Tensor, Tensor] | None = None
    banned: tuple[Tensor, Tensor] | None = None
    scores: Scores | None = None


GREEDY = DrawPlan()


def plan_draws(
    draws: Wanted, sequences: Seq[Sequence], table: RowTable, params: RowParams, device: torch.device
) -> DrawPlan:
    """What the drawn positions ask for."""
    flags = params.flags[draws.host_rows]
    needs = int(np.bitwise_or.reduce(flags, initial=0))
    if not needs:
        return GREEDY

    def rows(flag: int) -> Longs:
        return np.flatnonzero(flags & flag)

    def device_rows(flag: int) -> Tensor | None:
        return upload(rows(flag), device) if needs & flag else None

    top_k = params.top_k[draws.host_rows[rows(DRAW)]]
    return DrawPlan(
        drawn=device_rows(DRAW),
        filters=needs & (TOP_K | TOP_P | MIN_P),
        max_top_k=int(top_k.max()) if len(top_k) and top_k.min() > 0 else 0,
        penalised=device_rows(PENALTY),
        longest=int(draws.host_positions[rows(PENALTY)].max(initial=0)),
        bias=_bias(((i, sequences[i]) for i in rows(BIAS)), device) if needs & BIAS else None,
        banned=_banned(rows(MIN_NEW), draws, sequences, table, device) if needs & MIN_NEW else None,
        scores=plan_draw_scores(rows(LOGPROB), sequences, device) if needs & LOGPROB else None,
    )


def _bias(biased: Iterable[tuple[int, Sequence]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    entries = [(i, token, value) for i, sequence in biased for token, value in sequence.params.logit_bias.items()]
    columns = np.array(entries, np.float64).reshape(-1, 3).T
    rows, ids = (upload(np.ascontiguousarray(c, np.int64), device) for c in columns[:2])
    return rows, ids, upload(np.ascontiguousarray(columns[2], np.float32), device)


def _banned(
    rows: Longs, draws: Wanted, sequences: Seq[Sequence], table: RowTable, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Tokens that would end a row before its `min_new_tokens`."""
    entries = [
        (i, token)
        for i in rows.tolist()
        if draws.host_positions[i] < sequences[i].num_prompt + sequences[i].params.min_new_tokens
        for token in table.ends[sequences[i].row]
    ]
    if not entries:
        return None
    columns = upload(np.array(entries, np.int64).T.copy(), device)
    return columns[0], columns[1]


def plan_draw_scores(rows: Longs, sequences: Seq[Sequence], device: torch.device) -> Scores:
    """The logprobs that these of the drawn rows ask for."""
    wanting = [sequences[i].params for i in rows]
    asked = _padded([p.token_ids_logprob for p in wanting])
    return Scores(rows, upload(rows, device), max(p.logprobs for p in wanting), upload(asked, device))


def plan_prompt_scores(sequences: Seq[Sequence], device: torch.device) -> Scores:
    """The logprobs that prompt positions ask for; `sequences`: whose each position is."""
    rows = np.arange(len(sequences))
    asked = _padded([s.params.token_ids_logprob for s in sequences])
    top_n = max((s.params.prompt_logprobs for s in sequences), default=0)
    return Scores(rows, upload(rows, device), max(top_n, 0), upload(asked, device))


def _padded(asked: Seq[tuple[int, ...]]) -> Longs:
    """Ids as a matrix, short rows filled with token 0 (the reader cuts them off)."""
    width = max((len(ids) for ids in asked), default=0)
    matrix = np.zeros((len(asked), width), np.int64)
    for row, ids in zip(matrix, asked, strict=True):
        row[: len(ids)] = ids
    return matrix


@dataclass(frozen=True, slots=True)
class Sampler:
    """Draws tokens on the device. `draw(logits, drawing)` is the backend's op."""

    table: RowTable
    params: RowParams
    draw_op: Callable[[Tensor, Drawing | None], Tensor]

    def draw(self, logits: Tensor, draws: Wanted, plan: DrawPlan) -> list[Tensor]:
        """Tokens [N] of logits [N, V] (which are overwritten), then what `plan.scores` asks for (see `score`)."""
        scores = plan.scores
        raw = logits[scores.rows] if scores is not None else None
        adjust(logits, Adjustments(self._penalties(draws, plan), plan.bias, plan.banned))
        tokens = self.draw_op(logits, self._drawing(draws, plan))
        if scores is None or raw is None:
            return [tokens]
        return [tokens, *score(raw, tokens[scores.rows], scores)]

    def score_prompts(
        self, hidden: Tensor, to_logits: ToLogits, prompts: Wanted, scores: Scores | None, vocab_size: int
    ) -> list[Tensor]:
        """Logprobs of the prompt tokens that `hidden` [M, hidden] predicts, a block of positions at a time.

        `scores` None: only other DP ranks have positions to score, and wait for this one's part of the logits.
        """
        tokens = self.table.tokens[prompts.rows, prompts.positions].long()
        size = max(1, BLOCK_ELEMENTS // vocab_size)
        blocks = []
        for at in range(0, max(prompts.counts), size):
            block = slice(at, at + size)
            logits = to_logits(hidden[block], tuple(min(max(count - at, 0), size) for count in prompts.counts))
            if scores is not None and at < len(prompts):
                part = Scores(scores.host_rows[block], scores.rows[block], scores.top_n, scores.asked[block])
                blocks.append(score(logits, tokens[block], part))
        return [torch.cat(columns) for columns in zip(*blocks, strict=True)]

    def _penalties(self, draws: Wanted, plan: DrawPlan) -> Penalties | None:
        if plan.penalised is None:
            return None
        rows = draws.rows[plan.penalised]
        floats, integers = self.params.floats[rows], self.params.integers[rows]
        return Penalties(
            rows=plan.penalised,
            tokens=self.table.tokens[rows, : plan.longest],
            first=integers[:, 2],
            last=draws.positions[plan.penalised],
            presence=floats[:, 3],
            frequency=floats[:, 4],
            repetition=floats[:, 5],
        )

    def _drawing(self, draws: Wanted, plan: DrawPlan) -> Drawing | None:
        if plan.drawn is None:
            return None
        rows = draws.rows[plan.drawn]
        floats, integers = self.params.floats[rows], self.params.integers[rows]
        return Drawing(
            rows=plan.drawn,
            temperature=floats[:, 0],
            seeds=integers[:, 1],
            positions=draws.positions[plan.drawn].long(),
            top_k=integers[:, 0] if plan.filters & TOP_K else None,
            top_p=floats[:, 1] if plan.filters & TOP_P else None,
            min_p=floats[:, 2] if plan.filters & MIN_P else None,
            max_top_k=plan.max_top_k,
        )


def score(logits: Tensor, tokens: Tensor, scores: Scores) -> list[Tensor]:
    """[logprobs [M, 1 + A] of the tokens and the asked ids, the likeliest [M, n], their ids [M, n]]."""
    own, best, best_ids = token_logprobs(logits, torch.cat((tokens[:, None], scores.asked), 1), scores.top_n)
    return [own, best, best_ids]
