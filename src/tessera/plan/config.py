"""What the planner may use, and how it chooses."""

from __future__ import annotations

from dataclasses import dataclass

from tessera.core.errors import ConfigError, Conflict
from tessera.plan.balance import BALANCES
from tessera.plan.handoff import HandoffConfig
from tessera.plan.policy import POLICIES


@dataclass(frozen=True, slots=True)
class PlannerConfig:
    """Sizes and choices of one planner; sizes are those of each DP rank.

    `max_running`: rows. `num_pages`, `num_slots`: sizes of the pools with scratch page 0 and scratch slot 0 (no slots:
    0). `chunk_size`: most tokens of a step that holds a range longer than one, the decodes that ride along included;
    decodes claim theirs first, and a step of decodes alone holds all of them. `alone_size`: the same for a step when no
    sequence of any rank could decode instead, so that nobody's next token waits for it (less than `chunk_size` counts
    as that). `max_prefill_tokens`: most tokens of the prefill ranges of a step. Chunk and prompts: <= 0 is no limit;
    without `chunk_size` no prompt is cut, and one longer than `max_prefill_tokens` goes alone. `mixed`: decodes ride
    along with prefill ranges; else the two take turns.
    `max_context`: most tokens of a sequence, prompt and answer. `max_in_flight`: steps planned and not yet done.
    `max_queued`: most requests waiting (<= 0: no limit).
    `split_from`: a step whose largest part has at least this many tokens is run as two halves, on all ranks (0: none
    is); `split_share`, `split_grain`: where each part is cut, see `halves.cut`. `handoff`: prompts are computed on one
    server and answered on another, of which this is one.
    """

    max_running: int
    num_pages: int
    page_size: int
    max_context: int
    num_slots: int = 0
    num_dp: int = 1
    chunk_size: int = 0
    alone_size: int = 0
    max_prefill_tokens: int = 0
    mixed: bool = False
    max_in_flight: int = 1
    prefix_cache: bool = False
    policy: str = "fcfs"
    load_balance: str = "round_robin"
    max_queued: int = 0
    weights_version: str = ""
    split_from: int = 0
    split_share: float = 0.48
    split_grain: int = 64
    handoff: HandoffConfig | None = None

    def __post_init__(self) -> None:
        conflicts = [
            Conflict((f"{name} {value}",), f"at least {least} is needed", f"Use {least} or more")
            for name, value, least in (
                ("max_running", self.max_running, 1),
                ("num_pages", self.num_pages, 2),
                ("page_size", self.page_size, 1),
                ("max_context", self.max_context, 2),
                ("num_dp", self.num_dp, 1),
                ("max_in_flight", self.max_in_flight, 1),
                ("split_from", self.split_from, 0),
                ("split_grain", self.split_grain, 1),
                ("num_slots", self.num_slots, 2 if self.num_slots else 0),
            )
            if value < least
        ]
        for name, value, choices in (
            ("policy", self.policy, sorted(POLICIES)),
            ("load_balance", self.load_balance, sorted(BALANCES)),
        ):
            if value not in choices:
                conflicts.append(Conflict((f"{name} {value}",), "it is not known", f"Use one of {', '.join(choices)}"))
        if not 0 <= self.split_share <= 0.5:
            conflicts.append(
                Conflict((f"split_share {self.split_share}",), "the smaller half has 0 to 0.5", "Use 0 (never) to 0.5")
            )
        if self.prefix_cache and self.num_slots:
            conflicts.append(
                Conflict(
                    ("prefix_cache", f"num_slots {self.num_slots}"),
                    "a cached page holds no recurrent state, so a hit could not go on from it",
                    "Switch the prefix cache off for models with recurrent state",
                )
            )
        if conflicts:
            raise ConfigError(conflicts)

    @property
    def max_pages(self) -> int:
        """Most pages of one sequence: width of a row's page table."""
        return -(-self.max_context // self.page_size)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)
