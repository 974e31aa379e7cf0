"""The fields by which prefill and decode meet: the same on both, lists for batches, and an explicit rank."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.core.errors import RequestError
from tessera.serve.router.rooms import ROOM_BITS, Meeting, batch_size, legs, prompt_of
from tessera.serve.router.servers import bootstrap_port_of, ranks_of

AT = Meeting("10.0.0.1", 8998)


def test_one_prompt_has_one_room_and_the_prefill_leg_does_not_stream() -> None:
    body = {"text": "hi", "stream": True, "stream_options": {"include_usage": True}, "rid": "r"}
    prefill, decode = legs(body, AT, 0, lambda bits: 7)
    shared = {"bootstrap_host": "10.0.0.1", "bootstrap_port": 8998, "bootstrap_room": 7}
    assert prefill == {"text": "hi", "stream": False, "rid": "r", **shared}
    assert decode == {**body, **shared}


BATCHES = [("text", ["a", "b"]), ("input_ids", [[1], [2, 3]]), ("prompt", ["a", "b"]), ("prompt", [[1], [2]])]


@given(st.sampled_from(BATCHES), st.integers(1, 16), st.data())
def test_rooms_of_a_batch_are_distinct_and_dealt_out(
    prompts: tuple[str, list[object]], dp: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, dp - 1))
    named = data.draw(st.booleans())
    body = {prompts[0]: prompts[1], **({"disagg_prefill_dp_rank": rank} if named else {})}
    prefill, decode = legs(body, Meeting("h", 1, dp), rank, random.getrandbits)
    assert prefill["bootstrap_room"] == decode["bootstrap_room"]
    assert len(set(decode["bootstrap_room"])) == 2
    assert all(0 <= room < 1 << 63 for room in decode["bootstrap_room"])
    second = rank if named else (rank + 1) % dp
    assert [room % dp for room in decode["bootstrap_room"]] == [rank, second]
    assert decode["bootstrap_host"] == ["h", "h"]
    told = rank if named and dp > 1 else None
    assert (prefill.get("routed_dp_rank"), decode.get("disagg_prefill_dp_rank")) == (told, told)


@given(st.integers(1, 8), st.data())
def test_one_prompt_names_its_rank(dp: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, dp - 1))
    for prompt in ("a", ["a"]):
        prefill, decode = legs({"text": prompt}, Meeting("h", 1, dp), rank, random.getrandbits)
        told = rank if dp > 1 else None
        assert (prefill.get("routed_dp_rank"), decode.get("disagg_prefill_dp_rank")) == (told, told)
        assert "routed_dp_rank" not in decode


@given(st.integers(0, (1 << ROOM_BITS) - 1), st.integers(1, 64))
def test_a_room_fits_into_63_bits(bits: int, dp: int) -> None:
    _, decode = legs({"text": ""}, Meeting("h", 1, dp), dp - 1, lambda _: bits)
    assert 0 <= decode["bootstrap_room"] < 1 << 63


def test_a_request_may_name_both_ranks() -> None:
    body = {"text": "hi", "data_parallel_rank": 5, "disagg_prefill_dp_rank": 1}
    prefill, decode = legs(body, Meeting("h", 1, 2), 0, lambda bits: 6)
    assert prefill["routed_dp_rank"] == decode["disagg_prefill_dp_rank"] == 1
    assert "data_parallel_rank" not in prefill
    assert decode["data_parallel_rank"] == 5
    assert decode["bootstrap_room"] % 2 == 1
    with pytest.raises(RequestError, match="ranks 0 to 1"):
        legs({**body, "disagg_prefill_dp_rank": 2}, Meeting("h", 1, 2), 0, lambda bits: 6)


def test_what_counts_as_a_batch() -> None:
    assert batch_size({"text": "a"}) is None
    assert batch_size({"input_ids": [1, 2]}) is None
    assert batch_size({"input_ids": [[1, 2]]}) == 1
    assert batch_size({"prompt": ["a"]}) == 1
    assert batch_size({"prompt": []}) is None
    assert batch_size({"messages": [{}]}) is None
    assert prompt_of({"messages": [{"role": "user", "content": "hi"}]}) == "user\0hi"
    assert prompt_of({"prompt": [[1, 2], [3]]}) == [1, 2]
    assert prompt_of({"prompt": 5}) is None


@pytest.mark.parametrize(
    ("info", "port"),
    [
        ({"config": {"handover": {"bootstrap_port": 0}}, "engine": {"bootstrap": "10.0.0.1:4711"}}, 4711),
        ({"config": {"handover": {"bootstrap_port": 8999}}, "engine": {"bootstrap": "[::1]:8999"}}, 8999),
        ({"config": {"handover": {"bootstrap_port": 8999}}, "engine": {"bootstrap": None}}, 8999),
        ({"disaggregation_bootstrap_port": 8998, "engine": "SGLang's"}, 8998),
        ({}, None),
    ],
)
def test_the_bootstrap_port_is_the_one_that_was_bound(info: dict[str, Any], port: int | None) -> None:
    """`--disaggregation-bootstrap-port 0` asks for any free one, which only the server knows."""
    assert bootstrap_port_of(info) == port


@pytest.mark.parametrize(
    ("info", "ranks"),
    [
        ({"config": {"mesh": {"dp": 2, "replicas": 3}}, "dp_size": 9}, 6),
        ({"dp_size": 4}, 4),
        ({"config": {"mesh": {"dp": None, "replicas": 2}}}, 1),
        ({"config": {"mesh": {"dp": "2", "replicas": "2"}}}, 1),
        ({"config": "SGLang's", "dp_size": 0}, 1),
    ],
)
def test_what_a_server_tells_of_its_ranks_never_ends_the_router(info: dict[str, Any], ranks: int) -> None:
    assert ranks_of(info) == ranks
