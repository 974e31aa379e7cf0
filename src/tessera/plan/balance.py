"""Which of several data-parallel ranks, or replicas, takes a request: the one that it names, else the least loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tessera.core.mesh import dealt
from tessera.core.messages import Submit

FOLLOW = "follow_bootstrap_room"


@dataclass(slots=True)
class Load:
    """What a DP rank or replica has taken on: requests, and the positions they compute at most."""

    dp_rank: int
    num_requests: int = 0
    num_tokens: int = 0
    num_taken: int = 0


Key = Callable[[Load], tuple[int, ...]]
BALANCES: dict[str, Key] = {  # the smallest goes first
    "round_robin": lambda load: (load.num_taken, load.dp_rank),
    "total_requests": lambda load: (load.num_requests, load.num_taken, load.dp_rank),
    "total_tokens": lambda load: (load.num_tokens, load.num_taken, load.dp_rank),
    FOLLOW: lambda load: (load.dp_rank,),  # a request names its rank, or is misplaced, or there is one
}


def misplaced(method: str, submit: Submit, num_dp: int) -> str | None:
    """Why there is no place for a request; None when there is one."""
    if submit.dp_rank is not None and not 0 <= submit.dp_rank < num_dp:
        return f"data-parallel rank {submit.dp_rank} is asked for; there are 0 to {num_dp - 1}"
    if method == FOLLOW and num_dp > 1 and named(method, submit, num_dp) is None:
        return f"it has no bootstrap_room to follow (--load-balance-method {FOLLOW})"
    return None


def named(method: str, submit: Submit, num_dp: int) -> int | None:
    """The rank that a request names, by itself or by its room; None when any will do."""
    if submit.dp_rank is None and method == FOLLOW and submit.bootstrap_room is not None:
        return dealt(submit.bootstrap_room, num_dp)
    return submit.dp_rank


def place(method: str, submit: Submit, loads: Sequence[Load]) -> int:
    """The rank, of those with these loads, that takes a request which is not misplaced."""
    asked = named(method, submit, len(loads))
    return min(loads, key=BALANCES[method]).dp_rank if asked is None else asked
