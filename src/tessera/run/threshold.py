"""From which size on steps run as two halves: measured before an instance is ready, where nobody said it.

The largest step that may come is run whole and as halves, turn about; while halves pay, half of its size, and so on.
One clock decides, that of whoever plans: from the order until the last rank is through, which is what the planner would
wait for. So ranks cannot disagree, and the slowest counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tessera.core.config.types import Decision
from tessera.core.errors import CapacityError
from tessera.plan.config import PlannerConfig
from tessera.plan.dry import dry_step, largest
from tessera.plan.step import Step
from tessera.run.recording import Act, each_performs

PAYS = 1.02  # times as long takes the whole step: less is noise, and halves take more launches
ROUNDS, LEAST_ROUNDS = 5, 2
WARM: tuple[Act, ...] = ("rehearse", "meet")
BUDGET_S = 3.0  # of timed steps, after which only the pairs begin that are needed (what is compiled first is no part)

Everywhere = Callable[[Act, Step], Mapping[int, str]]


@dataclass(frozen=True, slots=True)
class Trial:
    """What a size took, in seconds, turn by turn."""

    num_tokens: int
    whole: tuple[float, ...]
    halves: tuple[float, ...]

    @property
    def pays(self) -> bool:
        """Halves are faster by more than noise: the shortest of either form say so, and most turns."""
        return self._shorter and 2 * self._won > len(self.whole)

    @property
    def seconds(self) -> float:
        """What all turns took."""
        return sum(self.whole) + sum(self.halves)

    @property
    def _shorter(self) -> bool:
        return min(self.whole) >= PAYS * min(self.halves)

    @property
    def _won(self) -> int:
        return sum(whole > halves for whole, halves in zip(self.whole, self.halves, strict=True))

    def __str__(self) -> str:
        whole, halves = min(self.whole) * 1e3, min(self.halves) * 1e3
        noisy = f", which won {self._won} of {len(self.whole)} turns" if self._shorter and not self.pays else ""
        return f"{self.num_tokens} tokens take {whole:.1f} ms whole and {halves:.1f} as halves{noisy}"


@dataclass(frozen=True, slots=True)
class Threshold:
    """Steps of so many tokens of their largest part, or more, run as halves (0: none does); and how that is told."""

    split_from: int
    decision: Decision


def measure(
    config: PlannerConfig, smallest: int, everywhere: Everywhere, clock: Callable[[], float] = time.perf_counter
) -> Threshold:
    """Tries sizes from the largest that `config` allows down to `smallest`. `everywhere`: has all ranks perform an act
    of a step, and waits for them; what memory each lacked, by rank.

    Each size costs two rehearsals, two steps that warm up, and `LEAST_ROUNDS` to `ROUNDS` pairs that are timed: no more
    than needed once those have taken `BUDGET_S`, and then no smaller size either. A rank without memory ends it: what
    was found for larger sizes holds.
    """
    trials: list[Trial] = []
    size, left, end = largest(config), BUDGET_S, ""
    while size >= smallest and (not trials or (trials[-1].pays and left > 0)):
        try:
            trials.append(_trial(config, size, everywhere, clock, left))
            left -= trials[-1].seconds
        except CapacityError as error:
            end = f"{size} tokens cannot be tried: {error}"
            break
        size //= 2
    paid = [trial for trial in trials if trial.pays]
    split_from = paid[-1].num_tokens if paid else 0
    told = [str(trial) for trial in trials[-2:]] + ([end] if end else [])
    value = f"steps of {split_from} tokens or more" if paid else "off"
    return Threshold(split_from, Decision("two-batch overlap", value, f"measured: {'; '.join(told)}"))


def _trial(
    config: PlannerConfig, size: int, everywhere: Everywhere, clock: Callable[[], float], budget: float
) -> Trial:
    """Raises `CapacityError` when a rank has no memory for the size."""
    steps = [dry_step(config, size, halves) for halves in (False, True)]
    for act in WARM:
        for step in steps:
            each_performs(everywhere(act, step))
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(ROUNDS):
        if turn >= LEAST_ROUNDS and sum(map(sum, times)) >= budget:
            break
        for step, taken in zip(steps, times, strict=True):
            began = clock()
            everywhere("meet", step)
            taken.append(clock() - began)
    return Trial(size, tuple(times[0]), tuple(times[1]))
