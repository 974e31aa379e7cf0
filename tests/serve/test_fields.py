"""Every field that OpenAI's, SGLang's and vLLM's clients send is known: honoured, passed over, or refused by name."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from serve import known_fields as known
from serve.support import World, in_loop, refusal, world
from tessera.core.messages import Submit
from tessera.serve.checks import Fields
from tessera.serve.fields import CHAT, COMPLETION, GENERATE, SAMPLING_PARAMS

MESSAGES = [{"role": "user", "content": "hi"}]
ENDPOINTS: dict[str, tuple[str, Fields, dict[str, Any]]] = {
    "completions": ("/v1/completions", COMPLETION, {"prompt": "hi", "max_tokens": 2}),
    "chat": ("/v1/chat/completions", CHAT, {"messages": MESSAGES, "max_tokens": 2}),
    "generate": ("/generate", GENERATE, {"text": "hi", "sampling_params": {"max_new_tokens": 2}}),
}


def openai_fields(module: ModuleType) -> set[str]:
    """Names of the parameters of the `openai` client."""
    kinds = [kind for name, kind in vars(module).items() if name.startswith("CompletionCreateParams")]
    return {name for kind in kinds for name in getattr(kind, "__annotations__", {})}


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        (COMPLETION, openai_fields(completion_create_params)),
        (CHAT, openai_fields(chat_create_params)),
        (COMPLETION, known.SGLANG_COMPLETION.split()),
        (CHAT, known.SGLANG_CHAT.split()),
        (GENERATE, known.SGLANG_GENERATE.split()),
        (SAMPLING_PARAMS, known.SGLANG_SAMPLING_PARAMS.split()),
        (COMPLETION, known.VLLM_COMPLETION.split()),
        (CHAT, known.VLLM_CHAT.split()),
    ],
)
def test_no_field_of_the_others_is_unknown(fields: Fields, names: Any) -> None:
    assert len(names) > 10
    assert set(names) - fields.known == set()


@pytest.mark.parametrize("fields", [COMPLETION, CHAT, GENERATE, SAMPLING_PARAMS])
def test_a_field_is_in_one_class_only(fields: Fields) -> None:
    assert len(fields.known) == len(fields.honoured) + len(fields.passed) + len(fields.refused)


WRONG: list[Any] = [{"a": {"b": 1}}, "text", 2.5, -3, True, [["x"]]]


@pytest.mark.parametrize("name", ENDPOINTS)
@in_loop
async def test_refused_fields_are_refused_by_name_and_neutral_values_pass(name: str) -> None:
    path, fields, good = ENDPOINTS[name]
    async with world() as (_, http):
        for field, rule in fields.refused.items():
            value = next(v for v in WRONG if not any(type(v) is type(n) and v == n for n in rule.neutral))
            error = refusal(await http.post(path, json={**good, field: value}))
            assert error["param"] == field, error
            assert rule.remedy in error["message"]
            for neutral in [*rule.neutral, None]:
                found = await http.post(path, json={**good, field: neutral})
                assert found.status_code == 200, (field, neutral, found.text)


@pytest.mark.parametrize("name", ENDPOINTS)
@in_loop
async def test_fields_that_are_passed_over_change_nothing(name: str) -> None:
    path, fields, good = ENDPOINTS[name]
    async with world() as (made, http):
        await http.post(path, json=good)
        for field in fields.passed:
            assert (await http.post(path, json={**good, field: WRONG[0]})).status_code == 200, field
    plain, *others = [m.params for m in made.engine.seen if isinstance(m, Submit)]
    assert len(others) == len(fields.passed)
    assert {_without_seed(p) for p in others} == {_without_seed(plain)}


def _without_seed(params: Any) -> str:
    return repr({name: getattr(params, name) for name in params.__struct_fields__ if name != "seed"})


@pytest.mark.parametrize("name", ENDPOINTS)
@in_loop
async def test_honoured_fields_refuse_what_has_the_wrong_type(name: str) -> None:
    path, fields, good = ENDPOINTS[name]
    async with world() as (_, http):
        for field in fields.honoured:
            refused = [(await http.post(path, json={**good, field: value})) for value in WRONG]
            bad = [r for r in refused if r.status_code != 200]
            assert bad, f"{field} takes anything"
            for response in bad:
                error = refusal(response, 404 if field == "model" and response.status_code == 404 else 400)
                assert error["param"], error
                assert error["param"].split(".")[0].split("[")[0].split(" ")[0] in (field, *RELATED.get(field, ()))


# Fields whose bad value shows in another one.
RELATED = {"text": ("input_ids",), "input_ids": ("text",)}


@pytest.mark.parametrize("name", ENDPOINTS)
@in_loop
async def test_null_asks_for_nothing(name: str) -> None:
    path, fields, good = ENDPOINTS[name]
    async with world() as (_, http):
        nulls = dict.fromkeys(fields.known - good.keys())
        assert (await http.post(path, json={**nulls, **good})).status_code == 200


SENT: dict[str, tuple[Any, Any]] = {
    # field -> value in a request, value in the message to the engine
    "temperature": (0.25, 0.25),
    "top_p": (0.5, 0.5),
    "top_k": (7, 7),
    "min_p": (0.1, 0.1),
    "presence_penalty": (0.5, 0.5),
    "frequency_penalty": (-0.5, -0.5),
    "repetition_penalty": (1.5, 1.5),
    "logit_bias": ({"65": 3}, {65: 3.0}),
    "ignore_eos": (True, True),
    "stop_token_ids": ([7, 8], (7, 8)),
    "seed": (123, 123),
}


@pytest.mark.parametrize("name", ENDPOINTS)
@in_loop
async def test_what_is_honoured_reaches_the_engine(name: str) -> None:
    path, _, good = ENDPOINTS[name]
    async with world() as (made, http):
        for field, (value, expected) in SENT.items():
            if name == "generate":
                body = {**good, "sampling_params": {"max_new_tokens": 2, field: value}}
            else:
                body = {**good, field: value}
            assert (await http.post(path, json=body)).status_code == 200, field
            assert getattr(last_submit(made).params, field) == expected
        count = {"sampling_params": {"max_new_tokens": 2, "n": 3}} if name == "generate" else {"n": 3}
        assert (await http.post(path, json={**good, **count})).status_code == 200
        assert last_submit(made).n == 3
        assert (await http.post(path, json={**good, "priority": 5, "cache_salt": "pepper"})).status_code == 200
        assert (last_submit(made).priority, last_submit(made).namespace) == (5, "pepper\0")


@in_loop
async def test_tokens_to_generate_go_by_each_name() -> None:
    async with world() as (made, http):
        for path, body, most, least in [
            ("/v1/completions", {"prompt": "hi", "max_tokens": 9, "min_tokens": 3}, 9, 3),
            ("/v1/chat/completions", {"messages": MESSAGES, "max_completion_tokens": 9, "max_tokens": 5}, 9, 0),
            ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 5}, 5, 0),
            ("/generate", {"text": "hi", "sampling_params": {"max_new_tokens": 9, "min_new_tokens": 4}}, 9, 4),
            ("/v1/completions", {"prompt": "hi"}, 16, 0),
            ("/generate", {"text": "hi"}, 128, 0),
        ]:
            assert (await http.post(path, json=body)).status_code == 200, body
            params = last_submit(made).params
            assert (params.max_new_tokens, params.min_new_tokens) == (most, least)
        await http.post("/v1/chat/completions", json={"messages": MESSAGES, "ignore_eos": True})
        submit = last_submit(made)
        assert submit.params.max_new_tokens == 512 - len(submit.tokens), "what is left of the context"


@in_loop
async def test_requests_without_a_seed_get_their_own_and_a_run_can_be_repeated() -> None:
    seeds = []
    for _ in range(2):
        async with world() as (made, http):
            for _ in range(3):
                await http.post("/v1/completions", json={"prompt": "hi"})
            seeds.append([m.params.seed for m in made.engine.seen if isinstance(m, Submit)])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 3


def last_submit(made: World) -> Submit:
    """The request that reached the engine last."""
    return next(m for m in reversed(made.engine.seen) if isinstance(m, Submit))
