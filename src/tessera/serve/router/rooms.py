"""The fields by which a prefill and a decode server find each other for one request, as SGLang's PD routers send them.

Sources: SGLang `sglang_router/mini_lb.py` and the gateway's `pd_router.rs`. Both servers get `bootstrap_host`,
`bootstrap_port` (of the prefill server) and `bootstrap_room` (a random number of 63 bits): lists of them for a batch of
prompts. The prefill server's data-parallel rank travels explicitly: to it as `routed_dp_rank`, to the decode server as
`disagg_prefill_dp_rank`; rooms are congruent to it modulo the number of ranks, for servers that go by the room. The
prompts of a batch are dealt out over the ranks by their rooms alone, since only one rank can be named for all. A
request's own `routed_dp_rank` (or `data_parallel_rank`, its older name) is that of the decode server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tessera.core.errors import RequestError
from tessera.core.mesh import dealt

ROOM_BITS = 62  # that are random: a room has 63, and is moved a little to name a rank
Body = dict[str, Any]
DECODE_RANK = ("routed_dp_rank", "data_parallel_rank")


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where a prefill server meets decode servers. `host`: an IPv6 address comes in brackets. `dp`: its ranks."""

    host: str
    port: int
    dp: int = 1


def legs(body: Mapping[str, Any], at: Meeting, rank: int, room: Callable[[int], int]) -> tuple[Body, Body]:
    """The bodies for the prefill and for the decode server. `rank`: the prefill server's, unless the request names it.

    `room(bits)` gives random bits. The prefill server's answer is not shown to anybody, so it need not stream. Raises
    RequestError.
    """
    asked, count = _asked_rank(body, at.dp), batch_size(body)
    explicit = asked is not None or (count or 1) == 1  # SGLang takes one rank for all prompts of a batch
    first = rank if asked is None else asked
    ranks = [first if explicit else dealt(first + i, at.dp) for i in range(count or 1)]
    rooms = [_room(room(ROOM_BITS), rank, at.dp) for rank in ranks]
    shared: Body
    if count is None:
        shared = {"bootstrap_host": at.host, "bootstrap_port": at.port, "bootstrap_room": rooms[0]}
    else:
        shared = {"bootstrap_host": [at.host] * count, "bootstrap_port": [at.port] * count, "bootstrap_room": rooms}
    kept = {name: value for name, value in body.items() if name not in (*DECODE_RANK, "disagg_prefill_dp_rank")}
    prefill = {**kept, **shared, "stream": False}
    prefill.pop("stream_options", None)
    decode = {**kept, **shared, **{name: body[name] for name in DECODE_RANK if name in body}}
    if at.dp > 1 and explicit:
        prefill["routed_dp_rank"] = decode["disagg_prefill_dp_rank"] = first
    return prefill, decode


def batch_size(body: Mapping[str, Any]) -> int | None:
    """Prompts of a request that holds a list of them; None for one prompt. What is malformed counts as one."""
    for name in ("text", "input_ids", "prompt"):
        value = body.get(name)
        if isinstance(value, list) and value:
            return None if isinstance(value[0], int) else len(value)
        if value is not None:
            return None
    return None


def num_prompts(body: Mapping[str, Any]) -> int:
    """Prompts of a request, for balancing."""
    return batch_size(body) or 1


def prompt_of(body: Mapping[str, Any]) -> str | list[int] | None:
    """What a prefix cache goes by: the text, or the token ids, of the (first) prompt, or a conversation as one text."""
    messages = body.get("messages")
    if isinstance(messages, list):
        return "\0".join(f"{m.get('role')}\0{m.get('content')}" for m in messages if isinstance(m, dict))
    for name in ("text", "input_ids", "prompt"):
        value = body.get(name)
        if isinstance(value, list) and value and not isinstance(value[0], int):
            value = value[0]
        if isinstance(value, str):
            return value
        if isinstance(value, list) and set(map(type, value)) <= {int}:
            return value
    return None


def _room(bits: int, rank: int, dp: int) -> int:
    """A room that goes to `rank` where rooms are dealt out to `dp` ranks."""
    return bits - dealt(bits, dp) + rank


def _asked_rank(body: Mapping[str, Any], dp: int) -> int | None:
    asked = body.get("disagg_prefill_dp_rank")
    if asked is None:
        return None
    if not isinstance(asked, int) or isinstance(asked, bool) or not 0 <= asked < dp:
        message = f"disagg_prefill_dp_rank: found {asked!r}, the prefill server has the ranks 0 to {dp - 1}"
        raise RequestError(message, "disagg_prefill_dp_rank")
    return asked
