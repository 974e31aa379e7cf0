"""Requests: a checked body becomes `Item`s, one per prompt, each with all that the engine and the answer need."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import msgspec

from tessera.core.config.types import Config
from tessera.core.errors import RequestError
from tessera.core.messages import Address, SamplingParams, Submit, choice_seed
from tessera.serve.chat import ChatTemplate, read_messages, template_values
from tessera.serve.checks import bad, is_batch, pick, shown
from tessera.serve.fields import CHAT, COMPLETION, GENERATE, MAX_BATCH
from tessera.serve.places import met_at, place_of
from tessera.serve.text import Tokenizer

COMPLETION_TOKENS = 16  # OpenAI's default of `max_tokens` for completions
GENERATE_TOKENS = 128  # SGLang's default of `max_new_tokens`
TOO_LONG = "context_length_exceeded"  # OpenAI's code, by which clients know that they should shorten what they sent
NO_TOKENIZER = "this server runs with --skip-tokenizer-init"
SPACE = 1 << 63
BOOTSTRAP_PORT = 8998  # the default of --disaggregation-bootstrap-port


@dataclass(frozen=True, slots=True)
class Limits:
    """What the model and the server allow. `vocab_size`: ids of the embedding, padding not counted. `num_dp`:
    data-parallel ranks, of which a request may name one. `rooms`: a request that names none must have a room. `role`:
    the server's in hand-overs; `bootstrap_port`: of a prefill server, where a request names none."""

    context_length: int
    vocab_size: int
    max_body: int = 32 << 20
    num_dp: int = 1
    rooms: bool = False
    role: str = "null"
    bootstrap_port: int = BOOTSTRAP_PORT

    @classmethod
    def of(cls, config: Config, vocab_size: int) -> Limits:
        """Those of a server so configured."""
        mesh, handover = config.mesh, config.handover
        return cls(
            config.model.context_length,
            vocab_size,
            config.serving.max_body_size,
            mesh.num_dp,
            mesh.follows_rooms,
            handover.role,
            handover.bootstrap_port or BOOTSTRAP_PORT,
        )


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt and how it is answered. `num_choices` are drawn, the best `num_kept` (by mean logprob) answered.

    `text`: the prompt as text, if it came so. `score_only`: nothing is to be generated (max_tokens 0).
    """

    tokens: list[int]
    params: SamplingParams
    num_choices: int = 1
    num_kept: int = 1
    stops: tuple[str, ...] = ()
    keep_stop: bool = False
    skip_special: bool = True
    score_only: bool = False
    priority: int = 0
    namespace: str = ""
    text: str | None = None
    dp_rank: int | None = None
    bootstrap_room: int | None = None
    bootstrap: Address | None = None

    def submit(self, request_id: str) -> Submit:
        """The message to the engine."""
        return Submit(
            request_id,
            self.tokens,
            self.params,
            self.num_choices,
            self.priority,
            self.namespace,
            self.dp_rank,
            self.bootstrap_room,
            self.bootstrap,
        )


@dataclass(frozen=True, slots=True)
class Request:
    """A whole request: its prompts, the client's own id, that of the batch it is part of, and what the answer shows."""

    items: list[Item]
    model: str | None = None
    rid: str | None = None
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    echo: bool = False
    logprobs: int = -1  # -1: not shown; k: with the k likeliest
    token_ids: bool = False
    batch: str | None = None


@dataclass(frozen=True, slots=True)
class Names:
    """What an endpoint calls the fields that errors name. `within`: the path of those of sampling."""

    prompt: str
    most: str = "max_tokens"
    least: str = "min_tokens"
    logprobs: str = "logprobs"
    within: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """How many tokens a request wants (None: what fits), and whether the client said so itself."""

    names: Names
    tokens: int | None
    explicit: bool


