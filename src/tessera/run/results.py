"""From the numbers of a step to outputs: how sequences end, and logprobs as messages."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessera.core.messages import FinishReason, Output, TokenLogprobs
from tessera.plan.step import NO_INTS, Ints, PartDone
from tessera.run.sampler import Scores
from tessera.run.table import RowTable, Sequence

Numbers = Seq[NDArray[Any]]


def token_logprobs_at(scores: Numbers, at: int, top_n: int, num_asked: int) -> TokenLogprobs:
    """Entry `at` of [own and asked, likeliest, their ids], cut to what its request asked for."""
    own, best, best_ids = scores
    return TokenLogprobs(
        float(own[at, 0]),
        best_ids[at, :top_n].tolist(),
        best[at, :top_n].tolist(),
        own[at, 1 : 1 + num_asked].tolist(),
    )


def logprobs_at(scores: Scores | None, numbers: Numbers, drawn: Seq[Sequence]) -> dict[int, list[TokenLogprobs]]:
    """Per drawn position that asked, the logprobs of its token."""
    if scores is None:
        return {}
    entries = {}
    for at, i in enumerate(scores.host_rows.tolist()):
        params = drawn[i].params
        entries[i] = [token_logprobs_at(numbers, at, params.logprobs, len(params.token_ids_logprob))]
    return entries


def note_prompt_scores(scored: Seq[Sequence], positions: Ints, numbers: Numbers) -> None:
    """Appends the scores of the tokens at `positions`, which come in order, to the sequences they are of."""
    for at, (sequence, position) in enumerate(zip(scored, positions.tolist(), strict=True)):
        params = sequence.params
        if position >= sequence.num_prompt:  # the end of a prompt that is only scored predicts no token
            continue
        entry = token_logprobs_at(numbers, at, max(params.prompt_logprobs, 0), len(params.token_ids_logprob))
        sequence.prompt_logprobs.append(entry)


def prompt_logprobs(sequence: Sequence, position: int) -> list[TokenLogprobs] | None:
    """What is owed with the first token drawn, at `position`: the prompt's logprobs from `logprob_start` on.

    The first position of a prompt has no logprob. Choices that were forked computed no prompt and owe nothing.
    """
    params = sequence.params
    if params.prompt_logprobs < 0 or not sequence.fresh or position != sequence.num_prompt or sequence.choice:
        return None
    first = [TokenLogprobs(None)] if params.logprob_start == 0 else []
    entries = first + sequence.prompt_logprobs
    wanted = sequence.num_prompt - params.logprob_start
    assert len(entries) >= wanted, f"{len(entries)} prompt logprobs of {wanted} for {sequence.request_id}"
    return entries[len(entries) - wanted :]


def ending(sequence: Sequence, token: int, known: int, table: RowTable) -> tuple[FinishReason | None, int | None]:
    """(finish reason, the token that ended it) of a sequence that has `known` tokens, `token` being its last."""
    if token in table.ends[sequence.row]:
        return "stop", token
    return ("length" if known >= table.limit[sequence.row] else None), None


def finish(
    table: RowTable,
    drawn: Seq[Sequence],
    positions: Ints,
    tokens: NDArray[np.int64],
    logprobs: dict[int, list[TokenLogprobs]],
) -> tuple[PartDone, list[Output]]:
    """Ends sequences and makes their outputs. What was drawn past an end becomes -1 and has no output."""
    kept = tokens.astype(np.int32)
    finished = np.zeros(len(kept), np.bool_)
    outputs = []
    for i, (sequence, token, position) in enumerate(zip(drawn, tokens.tolist(), positions.tolist(), strict=True)):
        if sequence.ended:
            kept[i] = -1
            continue
        reason, matched = ending(sequence, token, position + 1, table)
        sequence.ended = finished[i] = reason is not None
        outputs.append(
            Output(
                sequence.request_id,
                sequence.choice,
                [token],
                logprobs=logprobs.get(i),
                prompt_logprobs=prompt_logprobs(sequence, position),
                finish=reason,
                matched=matched,
                num_prompt=sequence.num_prompt,
                num_cached=sequence.num_cached,
                parting=sequence.leaves,
            )
        )
    rows = np.array([sequence.row for sequence in drawn], np.int32)
    return PartDone(rows, kept[:, None], finished), outputs


def scored_only(sequences: Seq[Sequence]) -> list[Output]:
    """Prompt logprobs of sequences that draw nothing and whose prompt is computed; the planner ends them."""
    owed = [(s, prompt_logprobs(s, s.num_prompt)) for s in sequences if not s.ended]
    return [
        Output(s.request_id, s.choice, [], prompt_logprobs=p, num_prompt=s.num_prompt, num_cached=s.num_cached)
        for s, p in owed
        if p is not None
    ]


def no_part() -> PartDone:
    """The result of a part that draws nothing."""
    return PartDone(NO_INTS, np.zeros((0, 1), np.int32), np.zeros(0, np.bool_))
