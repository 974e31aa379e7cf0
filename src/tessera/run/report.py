"""Numbers of a step for logs and metrics. Labels are derived from the ranges; nothing decides by them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tessera.core.messages import StepReport
from tessera.plan.scheduler import Planner
from tessera.plan.step import Part, StepDone
from tessera.run.table import RowTable


@dataclass(frozen=True, slots=True)
class Tally:
    """What a part computes, counted when it is launched. `num_prompt_seq`: ranges of prompts (or of what is computed
    anew after a preemption), and first ones after a hand-over; `num_prompt_token`: their tokens."""

    label: str
    num_prompt_seq: int
    num_prompt_token: int
    num_cached_token: int


def tally(part: Part, table: RowTable) -> Tally:
    """Counts a part whose change the table has taken."""
    prompt = (part.starts < table.num_prompt[part.rows]) | (part.lengths > 1)
    arrived = [e.row for e in part.change.enter if e.arrived]
    if arrived:
        came = np.isin(part.rows, arrived)
        prompt |= came
    num_prompt = int(np.count_nonzero(prompt))
    cached = sum(e.num_cached for e in part.change.enter if e.choice == 0 and len(e.tokens) == e.num_prompt)
    names = {(False, False): "IDLE", (True, False): "EXTEND", (False, True): "DECODE", (True, True): "MIXED"}
    label = names[num_prompt > 0, num_prompt < len(prompt)]
    if arrived and came.any():
        label = "PREBUILT"
    return Tally(label, num_prompt, int(part.lengths[prompt].sum()), cached)


NOTHING = Tally("IDLE", 0, 0, 0)


class Reporter:
    """Makes the reports of steps that came back."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self._preempted = [0] * len(planner.ranks)
        self._index = -1

    def __call__(self, done: StepDone, tallies: list[Tally], seconds: float) -> list[StepReport]:
        """One report per DP rank."""
        self._index = done.index
        num_output = [int(np.count_nonzero(part.tokens >= 0)) for part in done.parts]
        work = [t.num_prompt_token + len(part.rows) for t, part in zip(tallies, done.parts, strict=True)]
        most = work.index(max(work))
        return [self._report(i, counted, num_output[i], seconds, i == most) for i, counted in enumerate(tallies)]

    def idle(self) -> list[StepReport]:
        """Where things stand when nothing runs: after an abort or a flush no step would tell."""
        return [self._report(i, NOTHING, 0, 0.0) for i in range(len(self._preempted))]

    def _report(
        self, dp_rank: int, counted: Tally, num_output: int, seconds: float, busiest: bool = True
    ) -> StepReport:
        state = self._planner.ranks[dp_rank].state
        preempted = state.num_preempted - self._preempted[dp_rank]
        self._preempted[dp_rank] = state.num_preempted
        return StepReport(
            index=self._index,
            label=counted.label,
            num_new_seq=counted.num_prompt_seq,
            num_new_token=counted.num_prompt_token,
            num_cached_token=counted.num_cached_token,
            num_running=state.table.num_running,
            num_queued=state.queue.num_waiting,
            num_pages_used=state.pages.num_used,
            num_pages=state.pages.num_pages - 1,
            num_slots_used=state.slots.num_used,
            num_slots=max(state.slots.num_slots - 1, 0),
            num_cached_pages=state.pages.num_idle,
            num_preempted=preempted,
            num_output_token=num_output,
            seconds=seconds,
            dp_rank=dp_rank,
            busiest=busiest,
            num_meeting=len(state.away) - sum(s.key in state.leases for s in state.away),
            num_leases=len(state.leases),
        )
