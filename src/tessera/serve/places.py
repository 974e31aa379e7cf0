"""Where a request asks to run: its data-parallel rank (or replica), and the room of its hand-over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tessera.core.errors import RequestError
from tessera.core.messages import Address
from tessera.serve.checks import bad, pick

BOOTSTRAP = ("bootstrap_host", "bootstrap_port")
RANKS = ("data_parallel_rank", "routed_dp_rank")  # SGLang's two names of it


def met_at(values: Mapping[str, Any], index: int, count: int, role: str, port: int) -> Address | None:
    """Where the prefill server of prompt `index` of `count` is met; read at decode. `port`: where none is named.

    Raises RequestError for half of what a hand-over needs.
    """
    asked = {name: pick(values[name], index, count, name) for name in BOOTSTRAP if name in values}
    room, host = "bootstrap_room" in values, asked.get("bootstrap_host")
    if asked and role == "null":
        name, why = next(iter(asked)), "this server does prefill and decode itself (--disaggregation-mode null)"
        raise RequestError(f"{name} is not read here: {why}. Leave it out", name)
    if asked and not room:
        why = "a hand-over needs one, the same at both servers"
        raise RequestError(f"bootstrap_room is missing: {why}", "bootstrap_room")
    if role == "decode" and room and host is None:
        why = "this is a decode server (--disaggregation-mode decode), which must know the prefill server of a room"
        raise RequestError(f"bootstrap_host is missing: {why}", "bootstrap_host")
    if host is None:
        return None
    bare = host.removeprefix("[").removesuffix("]")  # routers send IPv6 addresses as URLs have them
    return Address(bare, asked.get("bootstrap_port", port))


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
