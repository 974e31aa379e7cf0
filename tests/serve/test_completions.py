"""`/v1/completions` answers in OpenAI's form: whole and streamed, with n, best_of, stop, echo, logprobs and usage."""

from __future__ import annotations

from typing import Any

import pytest

from serve.fake_engine import ANSWER
from serve.support import events, in_loop, refusal, world
from tessera.core.messages import Abort, Submit

PATH = "/v1/completions"
TEXT = "The answer is 42. Grüße, 世界 🎉! "


@in_loop
async def test_a_whole_answer() -> None:
    async with world() as (_, http):
        answer = (await http.post(PATH, json={"model": "tiny", "prompt": "abcd", "max_tokens": 10})).json()
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    (choice,) = answer["choices"]
    assert choice == {
        "index": 0,
        "text": "The answer",
        "logprobs": None,
        "finish_reason": "length",
        "matched_stop": None,
    }
    assert answer["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 10,
        "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


@in_loop
async def test_the_end_token_ends_an_answer_and_is_not_in_its_text() -> None:
    async with world() as (_, http):
        (choice,) = (await http.post(PATH, json={"prompt": "a", "max_tokens": 100})).json()["choices"]
        assert (choice["text"], choice["finish_reason"], choice["matched_stop"]) == (TEXT, "stop", 256)
        more = {"ignore_eos": True, "max_tokens": 60, "return_token_ids": True}
        (choice,) = (await http.post(PATH, json={"prompt": "a", **more})).json()["choices"]
        assert choice["finish_reason"] == "length"
        assert len(choice["token_ids"]) == 60
        assert choice["text"].startswith(TEXT + "The")


@in_loop
async def test_prompts_and_choices_are_numbered_in_order() -> None:
    body = {"prompt": ["a", "bb", "ccc"], "n": 2, "max_tokens": 3}
    async with world() as (made, http):
        answer = (await http.post(PATH, json=body)).json()
        assert [c["index"] for c in answer["choices"]] == list(range(6))
        assert answer["usage"]["prompt_tokens"] == 6
        assert answer["usage"]["completion_tokens"] == 18
        streamed = events(await http.post(PATH, json={**body, "stream": True}))
        assert {e["choices"][0]["index"] for e in streamed} == set(range(6))
        prompts = [m.tokens for m in made.engine.seen if isinstance(m, Submit)]
    assert prompts == [[97], [98] * 2, [99] * 3] * 2


@pytest.mark.parametrize("prompt", [[97, 98], [[97, 98]], "ab", ["ab"]])
@in_loop
async def test_a_prompt_may_be_text_or_tokens(prompt: Any) -> None:
    async with world() as (made, http):
        assert (await http.post(PATH, json={"prompt": prompt})).status_code == 200
        (submit,) = [m for m in made.engine.seen if isinstance(m, Submit)]
        assert submit.tokens == [97, 98]


@in_loop
async def test_the_best_choices_are_kept() -> None:
    async with world() as (made, http):
        answer = (await http.post(PATH, json={"prompt": "ab", "n": 1, "best_of": 3, "max_tokens": 4})).json()
        (submit,) = [m for m in made.engine.seen if isinstance(m, Submit)]
        assert (submit.n, submit.params.logprobs) == (3, 0)
        (choice,) = answer["choices"]
        assert (choice["index"], choice["logprobs"]) == (0, None)
        assert answer["usage"]["completion_tokens"] == 12
        assert refusal(await http.post(PATH, json={"prompt": "a", "n": 3, "best_of": 2}))["param"] == "best_of"
        both = {"prompt": "a", "best_of": 2, "stream": True}
        assert refusal(await http.post(PATH, json=both))["param"] == "best_of"


@pytest.mark.parametrize(
    ("stop", "text", "matched"),
    [
        ("42", "The answer is ", "42"),
        (["xyz", " is"], "The answer", " is"),
        ("世", "The answer is 42. Grüße, ", "世"),
        ("swer is 4", "The an", "swer is 4"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_stop_strings_end_an_answer_across_tokens(stop: Any, text: str, matched: str, stream: bool) -> None:
    body = {"prompt": "a", "max_tokens": 60, "stop": stop}
    async with world() as (made, http):
        for keep in (False, True):
            response = await http.post(PATH, json={**body, "stream": stream, "include_stop_str_in_output": keep})
            parts = events(response) if stream else [response.json()]
            choices = [part["choices"][0] for part in parts]
            assert "".join(c["text"] for c in choices) == text + (matched if keep else "")
            assert (choices[-1]["finish_reason"], choices[-1]["matched_stop"]) == ("stop", matched)
            assert all(c["finish_reason"] is None for c in choices[:-1])
        assert [m.reason for m in made.engine.seen if isinstance(m, Abort)] == ["stop", "stop"]
        assert not made.engine.rows, "the engine was told that nothing more is wanted"


@in_loop
async def test_a_stop_string_before_min_tokens_does_not_end_it() -> None:
    async with world() as (_, http):
        body = {"prompt": "a", "max_tokens": 30, "stop": "The", "min_tokens": 5}
        (choice,) = (await http.post(PATH, json=body)).json()["choices"]
        assert choice["finish_reason"] == "length"
        assert choice["text"].startswith("The answer")


@in_loop
async def test_a_stop_token_ends_it() -> None:
    async with world() as (_, http):
        body = {"prompt": "a", "max_tokens": 30, "stop_token_ids": [ord("w")]}
        (choice,) = (await http.post(PATH, json=body)).json()["choices"]
        assert (choice["text"], choice["finish_reason"], choice["matched_stop"]) == ("The ans", "stop", ord("w"))


@in_loop
async def test_logprobs_are_parallel_lists() -> None:
    async with world() as (_, http):
        body = {"prompt": "ab", "max_tokens": 3, "logprobs": 2}
        (choice,) = (await http.post(PATH, json=body)).json()["choices"]
        assert choice["logprobs"] == {
            "tokens": ["T", "h", "e"],
            "token_logprobs": [-0.5] * 3,
            "top_logprobs": [{"T": -0.5, "A": -0.75}, {"h": -0.5, "A": -0.75}, {"e": -0.5, "A": -0.75}],
            "text_offset": [0, 1, 2],
        }
        (choice,) = (await http.post(PATH, json={**body, "logprobs": 0})).json()["choices"]
        assert choice["logprobs"]["top_logprobs"] == [{"T": -0.5}, {"h": -0.5}, {"e": -0.5}]


@in_loop
async def test_every_choice_echoes_the_prompt_with_its_logprobs() -> None:
    """Known fault: the engine tells them once, and all choices but the first, which echoed its text, went without."""
    async with world() as (_, http):
        body = {"prompt": "ab", "max_tokens": 2, "echo": True, "logprobs": 1, "n": 2}
        choices = (await http.post(PATH, json=body)).json()["choices"]
        stream = events(await http.post(PATH, json={**body, "stream": True}))
    firsts = [next(e["choices"][0] for e in stream if e["choices"][0]["index"] == i) for i in range(2)]
    for choice in (*choices, *firsts):
        assert choice["text"].startswith("ab")
        assert choice["logprobs"]["tokens"][:2] == ["a", "b"]
        assert choice["logprobs"]["token_logprobs"][:2] == [None, -1.0]
    assert [choice["logprobs"]["text_offset"] for choice in choices] == [[0, 1, 2, 3]] * 2


@in_loop
async def test_echo_puts_the_prompt_and_its_logprobs_first() -> None:
    async with world() as (_, http):
        body = {"prompt": "ab", "max_tokens": 2, "echo": True, "logprobs": 1}
        (choice,) = (await http.post(PATH, json=body)).json()["choices"]
        assert choice["text"] == "abTh"
        assert choice["logprobs"]["tokens"] == ["a", "b", "T", "h"]
        assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -0.5, -0.5]
        assert choice["logprobs"]["top_logprobs"][0] is None
        assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]
        streamed = [e["choices"][0] for e in events(await http.post(PATH, json={**body, "stream": True}))]
        assert "".join(c["text"] for c in streamed) == "abTh"
        assert [t for c in streamed for t in c["logprobs"]["tokens"]] == ["a", "b", "T", "h"]
        assert [t for c in streamed for t in c["logprobs"]["text_offset"]] == [0, 1, 2, 3]


@in_loop
async def test_offsets_are_those_of_the_text_where_tokens_are_bytes_and_special_ones_are_hidden() -> None:
    """Known fault: every byte of a character counted as one, and so did all letters of a hidden token."""
    prompt = "é<|im_end|>ü"  # two bytes, one special token, two bytes
    async with world() as (_, http):
        body = {"prompt": prompt, "max_tokens": 30, "echo": True, "logprobs": 0}
        (choice,) = (await http.post(PATH, json=body)).json()["choices"]
        streamed = [e["choices"][0] for e in events(await http.post(PATH, json={**body, "stream": True}))]
        hidden = {**body, "prompt": [*"é".encode(), 258, *"ü".encode()]}
        (other,) = (await http.post(PATH, json=hidden)).json()["choices"]
    text, offsets = choice["text"], choice["logprobs"]["text_offset"]
    assert offsets[:6] == [0, 0, 1, 11, 11, 12]
    for token, at in zip(choice["logprobs"]["tokens"], offsets, strict=True):
        assert token.startswith("bytes:") or text.startswith(token, at), (token, at)
    assert [at for c in streamed for at in c["logprobs"]["text_offset"]] == offsets
    assert other["text"].startswith("éüT")
    assert other["logprobs"]["text_offset"][:6] == [0, 0, 1, 1, 1, 2]


@in_loop
async def test_a_prompt_can_be_scored_without_an_answer() -> None:
    async with world() as (_, http):
        body = {"prompt": "abc", "max_tokens": 0, "echo": True, "logprobs": 0}
        answer = (await http.post(PATH, json=body)).json()
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
        assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -1.0]
        assert answer["usage"]["completion_tokens"] == 0
        assert refusal(await http.post(PATH, json={"prompt": "abc", "max_tokens": 0}))["param"] == "max_tokens"


@in_loop
async def test_a_stream_is_the_whole_answer_in_pieces_that_split_no_character() -> None:
    async with world() as (_, http):
        parts = events(await http.post(PATH, json={"prompt": "abcd", "max_tokens": 100, "stream": True}))
    texts = [part["choices"][0]["text"] for part in parts]
    assert "".join(texts) == TEXT == ANSWER
    assert "🎉" in texts
    assert len(texts) > 30
    assert [part["choices"][0]["finish_reason"] for part in parts][-1] == "stop"
    assert len({part["id"] for part in parts}) == 1
    assert all("usage" not in part for part in parts)


@in_loop
async def test_usage_comes_last_in_a_stream_or_with_every_chunk() -> None:
    body = {"prompt": "abcd", "max_tokens": 3, "stream": True}
    async with world() as (_, http):
        parts = events(await http.post(PATH, json={**body, "stream_options": {"include_usage": True}}))
        assert [part["usage"] for part in parts[:-1]] == [None] * 3
        assert parts[-1]["choices"] == []
        assert parts[-1]["usage"]["completion_tokens"] == 3
        options = {"include_usage": False, "continuous_usage_stats": True}
        parts = events(await http.post(PATH, json={**body, "stream_options": options}))
        assert [part["usage"]["completion_tokens"] for part in parts] == [1, 2, 3]


@in_loop
async def test_the_stream_interval_makes_chunks_larger() -> None:
    async with world(stream_interval=10) as (_, http):
        parts = events(
            await http.post(PATH, json={"prompt": "a", "max_tokens": 40, "ignore_eos": True, "stream": True})
        )
    texts = [part["choices"][0]["text"] for part in parts]
    assert texts[0] == "T", "the first token comes at once"
    assert len(texts) <= 5
    assert "".join(texts) == TEXT + "The"[: len("".join(texts)) - len(TEXT)]
