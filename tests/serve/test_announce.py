"""What a server says to do with it can be done."""

from __future__ import annotations

import json
import shlex

from serve.support import in_loop, world
from tessera.commands.options import COMMANDS, parse
from tessera.serve.announce import hint

ROUTER = next(command for command in COMMANDS if command.name == "router")


@in_loop
async def test_the_call_that_is_shown_is_answered() -> None:
    async with world() as (made, http):
        words = shlex.split(hint(made.server, "http://tessera"))
        assert (words[0], words[-2]) == ("curl", "-d")
        assert (await http.post(words[1], json=json.loads(words[-1]))).status_code == 200


@in_loop
async def test_a_prefill_server_answers_nobody_and_shows_the_router_that_does() -> None:
    async with world(role="prefill") as (made, _):
        words = shlex.split(hint(made.server, "http://tessera:1"))
    assert words[:2] == ["tessera", "router"]
    options, _ = parse(ROUTER, words[2:])
    assert options.prefill == [["http://tessera:1"]]
