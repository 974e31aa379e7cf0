"""What `tessera bench` asked of a server ends with it."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Mapping

import pytest

from tessera.client import HttpClient
from tessera.commands.bench import profiled


class Server(HttpClient):
    """Notes what is asked of it."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:9")
        self.asked: list[str] = []

    async def start_profile(self, asked: Mapping[str, object]) -> None:
        self.asked.append("start")

    async def stop_profile(self) -> list[str]:
        self.asked.append("stop")
        return []


@pytest.mark.parametrize(("steps", "asked"), [(None, ["start", "stop"]), (3, ["start"])])
def test_a_bench_that_is_interrupted_leaves_no_profile_running(steps: int | None, asked: list[str]) -> None:
    server = Server()

    async def interrupted() -> None:
        async with profiled(server, Namespace(profile=True, profile_output_dir=None, profile_num_steps=steps)):
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(interrupted())
    assert server.asked == asked
