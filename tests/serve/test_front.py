"""The end of a front, in order: what it says of requests that did not finish."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from serve.support import in_loop, refusal, world
from tessera.core.errors import PeerError, TesseraError
from tessera.serve.front import Front
from waits import until

ASK = {"prompt": "a", "max_tokens": 500, "ignore_eos": True}


@pytest.mark.parametrize("fault", ["rank", "hang"])
@in_loop
async def test_an_engine_that_fails_while_the_server_ends_in_order_makes_that_a_failure(fault: str) -> None:
    """Known fault: requests got a 503, and the server ended with exit code 0 where a rank was killed: its engine had
    told of it and not ended yet."""
    async with world(delay=0.01, silence=0.3) as (made, http):
        asking = asyncio.create_task(http.post("/v1/completions", json=ASK))
        await until(lambda: made.engine.rows)
        draining = asyncio.create_task(Front(*cast(Any, (None, None, None)))._drain(made.server, 5.0))
        await asyncio.sleep(0)
        made.paused = True
        if fault == "rank":
            made.client.replicas[0].fail(PeerError("rank 1 was ended"))
        else:
            await until(lambda: made.client.replicas[0].stale)
            made.client.replicas[0].fail_all(made.client.replicas[0].silent())
        with pytest.raises(TesseraError, match="rank 1 was ended" if fault == "rank" else "has not stepped"):
            await draining
        refusal(await asking, 503)


@in_loop
async def test_a_replica_that_ended_long_before_is_no_failure_of_an_end_in_order() -> None:
    async with world() as (made, _):
        made.client.replicas[0].fail(PeerError("long ago"))
        await Front(*cast(Any, (None, None, None)))._drain(made.server, 5.0)
