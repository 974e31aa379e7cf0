"""`/generate` answers in SGLang's form: one object or a batch, logprobs, streams that carry the whole text so far."""

from __future__ import annotations

import pytest

from serve.support import events, in_loop, refusal, world
from tessera.core.messages import Submit

PATH = "/generate"
TWO = {"max_new_tokens": 2}


@in_loop
async def test_one_prompt_is_answered_by_one_object() -> None:
    async with world() as (_, http):
        answer = (await http.post(PATH, json={"text": "ab", "rid": "mine", "sampling_params": TWO})).json()
    meta = answer.pop("meta_info")
    assert answer == {"text": "Th", "output_ids": [84, 104]}
    assert meta.pop("e2e_latency") > 0
    assert meta == {
        "id": "mine",
        "finish_reason": {"type": "length", "length": 2},
        "prompt_tokens": 2,
        "completion_tokens": 2,
        "cached_tokens": 1,
    }


@in_loop
async def test_the_end_and_stop_strings_say_what_matched() -> None:
    async with world() as (_, http):
        answer = (await http.post(PATH, json={"text": "ab"})).json()
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": 256}
        params = {"stop": ["42"], "no_stop_trim": True}
        answer = (await http.post(PATH, json={"text": "ab", "sampling_params": params})).json()
        assert answer["text"] == "The answer is 42"
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": "42"}


@in_loop
async def test_a_batch_is_answered_in_order_each_with_its_own_parameters() -> None:
    params = [{"max_new_tokens": 1, "temperature": 0.5}, {"max_new_tokens": 3}]
    body = {"input_ids": [[1000 % 256, 9], [8]], "sampling_params": params, "rid": ["a", "b"]}
    async with world() as (made, http):
        answers = (await http.post(PATH, json=body)).json()
        assert [len(a["output_ids"]) for a in answers] == [1, 3]
        assert [a["meta_info"]["id"] for a in answers] == ["a", "b"]
        assert [m.params.temperature for m in made.engine.seen if isinstance(m, Submit)] == [0.5, 1.0]
        answers = (await http.post(PATH, json={"text": ["x"], "sampling_params": TWO, "rid": "c"})).json()
        assert [a["meta_info"]["id"] for a in answers] == ["c_0"], "a list of one is a batch"
        assert refusal(await http.post(PATH, json={**body, "rid": ["a"]}))["param"] == "rid"


@in_loop
async def test_several_choices_are_a_list() -> None:
    async with world() as (_, http):
        answers = (await http.post(PATH, json={"text": "x", "sampling_params": {**TWO, "n": 3}})).json()
    assert [a["text"] for a in answers] == ["Th"] * 3


@in_loop
async def test_logprobs_of_output_and_prompt() -> None:
    body = {
        "text": "abc",
        "sampling_params": TWO,
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
        "token_ids_logprob": [5],
        "return_text_in_logprobs": True,
    }
    async with world() as (_, http):
        meta = (await http.post(PATH, json=body)).json()["meta_info"]
        assert meta["output_token_logprobs"] == [[-0.5, 84, "T"], [-0.5, 104, "h"]]
        assert meta["output_top_logprobs"][0] == [[-0.5, 84, "T"], [-0.75, 65, "A"]]
        assert meta["output_token_ids_logprobs"] == [[[-1.5, 5, "\x05"]]] * 2
        assert meta["input_token_logprobs"] == [[None, 97, "a"], [-1.0, 98, "b"], [-1.0, 99, "c"]]
        assert meta["input_top_logprobs"][0] is None
        meta = (await http.post(PATH, json={**body, "logprob_start_len": 2})).json()["meta_info"]
        assert meta["input_token_logprobs"] == [[-1.0, 99, "c"]]
        meta = (await http.post(PATH, json={"text": "a", "sampling_params": TWO, "return_logprob": True})).json()
        assert meta["meta_info"]["input_token_logprobs"] == []
        assert refusal(await http.post(PATH, json={**body, "logprob_start_len": 3}))["param"] == "logprob_start_len"


@in_loop
async def test_a_stream_carries_the_whole_text_so_far() -> None:
    async with world() as (_, http):
        body = {"text": "ab", "sampling_params": {"max_new_tokens": 4}, "stream": True}
        parts = events(await http.post(PATH, json=body))
        assert [part["text"] for part in parts] == ["T", "Th", "The", "The "]
        assert [part["meta_info"]["completion_tokens"] for part in parts] == [1, 2, 3, 4]
        assert [part["meta_info"]["finish_reason"] for part in parts[:-1]] == [None] * 3
        parts = events(await http.post(PATH, json={**body, "text": ["a", "b"]}))
        last = {part["index"]: part["text"] for part in parts}
        assert last == {0: "The ", 1: "The "}


@in_loop
async def test_a_stream_without_a_tokenizer_carries_every_token() -> None:
    async with world(with_tokenizer=False) as (_, http):
        body = {"input_ids": [97, 98], "sampling_params": {"max_new_tokens": 4}, "stream": True}
        parts = events(await http.post(PATH, json=body))
        assert [part["output_ids"] for part in parts] == [[84], [84, 104], [84, 104, 101], [84, 104, 101, 32]]


@pytest.mark.parametrize("both", [{}, {"text": "a", "input_ids": [1]}])
@in_loop
async def test_exactly_one_of_text_and_ids(both: dict[str, object]) -> None:
    async with world() as (_, http):
        assert "exactly one" in refusal(await http.post(PATH, json=both))["message"]


@in_loop
async def test_sampling_parameters_are_refused_by_their_path() -> None:
    async with world() as (_, http):
        for params, param in [
            ({"temprature": 1}, "sampling_params.temprature"),
            ({"temperature": "hot"}, "sampling_params.temperature"),
            ({"regex": "a+"}, "sampling_params.regex"),
            ({"max_new_tokens": 100000}, "sampling_params.max_new_tokens"),
            ({"max_new_tokens": 2, "min_new_tokens": 3}, "sampling_params.min_new_tokens"),
            ({"logit_bias": {"9999": 1}}, "sampling_params.logit_bias"),
            ({"stop_token_ids": [9999]}, "sampling_params.stop_token_ids"),
        ]:
            found = refusal(await http.post(PATH, json={"text": "a", "sampling_params": params}))
            assert found["param"] == param
        assert (
            "did you mean 'temperature'"
            in refusal(await http.post(PATH, json={"text": "a", "sampling_params": {"temprature": 1}}))["message"]
        )
