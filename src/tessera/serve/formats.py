"""Parts of answers that several endpoints share: usage, ids, logprobs in the forms of completions and of chat."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tessera.core.messages import TokenLogprobs
from tessera.serve.answer import Usage
from tessera.serve.text import Tokenizer

LOWEST = -9999.0  # stands for minus infinity, which JSON does not have (OpenAI's own convention)


def finite(logprob: float | None) -> float | None:
    """A logprob that JSON can hold."""
    return logprob if logprob is None or logprob > LOWEST else LOWEST


def usage_body(items: Iterable[Usage]) -> dict[str, Any]:
    """`usage` of an answer."""
    items = list(items)
    prompt = sum(one.num_prompt for one in items)
    generated = sum(one.num_generated for one in items)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(one.num_cached for one in items)},
    }


def namer(tokenizer: Tokenizer | None) -> Callable[[int], str]:
    """How a token is written: its text, or its id where no tokenizer is loaded."""
    return (lambda token: f"token_id:{token}") if tokenizer is None else tokenizer.token_text


class Offsets:
    """Where the tokens of one choice begin in its text, token by token, counted in characters.

    A token that goes on with a character begins where that does. `prompt`: its text, if that is shown: a special token
    may stand in it. `skip_special`: in what is generated they do not.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt: str, skip_special: bool) -> None:
        self._tokenizer, self._prompt, self._skip = tokenizer, prompt, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at = 0

    def next(self, token: int) -> int:
        """Where the next token begins."""
        at = self._at
        if self._tokenizer is not None and self._shown(self._tokenizer, token):
            self._at += len(self._decoder.decode(self._tokenizer.token_bytes(token)))
        return at

    def _shown(self, tokenizer: Tokenizer, token: int) -> bool:
        if token not in tokenizer.special_ids:
            return True
        if self._at < len(self._prompt):
            return self._prompt.startswith(tokenizer.token_text(token), self._at)
        return not self._skip


def completion_logprobs(
    tokenizer: Tokenizer | None, tokens: Sequence[int], entries: Sequence[TokenLogprobs], top: int, offsets: Offsets
) -> dict[str, Any]:
    """`logprobs` of completions: parallel lists."""
    name = namer(tokenizer) if tokenizer is None else tokenizer.token_name
    names = [name(token) for token in tokens]
    return {
        "tokens": names,
        "token_logprobs": [finite(entry.logprob) for entry in entries],
        "top_logprobs": [_top(own, entry, top, name) for own, entry in zip(names, entries, strict=True)],
        "text_offset": [offsets.next(token) for token in tokens],
    }


def _top(own: str, entry: TokenLogprobs, top: int, name: Callable[[int], str]) -> dict[str, float | None] | None:
    """The likeliest tokens and the token itself; None for the first of a prompt, which nothing predicts."""
    if entry.logprob is None:
        return None
    found: dict[str, float | None] = {}
    for token, logprob in zip(entry.top_ids[:top], entry.top_logprobs, strict=False):
        found.setdefault(name(token), finite(logprob))
    found[own] = finite(entry.logprob)  # also where another token has the same text
    return found


def chat_logprobs(
    tokenizer: Tokenizer | None, tokens: Sequence[int], entries: Sequence[TokenLogprobs], top: int
) -> dict[str, Any]:
    """`logprobs` of chat: one object per token, with its bytes."""

    def one(token: int, logprob: float | None) -> dict[str, Any]:
        raw = b"" if tokenizer is None else tokenizer.token_bytes(token)
        return {"token": namer(tokenizer)(token), "bytes": list(raw), "logprob": finite(logprob)}

    content = [
        {
            **one(token, entry.logprob),
            "top_logprobs": [one(t, p) for t, p in zip(entry.top_ids[:top], entry.top_logprobs, strict=False)],
        }
        for token, entry in zip(tokens, entries, strict=True)
    ]
    return {"content": content, "refusal": None}
