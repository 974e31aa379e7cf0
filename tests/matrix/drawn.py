"""Random requests with every field that changes an answer, and random ways to serve them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from matrix.points import Point, refusals
from matrix.whole import Call, Flags

CONTEXT, VOCAB = 128, 263  # of the byte tokenizer 259, and some that are no text; padded wherever it is cut
SHARED = "The layout never changes the answer: whatever is cut, is cut so that every tile fits. " * 2
STOPS = ["a", "e", "ab", "\n", " ", "\u00e9", "0", "zz", "T", "\u0442"]


def rarely(strategy: st.SearchStrategy[Any], other: Any = None) -> st.SearchStrategy[Any]:
    """`other`, and once in a while something else."""
    return st.one_of(st.just(other), st.just(other), st.just(other), strategy)


TEXT = st.builds(
    lambda shared, tail: (SHARED[:shared] + tail) or "x",
    st.one_of(st.integers(0, 125), st.sampled_from([0, 1, 16, 32, 48, 100])),
    st.text(st.sampled_from("abc 01\u00e9\u0442"), max_size=12),
)
TOKENS = st.one_of(
    TEXT.map(lambda text: list(text.encode())[:126]),
    st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=40),
)
SAMPLING: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([0, 0, 0.5, 1.0, 1.6]),
    "top_k": st.sampled_from([-1, 0, 1, 3, 40, 263, 1000]),
    "top_p": st.sampled_from([0.2, 0.7, 0.95, 1.0]),
    "min_p": st.sampled_from([0.0, 0.1, 0.6]),
    "presence_penalty": st.sampled_from([-1.5, 0.0, 1.2]),
    "frequency_penalty": st.sampled_from([-0.5, 0.0, 1.1]),
    "repetition_penalty": st.sampled_from([0.6, 1.0, 1.4]),
    "logit_bias": st.dictionaries(
        st.integers(0, VOCAB - 1).map(str) | st.sampled_from(["1", "97", "262"]),
        st.sampled_from([-100, -3, 2, 5, 100]),
        max_size=5,
    ),
    "stop": st.lists(st.sampled_from(STOPS), max_size=4) | st.sampled_from(STOPS),
    "stop_token_ids": st.builds(
        lambda start, length: list(range(start, min(start + length, VOCAB))), st.integers(0, 250), st.integers(0, 40)
    ),
    "ignore_eos": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "no_stop_trim": st.booleans(),
    "n": st.sampled_from([1, 1, 2, 3, 5]),
}
PLACE: dict[str, st.SearchStrategy[Any]] = {
    "priority": st.integers(-2, 2),
    "extra_key": st.sampled_from(["", "other"]),
    "cache_salt": st.sampled_from(["", "salt"]),
}
OPENAI: dict[str, st.SearchStrategy[Any]] = {
    **SAMPLING,
    **PLACE,
    "min_tokens": st.integers(0, 9),
    "include_stop_str_in_output": st.booleans(),
}
MAX_TOKENS = st.sampled_from([1, 2, 5, 9, 20])


def _whole(body: dict[str, Any], seed: int, stream: bool, path: str) -> dict[str, Any]:
    """What makes answers comparable: of OpenAI's forms token ids and usage. Without a seed the order of arrival is."""
    own = {} if seed < 0 else {"seed": seed}
    if path == "/generate":
        return {**body, "sampling_params": {**body["sampling_params"], **own}, "stream": stream}
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream and "best_of" not in body else {}
    return {**body, **own, "return_token_ids": True, **options}


@st.composite
def generate(draw: st.DrawFn) -> dict[str, Any]:
    """A body of `/generate`."""
    sampling = st.fixed_dictionaries(
        {},
        optional={
            **SAMPLING,
            "max_new_tokens": MAX_TOKENS | rarely(st.just(0), 7),
            "min_new_tokens": st.integers(0, 9),
        },
    )
    optional = {
        **PLACE,
        "return_logprob": st.booleans(),
        "logprob_start_len": st.sampled_from([-1, 0, 0, 1, 5, 16, 31, 64]),
        "top_logprobs_num": st.integers(0, 6),
        "token_ids_logprob": st.lists(st.integers(0, VOCAB - 1), max_size=3),
        "return_text_in_logprobs": st.booleans(),
    }
    body = draw(st.fixed_dictionaries({"sampling_params": sampling}, optional=optional))
    if draw(rarely(st.just(True), False)):
        many = st.lists(TEXT, min_size=1, max_size=3)
        return (
            {"text": draw(many), **body}
            if draw(st.booleans())
            else {"input_ids": draw(st.lists(TOKENS, min_size=1, max_size=3)), **body}
        )
    return {"text": draw(TEXT), **body} if draw(st.booleans()) else {"input_ids": draw(TOKENS), **body}


