"""What two servers must answer alike: answers without what is of one run alone, and where two of them differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from matrix.whole import Answered

TOLERANCE = 1e-6  # of logprobs in float64
PRIVATE = ("id", "e2e_latency", "handover", "created", "model", "object", "cached_tokens", "prompt_tokens_details")
PARALLEL = ("tokens", "token_logprobs", "top_logprobs", "text_offset", "content")


def plain(found: Answered) -> Any:
    """An answer without what may differ; a stream as the whole that it adds up to."""
    if not found.stream:
        (body,) = found.bodies
        return [found.status, public(body)]
    for event in found.bodies:
        assert "error" not in event, event
    whole = grown(found.bodies) if "meta_info" in found.bodies[0] else joined(found.bodies)
    return [found.status, public(whole)]


def public(value: Any) -> Any:
    """Without what is of this run alone."""
    if isinstance(value, dict):
        return {name: public(one) for name, one in value.items() if name not in PRIVATE}
    return [public(one) for one in value] if isinstance(value, list) else value


def grown(events: Sequence[Any]) -> Any:
    """The last of the growing answers of `/generate`, of each of several."""
    last: dict[int, Any] = {}
    for event in events:
        index = event.get("index", -1)
        before = last.get(index, {"text": "", "output_ids": []})
        assert event["text"].startswith(before["text"])
        assert event["output_ids"][: len(before["output_ids"])] == before["output_ids"]
        last[index] = event
    if list(last) == [-1]:
        return last[-1]
    assert sorted(last) == list(range(len(last)))
    return [{name: value for name, value in last[i].items() if name != "index"} for i in sorted(last)]


def joined(events: Sequence[Any]) -> Any:
    """The whole of chunks in one of OpenAI's forms."""
    found: dict[int, Any] = {}
    usage = None
    for event in events:
        usage = event.get("usage") or usage
        for part in event["choices"]:
            add(
                found.setdefault(
                    part["index"], {"index": part["index"], "text": "", "token_ids": [], "logprobs": None}
                ),
                part,
            )
    chat = events[0]["object"].startswith("chat")
    for choice in found.values():
        if chat:
            text = choice.pop("text")
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
    assert sorted(found) == list(range(len(found)))
    return {"choices": [found[i] for i in sorted(found)], "usage": usage}


def add(choice: dict[str, Any], part: dict[str, Any]) -> None:
    """A chunk to its choice."""
    assert choice.get("finish_reason") is None, "a chunk after the end"
    choice["text"] += part["text"] if "text" in part else part["delta"].get("content", "")
    choice["token_ids"] += part.get("token_ids", [])
    choice["finish_reason"], choice["matched_stop"] = part["finish_reason"], part.get("matched_stop")
    if (logprobs := part["logprobs"]) is not None:
        if choice["logprobs"] is None:
            choice["logprobs"] = logprobs
        else:
            for name in PARALLEL:
                if name in logprobs:
                    choice["logprobs"][name] += logprobs[name]


def apart(found: Any, wanted: Any, where: str = "") -> Iterator[str]:
    """Where two answers differ, floats by more than rounding."""
    if isinstance(found, float) and isinstance(wanted, float):
        if abs(found - wanted) > TOLERANCE:
            yield f"{where}: {found} is not {wanted}"
    elif isinstance(found, dict) and isinstance(wanted, dict) and found.keys() == wanted.keys():
        for name in wanted:
            yield from apart(found[name], wanted[name], f"{where}.{name}")
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
            yield from apart(one, other, f"{where}[{i}]")
    elif found != wanted:
        yield f"{where}: {found!r} is not {wanted!r}"


def begun(found: Answered, wanted: Any, where: str) -> list[str]:
    """What a client saw that ended its call early: of each choice a beginning of the whole one."""
    if found.status != 200 or wanted[0] != 200:
        return []
    seen: dict[int, list[int]] = {}
    for event in found.bodies:
        for index, tokens in drawn(event).items():
            seen[index] = seen.get(index, []) + tokens if "choices" in event else tokens
    whole = drawn(wanted[1])
    return [
        f"{where}, ended early: choice {index} has {tokens}, which does not begin {whole[index]}"
        for index, tokens in seen.items()
        if tokens != whole[index][: len(tokens)]
    ]


def drawn(body: Any) -> dict[int, list[int]]:
    """Token ids by choice."""
    if isinstance(body, list):
        return {i: one["output_ids"] for i, one in enumerate(body)}
    if "choices" in body:
        return {choice["index"]: choice.get("token_ids", []) for choice in body["choices"]}
    return {body.get("index", 0): body["output_ids"]}


def cached(body: Any) -> Iterator[tuple[int, int]]:
    """Tokens from the cache and of the prompt, wherever an answer tells them."""
    if isinstance(body, list):
        for one in body:
            yield from cached(one)
    elif isinstance(body, dict):
        for value in body.values():
            yield from cached(value)
        if "cached_tokens" in body and "prompt_tokens" in body:
            yield body["cached_tokens"], body["prompt_tokens"]
        if "prompt_tokens_details" in body:
            yield body["prompt_tokens_details"]["cached_tokens"], body["prompt_tokens"]
