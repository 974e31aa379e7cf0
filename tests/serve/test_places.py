"""A request runs where it asks to: its data-parallel rank, and the room that it follows, reach the engine."""

from __future__ import annotations

from typing import Any

import pytest

from serve.support import World, in_loop, refusal, world
from serve.test_fields import ENDPOINTS
from tessera.core.messages import Address, Submit


def places(made: World) -> list[tuple[int | None, int | None]]:
    """Rank and room of every request that the engine has seen."""
    return [(m.dp_rank, m.bootstrap_room) for m in made.engine.seen if isinstance(m, Submit)]


@pytest.mark.parametrize("name", ENDPOINTS)
@in_loop
async def test_a_request_names_its_rank_and_its_room(name: str) -> None:
    path, _, good = ENDPOINTS[name]
    asked: list[dict[str, Any]] = [
        {"data_parallel_rank": 2},
        {"routed_dp_rank": 1, "bootstrap_room": 1 << 62},
        {"data_parallel_rank": 0, "routed_dp_rank": 0},
        {},
    ]
    async with world(num_dp=3) as (made, http):
        for fields in asked:
            assert (await http.post(path, json={**good, **fields})).status_code == 200, fields
        assert places(made) == [(2, None), (1, 1 << 62), (0, None), (None, None)]


@pytest.mark.parametrize(("path", "key"), [("/v1/completions", "prompt"), ("/generate", "input_ids")])
@in_loop
async def test_each_prompt_of_a_batch_has_its_own_place(path: str, key: str) -> None:
    async with world(num_dp=3) as (made, http):
        batch: dict[str, Any] = {key: [[7], [8], [9]]}
        each = {"data_parallel_rank": [2, 0, 1], "bootstrap_room": [5, 9, 7]}
        assert (await http.post(path, json={**batch, **each})).status_code == 200
        together = {"data_parallel_rank": 1, "bootstrap_room": 40}
        assert (await http.post(path, json={**batch, **together})).status_code == 200
        assert places(made) == [(2, 5), (0, 9), (1, 7), (1, 40), (1, 41), (1, 42)]
        few = refusal(await http.post(path, json={**batch, "data_parallel_rank": [0, 1]}))
        assert few["param"] == "data_parallel_rank"
        assert "found 2 values, allowed are one or 3" in few["message"]


@pytest.mark.parametrize("name", ENDPOINTS)
@in_loop
async def test_a_rank_that_is_not_there_is_refused_by_name(name: str) -> None:
    path, _, good = ENDPOINTS[name]
    for num_dp in (1, 2):
        async with world(num_dp=num_dp) as (made, http):
            for field in ("data_parallel_rank", "routed_dp_rank"):
                error = refusal(await http.post(path, json={**good, field: num_dp}))
                assert error["param"] == field
                assert f"found {num_dp}, allowed is an integer from 0 to {num_dp - 1}" in error["message"]
            both = {"data_parallel_rank": 0, "routed_dp_rank": num_dp - 1}
            assert (await http.post(path, json={**good, **both})).status_code == (200 if num_dp == 1 else 400)
            assert places(made) == [(0, None)] * (num_dp == 1)


@pytest.mark.parametrize("name", ENDPOINTS)
@in_loop
async def test_where_requests_follow_rooms_one_without_is_refused(name: str) -> None:
    path, _, good = ENDPOINTS[name]
    async with world(num_dp=2, rooms=True) as (made, http):
        error = refusal(await http.post(path, json=good))
        assert (error["param"], "follow_bootstrap_room" in error["message"]) == ("bootstrap_room", True)
        for fields in ({"bootstrap_room": 3}, {"data_parallel_rank": 1}):
            assert (await http.post(path, json={**good, **fields})).status_code == 200
        assert (await http.get("/health_generate")).status_code == 200
        assert places(made) == [(None, 3), (1, None), (0, None)]


def met(made: World) -> list[tuple[int | None, str | None]]:
    """Room of every request that the engine has seen, and where its prefill server is met."""
    submits = [m for m in made.engine.seen if isinstance(m, Submit)]
    return [(m.bootstrap_room, str(m.bootstrap) if m.bootstrap else None) for m in submits]


@pytest.mark.parametrize("name", ENDPOINTS)
@in_loop
async def test_a_decode_server_learns_where_the_prompt_is_computed(name: str) -> None:
    path, _, good = ENDPOINTS[name]
    pair = {"bootstrap_host": "10.0.0.1", "bootstrap_room": 7}
    async with world(role="decode") as (made, http):
        for fields in (pair, {**pair, "bootstrap_port": 9000}, {**pair, "bootstrap_port": None}, {}):
            assert (await http.post(path, json={**good, **fields})).status_code == 200, fields
        assert met(made) == [(7, "10.0.0.1:8998"), (7, "10.0.0.1:9000"), (7, "10.0.0.1:8998"), (None, None)]


@in_loop
async def test_each_prompt_of_a_batch_has_its_own_pair() -> None:
    hosts = {"bootstrap_host": ["a", "b"], "bootstrap_port": [1, 2], "bootstrap_room": [5, 9]}
    async with world(role="decode") as (made, http):
        for path, key in (("/v1/completions", "prompt"), ("/generate", "input_ids")):
            assert (await http.post(path, json={key: [[7], [8]], **hosts})).status_code == 200
            assert sorted(met(made)) == [(5, "a:1"), (9, "b:2")]
            made.engine.seen.clear()


@pytest.mark.parametrize(
    ("role", "fields", "field"),
    [
        ("decode", {"bootstrap_room": 7}, "bootstrap_host"),
        ("decode", {"bootstrap_host": "a"}, "bootstrap_room"),
        ("prefill", {"bootstrap_host": "a"}, "bootstrap_room"),
        ("null", {"bootstrap_host": "a", "bootstrap_room": 7}, "bootstrap_host"),
        ("null", {"bootstrap_port": 1, "bootstrap_room": 7}, "bootstrap_port"),
        ("decode", {"bootstrap_host": "a", "bootstrap_port": 0, "bootstrap_room": 7}, "bootstrap_port"),
        ("decode", {"bootstrap_host": ["a", "b"], "bootstrap_room": 7}, "bootstrap_host"),
    ],
)
@in_loop
async def test_half_of_what_a_hand_over_needs_is_refused_by_name(role: str, fields: dict[str, Any], field: str) -> None:
    async with world(role=role) as (made, http):
        answer = await http.post("/v1/completions", json={"prompt": [7], **fields})
        assert refusal(answer)["param"] == field
        assert not met(made)


@in_loop
async def test_a_decode_server_is_told_where_prefill_is_met() -> None:
    async with world(role="decode", bootstrap_port=9000) as (made, http):
        hosts = {"10.0.0.1": "10.0.0.1", "[::1]": "::1", "::1": "::1", "prefill-0": "prefill-0"}
        for host in hosts:
            body = {"input_ids": [7], "bootstrap_host": host, "bootstrap_room": 5}
            assert (await http.post("/generate", json=body)).status_code == 200
        got = [m.bootstrap for m in made.engine.seen if isinstance(m, Submit)]
        assert got == [Address(host, 9000) for host in hosts.values()]