@st.composite
def completion(draw: st.DrawFn) -> dict[str, Any]:
    """A body of `/v1/completions`."""
    optional = {**OPENAI, "logprobs": st.integers(0, 6), "echo": st.booleans(), "max_tokens": MAX_TOKENS | st.just(0)}
    body = draw(st.fixed_dictionaries({}, optional=optional))
    if draw(rarely(st.just(True), False)):
        body["best_of"] = body.get("n", 1) + draw(st.integers(0, 2))
    prompt = TEXT | TOKENS | st.lists(TEXT, min_size=1, max_size=3) | st.lists(TOKENS, min_size=1, max_size=3)
    return {"prompt": draw(prompt), **body}


@st.composite
def chat(draw: st.DrawFn) -> dict[str, Any]:
    """A body of `/v1/chat/completions`."""
    optional = {
        **OPENAI,
        "logprobs": st.booleans(),
        "top_logprobs": st.integers(0, 6),
        "max_completion_tokens": MAX_TOKENS,
    }
    body = draw(st.fixed_dictionaries({"max_tokens": MAX_TOKENS}, optional=optional))
    if not body.get("logprobs"):
        body.pop("top_logprobs", None)
    return {"messages": [{"role": "user", "content": draw(TEXT)[-70:]}], **body}


FORMS = {"/generate": generate(), "/v1/completions": completion(), "/v1/chat/completions": chat()}


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """A call at some time, which some clients end early."""
    path = draw(st.sampled_from(sorted(FORMS)))
    body = _whole(draw(FORMS[path]), draw(st.integers(-2, 1 << 40)), draw(st.booleans()), path)
    at = draw(st.one_of(st.just(0), st.integers(0, 60)))
    leaves = draw(rarely(st.integers(0, 25)))
    return Call(path, body, at, leaves, draw(st.sampled_from(["leave", "abort"])))


@st.composite
def layouts(draw: st.DrawFn) -> Flags:
    """How ranks are laid out: as the matrix has it, four ranks at most."""
    attn, dp = draw(st.sampled_from([(1, 1), (1, 1), (1, 1), (2, 1), (2, 1), (1, 2), (1, 2), (2, 2)]))
    ep = draw(st.sampled_from([e for e in (1, 2, 4) if attn * dp % e == 0]))
    dense = draw(st.sampled_from(["tp", "1"]))
    overlap = draw(st.booleans())
    chunk = draw(st.sampled_from([1, 3, 7, 20, 64, -1]))
    lm_head, travel = dp > 1 and draw(st.booleans()), ep > 1 and draw(st.booleans())
    point = Point("", attn, dp, ep, dense, lm_head, travel, draw(st.booleans()), overlap, chunk)
    assert not refusals(point)
    flags = point.flags()
    if dp > 1:
        flags["load_balance_method"] = draw(
            st.sampled_from(["round_robin", "total_requests", "total_tokens", "shortest_queue", "minimum_tokens"])
        )
    return flags


SCHEDULES = st.fixed_dictionaries(
    {
        "page_size": st.sampled_from([1, 4, 16]),
        "max_total_tokens": st.sampled_from([144, 176, 256, 2048]),
        "max_running_requests": st.sampled_from([1, 2, 4, 16]),
    },
    optional={
        "disable_overlap_schedule": st.just(True),
        "disable_radix_cache": st.just(True),
        "schedule_policy": st.sampled_from(["fcfs", "lpm", "priority"]),
        "max_prefill_tokens": st.sampled_from([64, 70]),
        "stream_interval": st.sampled_from([1, 3, 50]),
        "moe_a2a_padded_tokens": st.sampled_from([0, 12]),
    },
)


def servers() -> st.SearchStrategy[Flags]:
    """Layout and schedule of one server."""
    return st.builds(lambda layout, schedule: {**layout, **schedule}, layouts(), SCHEDULES)


@dataclass(frozen=True)
class Case:
    """What is asked of which deployment of a model. Two servers: prefill and decode apart."""

    model: str
    both: Flags
    servers: list[Flags]
    calls: list[Call]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Anything."""
    made = draw(st.lists(servers(), min_size=1, max_size=2))
    if len(made) == 1 and "dp" not in made[0]:
        made[0]["replicas"] = draw(rarely(st.just(2), 1))
    for server in made[1:]:
        server["page_size"] = made[0]["page_size"]
    model = draw(st.sampled_from(["gqa", "hybrid", "mla"]))
    for server in made:
        if model == "hybrid" or "disable_radix_cache" in server:  # refused: there is no prefix cache
            server.pop("schedule_policy", None)
    both = draw(rarely(st.sampled_from([{"kv_cache_dtype": "fp8_e4m3"}]), {}))
    return Case(
        model,
        both,
        made,
        sorted(draw(st.lists(calls(), min_size=1, max_size=7)), key=lambda call: call.at),
    )
