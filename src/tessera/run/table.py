"""A rank's mirror of the row table: who sits in each row, its pages and slot on the host, its tokens on the device.

The host side is numpy, so that a step is described with a few vectorised operations; the token table is on the device,
so that a token drawn by step n is the input of step n + 1 without a visit to the host.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.core.config.needs import Sketch
from tessera.core.messages import SamplingParams, TokenLogprobs
from tessera.ops.upload import upload_columns
from tessera.plan.step import Change, Enter, Ints


@dataclass(slots=True, eq=False)
class Sequence:
    """The occupant of a row, from its entering until it leaves. Identity matters: a row may be taken again."""

    row: int
    request_id: str
    choice: int
    num_prompt: int
    num_cached: int
    params: SamplingParams
    fresh: bool  # nothing of it was drawn yet when it entered: its prompt logprobs are still owed
    leaves: bool = False  # another server tells what is drawn of it
    ended: bool = False  # nothing more may come out
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Known:
    """What the device is told of a row that is entered: its tokens from position 0 on, its pages from the first on."""

    row: int
    tokens: Ints
    pages: Ints


def table_bytes(sketch: Sketch) -> int:
    """Bytes of the tables of rows on the device: tokens, pages where graphs read them there, and a step's own pages."""
    pages = -(-(sketch.context + 1) // sketch.page_size)
    return (sketch.rows + 1) * 4 * (sketch.context + 1 + pages * (2 if sketch.graphed else 1))


class RowTable:
    """`num_rows` rows of up to `max_context` tokens and `max_pages` pages, and on the device a scratch row behind them.

    `pages_on_device`: the page tables there too, for steps that are replayed; None where nobody asks. Tokens that end a
    sequence of a row (EOS and its stop ids) sit in `ends[row]`; `limit[row]` is the number of known tokens at which it
    ends by length.
    """

    def __init__(
        self,
        num_rows: int,
        max_context: int,
        page_size: int,
        eos: tuple[int, ...],
        device: torch.device | str = "cpu",
        mirror_pages: bool = False,
    ) -> None:
        self.max_context, self.scratch = max_context, num_rows
        self.eos = frozenset(eos)
        self.occupants: list[Sequence | None] = [None] * num_rows
        self.pages = np.zeros((num_rows, -(-(max_context + 1) // page_size)), np.int32)
        self.slots = np.zeros(num_rows, np.int32)
        self.num_prompt = np.zeros(num_rows, np.int32)
        self.limit = np.zeros(num_rows, np.int32)
        self.ends: list[frozenset[int]] = [frozenset()] * num_rows
        self.tokens: Tensor = torch.zeros(num_rows + 1, max_context + 1, dtype=torch.int32, device=device)
        shape = (num_rows + 1, self.pages.shape[1])
        self.pages_on_device = torch.zeros(shape, dtype=torch.int32, device=device) if mirror_pages else None
        self._where: dict[tuple[str, int], Sequence] = {}

    def apply(self, change: Change) -> list[Known]:
        """Applies a change to the host's side and returns what the device's token table must be told."""
        for row in change.leave.tolist():
            self._leave(row)
        known = [self._enter(enter) for enter in change.enter]
        if len(change.pages):
            rows, indices, pages = change.pages.T
            self.pages[rows, indices] = pages
        return known

    def _leave(self, row: int) -> None:
        sequence = self.occupants[row]
        assert sequence is not None, f"row {row} leaves but is empty"
        sequence.ended = True
        self._where.pop((sequence.request_id, sequence.choice), None)
        self.occupants[row] = None
        self.pages[row] = 0

    def _enter(self, enter: Enter) -> Known:
        row, params = enter.row, enter.params
        assert self.occupants[row] is None, f"row {row} is entered but taken"
        fresh = len(enter.tokens) == enter.num_prompt
        counts = enter.num_prompt, enter.num_cached
        sequence = Sequence(row, enter.request_id, enter.choice, *counts, params, fresh, enter.leaves)
        self.occupants[row] = sequence
        self._where[enter.request_id, enter.choice] = sequence
        self.pages[row, : len(enter.pages)] = enter.pages
        self.slots[row] = max(enter.slot, 0)
        self.num_prompt[row] = enter.num_prompt
        self.limit[row] = min(enter.num_prompt + params.max_new_tokens, self.max_context) - enter.leaves
        self.ends[row] = self.end_tokens(params)
        return Known(row, enter.tokens, enter.pages)

    def end_tokens(self, params: SamplingParams) -> frozenset[int]:
        """Tokens that end a sequence with these parameters."""
        stops = frozenset(params.stop_token_ids)
        return stops if params.ignore_eos else stops | self.eos

    def find(self, request_id: str, choice: int) -> Sequence | None:
        """The sequence of a choice, when it sits in a row."""
        return self._where.get((request_id, choice))

    def write_known(self, known: list[Known], change: Change) -> None:
        """Writes known tokens of entering rows into the device's token table, and pages into its page table."""
        if known:
            _write_rows(self.tokens, [(entry.row, entry.tokens) for entry in known])
        if self.pages_on_device is None:
            return
        if known:
            _write_rows(self.pages_on_device, [(entry.row, entry.pages) for entry in known])
        if len(change.pages):
            rows, indices, pages = upload_columns(change.pages.T, self.tokens.device)
            self.pages_on_device[rows, indices] = pages

    def taken(self) -> NDArray[np.bool_]:
        """Per row, whether somebody sits in it."""
        return np.array([occupant is not None for occupant in self.occupants])


def _write_rows(table: Tensor, entries: list[tuple[int, Ints]]) -> None:
    """Writes the beginnings of rows: one copy to the device, one launch."""
    lengths = [len(values) for _, values in entries]
    rows = np.repeat(np.array([row for row, _ in entries], np.int32), lengths)
    columns = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    at_rows, at_columns, values = upload_columns((rows, columns, np.concatenate([v for _, v in entries])), table.device)
    table[at_rows, at_columns] = values