@dataclass(slots=True)
class Reader:
    """Reads bodies for one model: its tokenizer, template, limits and sampling defaults.

    Requests without a seed get one from `seed` and the order of arrival, so a run can be repeated; None: from chance.
    """

    limits: Limits
    tokenizer: Tokenizer | None
    template: ChatTemplate | None = None
    defaults: Mapping[str, float] = field(default_factory=dict)
    seed: int | None = None
    _arrivals: itertools.count[int] = field(default_factory=itertools.count)

    def completion(self, body: Any) -> Request:
        """`/v1/completions`."""
        values = COMPLETION.read(body)
        top = values.get("logprobs", -1)
        echo = values.get("echo", False)
        if echo and top >= 0:
            values["prompt_logprobs"] = top
        best = values.get("best_of", values.get("n", 1))
        if best < values.get("n", 1):
            raise bad("best_of", best, f"at least n ({values.get('n', 1)})")
        if best > values.get("n", 1) and values.get("stream"):
            raise RequestError("best_of: cannot stream before the best choices are known", "best_of")
        if "prompt" not in values:
            raise RequestError("prompt is missing", "prompt")
        ask = values.get("max_tokens", COMPLETION_TOKENS)
        if ask == 0 and not echo:
            raise bad("max_tokens", 0, "at least 1 (0 only with echo)")
        wanted = Wanted(Names("prompt"), ask, "max_tokens" in values)
        items = [
            self._item(values, tokens, text, wanted, best, top)
            for tokens, text in self._prompts(values["prompt"], "prompt", values.get("add_special_tokens", True))
        ]
        return self._request(values, items, top, echo)

    def chat(self, body: Any) -> Request:
        """`/v1/chat/completions`."""
        values = CHAT.read(body)
        if "messages" not in values:
            raise RequestError("messages is missing", "messages")
        top = values.get("top_logprobs", 0) if values.get("logprobs") else -1
        if values.get("top_logprobs") and top < 0:
            raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
        tokens, text = self.conversation(values)
        name = "max_completion_tokens" if "max_completion_tokens" in values else "max_tokens"
        ask = values.get(name)
        wanted = Wanted(Names("messages", name, logprobs="top_logprobs"), ask, ask is not None)
        item = self._item(values, tokens, text, wanted, values.get("n", 1), top)
        return self._request(values, [item], top)

    def conversation(self, values: Mapping[str, Any]) -> tuple[list[int], str]:
        """Token ids and text of the `messages` in checked values."""
        if self.template is None or self.tokenizer is None:
            why = NO_TOKENIZER if self.tokenizer is None else "the model has no chat template; see --chat-template"
            raise RequestError(f"messages: {why}; use /v1/completions", "messages")
        messages = read_messages(values["messages"])
        resume = values.get("continue_final_message", False)
        if resume and values.get("add_generation_prompt"):
            message = (
                "continue_final_message cannot go with add_generation_prompt: the one ends what the other leaves open"
            )
            raise RequestError(message, "continue_final_message")
        prompt = not resume and values.get("add_generation_prompt", True)
        text = self.template.render(messages, prompt, resume, template_values(values))
        return self.encode(text, "messages", values.get("add_special_tokens", False)), text

    def generate(self, body: Any) -> Request | list[Request]:
        """`/generate`: one request, or for a batch one per prompt."""
        values = GENERATE.read(body)
        name = "input_ids" if "input_ids" in values else "text"
        if ("input_ids" in values) == ("text" in values):
            raise RequestError("exactly one of text and input_ids must be given", name)
        batch = is_batch(values[name])
        prompts = self._prompts(values[name], name, True, name == "text")
        requests = []
        for i, (tokens, text) in enumerate(prompts):
            own = {k: pick(v, i, len(prompts), k) for k, v in values.items() if k not in ("text", "input_ids")}
            if batch and isinstance(name_of_all := values.get("rid"), str):  # as SGLang names them
                own |= {"rid": f"{name_of_all}_{i}", "batch": name_of_all}
            own |= {"bootstrap_room": room + i} if isinstance(room := values.get("bootstrap_room"), int) else {}
            requests.append(self._native(own, tokens, text))
        return requests if batch else requests[0]

    def _native(self, own: dict[str, Any], tokens: list[int], text: str | None) -> Request:
        values = {**own, **own.get("sampling_params", {})}
        values.setdefault("seed", values.get("sampling_seed"))
        top = -1
        if own.get("return_logprob"):
            top = own.get("top_logprobs_num", 0)
            start = own.get("logprob_start_len", -1)
            if start >= len(tokens):
                raise bad("logprob_start_len", start, f"less than the prompt's {len(tokens)} tokens")
            if start >= 0:
                values["prompt_logprobs"], values["logprob_start"] = top, start
            values["token_ids_logprob"] = self._ids(own.get("token_ids_logprob", ()), "token_ids_logprob")
        else:
            values.pop("token_ids_logprob", None)
        prompt = "input_ids" if text is None else "text"
        names = Names(prompt, "max_new_tokens", "min_new_tokens", "top_logprobs_num", "sampling_params.")
        wanted = Wanted(names, values.get(names.most, GENERATE_TOKENS), names.most in values)
        item = self._item(values, tokens, text, wanted, values.get("n", 1), top)
        return self._request(values, [item], top)

    def _request(self, values: Mapping[str, Any], items: list[Item], logprobs: int, echo: bool = False) -> Request:
        options = values.get("stream_options", {})
        if options and not values.get("stream"):
            raise RequestError("stream_options needs stream: true", "stream_options")
        limits = self.limits
        places = [
            place_of(values, i, len(items), limits.num_dp, limits.rooms)
            | {"bootstrap": met_at(values, i, len(items), limits.role, limits.bootstrap_port)}
            for i in range(len(items))
        ]
        return Request(
            [replace(item, **place) for item, place in zip(items, places, strict=True)],
            values.get("model"),
            values.get("rid", values.get("request_id")),
            values.get("stream", False),
            options.get("include_usage", False),
            options.get("continuous_usage_stats", False),
            echo,
            logprobs,
            values.get("return_token_ids", False),
            values.get("batch"),
        )

    def _item(
        self,
        values: Mapping[str, Any],
        tokens: list[int],
        text: str | None,
        wanted: Wanted,
        best: int,
        top: int,
    ) -> Item:
        keep = values.get("n", 1)
        top, names = top if best == keep else max(top, 0), wanted.names
        params = self._params(values, self._room(len(tokens), wanted), top, names)
        stops = values.get("stop", ())
        if stops and self.tokenizer is None:
            field = f"{names.within}stop"
            raise RequestError(f"{field}: {NO_TOKENIZER}; use stop_token_ids", field)
        return Item(
            tokens,
            params,
            best,
            keep,
            stops,
            values.get("no_stop_trim", False) or values.get("include_stop_str_in_output", False),
            values.get("skip_special_tokens", True),
            wanted.tokens == 0,
            values.get("priority", 0),
            _namespace(values),
            text,
        )

    def _room(self, num_prompt: int, wanted: Wanted) -> int:
        """Tokens to generate: what was asked, refused where it does not fit; a default is cut to what fits."""
        ask, room = wanted.tokens, self.limits.context_length - num_prompt
        if room < 1:
            raise RequestError(
                f"the prompt has {num_prompt} tokens; the context is {self.limits.context_length} tokens, "
                "of which at least one must be left for the answer",
                wanted.names.prompt,
                code=TOO_LONG,
            )
        if ask is None or (ask > room and not wanted.explicit):
            return room
        if ask > room:
            field = wanted.names.within + wanted.names.most
            raise RequestError(
                f"{field}: found {ask}, allowed are at most {room}: the prompt has {num_prompt} tokens and the "
                f"context is {self.limits.context_length}",
                field,
                code=TOO_LONG,
            )
        return max(ask, 1)

    def _params(self, values: Mapping[str, Any], max_new: int, top: int, names: Names) -> SamplingParams:
        given = {**self.defaults, **values}
        least, bias, stops = values.get(names.least, 0), f"{names.within}logit_bias", f"{names.within}stop_token_ids"
        if least > max_new:
            raise bad(names.within + names.least, least, f"at most the tokens to generate ({max_new})")
        if top > self.limits.vocab_size:
            raise bad(names.logprobs, top, f"at most the vocabulary's {self.limits.vocab_size}")
        return SamplingParams(
            max_new_tokens=max_new,
            min_new_tokens=least,
            temperature=float(given.get("temperature", 1.0)),
            top_k=int(given.get("top_k", -1)) or -1,
            top_p=float(given.get("top_p", 1.0)),
            min_p=float(given.get("min_p", 0.0)),
            presence_penalty=values.get("presence_penalty", 0.0),
            frequency_penalty=values.get("frequency_penalty", 0.0),
            repetition_penalty=float(given.get("repetition_penalty", 1.0)),
            logit_bias={i: values["logit_bias"][i] for i in self._ids(values.get("logit_bias", ()), bias)},
            seed=self._seed(values.get("seed")),
            ignore_eos=values.get("ignore_eos", False),
            stop_token_ids=tuple(self._ids(values.get("stop_token_ids", ()), stops)),
            logprobs=top,
            prompt_logprobs=values.get("prompt_logprobs", -1),
            logprob_start=values.get("logprob_start", 0),
            token_ids_logprob=tuple(values.get("token_ids_logprob", ())),
        )

    def _seed(self, asked: int | None) -> int:
        if asked is not None:
            return asked % SPACE
        return secrets.randbits(63) if self.seed is None else choice_seed(self.seed, next(self._arrivals) + 1)

    def _ids(self, ids: Any, field: str) -> list[int]:
        """Checks token ids against the vocabulary."""
        size = self.limits.vocab_size
        try:
            return msgspec.convert(list(ids), list[Annotated[int, msgspec.Meta(ge=0, lt=size)]])
        except msgspec.ValidationError:
            wrong = next(i for i in ids if type(i) is not int or not 0 <= i < size)
            raise bad(field, wrong, f"token ids from 0 to {size - 1}") from None

    def encode(self, text: str, field: str, add_special: bool) -> list[int]:
        """Token ids of a text. One that cannot fit the context is refused before it is encoded."""
        if self.tokenizer is None:
            raise RequestError(f"{field}: {NO_TOKENIZER}; send token ids", field)
        most = self.limits.context_length * self.tokenizer.longest
        if len(text) > most:
            wrong = f"{field}: found {len(text)} characters, the context holds at most {most}"
            raise RequestError(wrong, field, code=TOO_LONG)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"{field}: no valid Unicode: {error.reason} at {error.start}", field) from None
        tokens = self.tokenizer.encode(text, add_special)
        if tokens and max(tokens) >= self.limits.vocab_size:
            wrong = f"{field}: the tokenizer makes token {max(tokens)} of it, the model knows 0 to"
            raise RequestError(f"{wrong} {self.limits.vocab_size - 1}; is it the model's? See --tokenizer-path", field)
        return tokens

    def _prompts(
        self, value: Any, field: str, add_special: bool, text_only: bool | None = None
    ) -> list[tuple[list[int], str | None]]:
        """Prompts of a field: a string, strings, token ids, or lists of token ids."""
        many = value if is_batch(value) else [value]
        if len(many) > MAX_BATCH:
            raise RequestError(f"{field}: found {len(many)} prompts, allowed are at most {MAX_BATCH}", field)
        prompts: list[tuple[list[int], str | None]] = []
        for one in many:
            if isinstance(one, str) and text_only is not False:
                tokens, text = self.encode(one, field, add_special), one
            elif isinstance(one, list) and not text_only:
                tokens, text = self._ids(one, field), None
            else:
                kinds = {True: "a string or a list of strings", False: "a list of token ids, or a list of such lists"}
                raise bad(field, one, kinds.get(text_only, "text or token ids, or a list of them"))  # type: ignore[arg-type]
            if not tokens:
                raise RequestError(f"{field}: found {shown(one)}, which is no token; at least one is needed", field)
            prompts.append((tokens, text))
        return prompts


def _namespace(values: Mapping[str, Any]) -> str:
    parts = (values.get("cache_salt"), values.get("extra_key"))
    return "\0".join(p or "" for p in parts) if any(parts) else ""
