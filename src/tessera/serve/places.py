"""Where a request asks to run: its data-parallel rank (or replica), and the room of its hand-over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tessera.core.errors import RequestError
from tessera.serve.checks import bad, pick

RANKS = ("data_parallel_rank", "routed_dp_rank")  # SGLang's two names of it


def place_of(values: Mapping[str, Any], index: int, count: int, num_dp: int, rooms: bool) -> dict[str, int | None]:
    """`dp_rank` and `bootstrap_room` of prompt `index` of `count`. Raises RequestError that names the field.

    One room for several prompts is that of the first; the others follow it, as in SGLang. `rooms`: who names no rank
    must name a room.
    """
    ranks = {name: pick(values[name], index, count, name) for name in RANKS if name in values}
    for name, rank in ranks.items():
        if rank >= num_dp:
            raise bad(name, rank, f"an integer from 0 to {num_dp - 1}, the data-parallel ranks of this server")
    if len(set(ranks.values())) > 1:
        raise bad(RANKS[1], ranks[RANKS[1]], f"the same as {RANKS[0]}, {ranks[RANKS[0]]}")
    room = values.get("bootstrap_room")
    if room is not None:
        room = pick(room, index, count, "bootstrap_room") + (index if isinstance(room, int) else 0)
    elif rooms and not ranks:
        why = "requests go where their room says here (--load-balance-method follow_bootstrap_room)"
        raise RequestError(f"bootstrap_room is missing: {why}", "bootstrap_room")
    return {"dp_rank": next(iter(ranks.values()), None), "bootstrap_room": room}
