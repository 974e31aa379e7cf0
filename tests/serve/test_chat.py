"""`/v1/chat/completions`: messages become the prompt by the model's template; answers are in OpenAI's form."""

from __future__ import annotations

from typing import Any

import pytest

from serve.support import World, events, in_loop, refusal, world
from tessera.core.errors import ModelError
from tessera.core.messages import Submit
from tessera.serve.chat import ChatTemplate

PATH = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def prompt(made: World) -> str:
    (submit,) = [m for m in made.engine.seen if isinstance(m, Submit)][-1:]
    assert made.server.reader.tokenizer is not None
    return made.server.reader.tokenizer.decode(submit.tokens, skip_special=False)


@in_loop
async def test_a_whole_answer() -> None:
    async with world() as (made, http):
        answer = (await http.post(PATH, json={"messages": HI, "max_tokens": 10, "n": 2})).json()
        assert prompt(made) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert answer["object"] == "chat.completion"
    assert [c["index"] for c in answer["choices"]] == [0, 1]
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "The answer", "refusal": None}
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 20


@in_loop
async def test_a_stream_says_whose_turn_it_is_and_then_what_is_said() -> None:
    body = {"messages": HI, "max_tokens": 100, "stream": True, "n": 2, "stream_options": {"include_usage": True}}
    async with world() as (_, http):
        parts = events(await http.post(PATH, json=body))
    assert all(part["object"] == "chat.completion.chunk" for part in parts)
    assert parts[-1]["choices"] == []
    assert parts[-1]["usage"]["completion_tokens"] > 80
    for index in range(2):
        mine = [p["choices"][0] for p in parts[:-1] if p["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in mine) == "The answer is 42. Grüße, 世界 🎉! "
        assert [c["finish_reason"] for c in mine][-1] == "stop"
        assert all(c["finish_reason"] is None for c in mine[:-1])


@in_loop
async def test_logprobs_come_with_bytes_and_the_likeliest() -> None:
    body = {"messages": HI, "max_tokens": 2, "logprobs": True, "top_logprobs": 2}
    async with world() as (_, http):
        (choice,) = (await http.post(PATH, json=body)).json()["choices"]
        first = choice["logprobs"]["content"][0]
        assert {k: first[k] for k in ("token", "bytes", "logprob")} == {"token": "T", "bytes": [84], "logprob": -0.5}
        assert [t["token"] for t in first["top_logprobs"]] == ["T", "A"]
        parts = [e["choices"][0] for e in events(await http.post(PATH, json={**body, "stream": True}))]
        tokens = [entry["token"] for c in parts if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert tokens == ["T", "h"]
        without = {"messages": HI, "top_logprobs": 2}
        assert refusal(await http.post(PATH, json=without))["param"] == "top_logprobs"


@in_loop
async def test_content_in_parts_is_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    async with world() as (made, http):
        await http.post(PATH, json={"messages": [{"role": "user", "content": parts}], "max_tokens": 1})
        assert "user\na\nb<|im_end|>" in prompt(made)


@in_loop
async def test_a_conversation_can_end_open() -> None:
    talk = [*HI, {"role": "assistant", "content": "The ans"}]
    async with world() as (made, http):
        body = {"messages": talk, "max_tokens": 1, "continue_final_message": True}
        assert (await http.post(PATH, json=body)).status_code == 200
        assert prompt(made).endswith("assistant\nThe ans")
        error = refusal(await http.post(PATH, json={**body, "add_generation_prompt": True}))
        assert error["param"] == "continue_final_message"
        await http.post(PATH, json={"messages": HI, "max_tokens": 1, "add_generation_prompt": False})
        assert prompt(made).endswith("hi<|im_end|>\n")


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hi", "messages"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "boss", "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([*HI, {"role": "user", "content": "x", "colour": 1}], "messages[1].colour"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls"),
        (["hi"], "messages[0]"),
    ],
)
@in_loop
async def test_bad_messages_are_refused_by_place(messages: Any, param: str) -> None:
    async with world() as (_, http):
        assert refusal(await http.post(PATH, json={"messages": messages}))["param"] == param
        image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
        error = refusal(await http.post(PATH, json={"messages": image}))
        assert error["param"] == "messages[0].content[0].type"
        assert "found 'image_url', allowed is 'text': this model reads text only" in error["message"]


@in_loop
async def test_what_a_refused_field_accepts_is_said_in_json_and_only_of_that_field() -> None:
    async with world() as (_, http):
        form = refusal(await http.post(PATH, json={"messages": HI, "response_format": {"type": "json_object"}}))
        assert '(accepted: null, {"type":"text"})' in form["message"]
        assert "accepted" not in refusal(await http.post(PATH, json={"messages": HI, "regex": "a+"}))["message"]


def test_a_template_may_refuse_and_cannot_reach_out_of_its_sandbox() -> None:
    say = [{"role": "user", "content": "x"}]
    with pytest.raises(ValueError, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}", {}).render(say)
    with pytest.raises(ValueError, match="refused"):
        ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}", {}).render(say)
    with pytest.raises(ModelError, match="line 1"):
        ChatTemplate("{% if %}", {})


def test_templates_get_what_models_use() -> None:
    source = (
        "{{ bos_token }}{% generation %}{{ messages[0].content | tojson }}{% endgeneration %}"
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}{{ deep }}"
        "{{ strftime_now('%Y') | length }}"
    )
    talk = [{"role": "user", "content": 'é"'}, {"role": "user", "content": ""}]
    text = ChatTemplate(source, {"bos_token": "<s>"}).render(talk, more={"deep": True})
    assert text == '<s>"é\\""userTrue4'


@in_loop
async def test_template_variables_come_with_a_request() -> None:
    async with world() as (made, http):
        made.server.reader.template = ChatTemplate("{{ colour }} {{ enable_thinking }} {{ reasoning_effort }}", {})
        body = {"messages": HI, "max_tokens": 1, "chat_template_kwargs": {"colour": "red"}, "reasoning_effort": "low"}
        assert (await http.post(PATH, json=body)).status_code == 200
        assert prompt(made) == "red True low"
        error = refusal(await http.post(PATH, json={"messages": HI, "chat_template_kwargs": {"messages": []}}))
        assert error["param"] == "chat_template_kwargs"
        made.server.reader.template = None
        assert "no chat template" in refusal(await http.post(PATH, json={"messages": HI}))["message"]
