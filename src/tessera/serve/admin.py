"""Endpoints around generation: models, tokenizing, abort, cache, information, health, metrics."""

from __future__ import annotations

import asyncio
from typing import Any

from tessera.core.errors import RequestError, TesseraError
from tessera.core.messages import Flush
from tessera.serve.checks import Fields, Refused, bad, boolean, integer, listed, string
from tessera.serve.fields import CHAT, MAX_TOKENS
from tessera.serve.http import Call, error_body
from tessera.serve.metrics import CONTENT_TYPE
from tessera.serve.server import Server

PROBE_SECONDS = 20.0

TOKENIZE = Fields(
    honoured={
        "model": string,
        "prompt": lambda value, field: value,
        "text": lambda value, field: value,
        "add_special_tokens": boolean,
        **{name: CHAT.honoured[name] for name in ("messages", "add_generation_prompt", "continue_final_message")},
        "chat_template_kwargs": CHAT.honoured["chat_template_kwargs"],
        "reasoning_effort": CHAT.honoured["reasoning_effort"],
        "return_token_strs": boolean,
    },
    passed={},
    refused={"tools": CHAT.refused["tools"], "chat_template": CHAT.refused["chat_template"]},
)
DETOKENIZE = Fields(
    honoured={"model": string, "tokens": listed(integer(0, MAX_TOKENS), 1 << 22), "skip_special_tokens": boolean},
    passed={},
    refused={},
)
ABORT = Fields(
    honoured={"rid": string, "abort_all": boolean},
    passed={"abort_message": "the finish reason says it"},
    refused={"finished_reason": Refused("leave it out")},
)


async def models(server: Server, call: Call) -> None:
    """The one model that is served."""
    await call.reply(200, {"object": "list", "data": [_card(server)]})


async def model(server: Server, call: Call) -> None:
    """One model by its name."""
    server.require_model(call.path.removeprefix("/v1/models/"))
    await call.reply(200, _card(server))


def _card(server: Server) -> dict[str, Any]:
    options = server.options
    return {
        "id": options.served_model_name,
        "object": "model",
        "created": server.started,
        "owned_by": "tessera",
        "root": options.model_path,
        "parent": None,
        "max_model_len": server.reader.limits.context_length,
    }


async def tokenize(server: Server, call: Call) -> None:
    """Token ids of a prompt, or of messages."""
    values = TOKENIZE.read(await call.json(server.reader.limits.max_body))
    server.require_model(values.get("model"))
    reader = server.reader
    if "messages" in values:
        tokens, _ = reader.conversation(values)
    else:
        field = "text" if "text" in values else "prompt"
        text = values.get(field)
        if not isinstance(text, str):
            raise bad(field, text, "a string")
        tokens = reader.encode(text, field, values.get("add_special_tokens", True))
    answer: dict[str, Any] = {"tokens": tokens, "count": len(tokens), "max_model_len": reader.limits.context_length}
    if values.get("return_token_strs") and reader.tokenizer is not None:
        answer["token_strs"] = [reader.tokenizer.token_text(token) for token in tokens]
    await call.reply(200, answer)


async def detokenize(server: Server, call: Call) -> None:
    """Text of token ids (`text` as SGLang names it, `prompt` as vLLM does)."""
    values = DETOKENIZE.read(await call.json(server.reader.limits.max_body))
    server.require_model(values.get("model"))
    tokenizer = server.reader.tokenizer
    if tokenizer is None:
        raise RequestError("tokens: this server runs with --skip-tokenizer-init", "tokens")
    if "tokens" not in values:
        raise RequestError("tokens is missing", "tokens")
    text = tokenizer.decode(values["tokens"], values.get("skip_special_tokens", False))
    await call.reply(200, {"text": text, "prompt": text})


async def abort_request(server: Server, call: Call) -> None:
    """Ends a request by its id, or all of them."""
    values = ABORT.read(await call.json(server.reader.limits.max_body))
    if not values.get("abort_all") and "rid" not in values:
        raise RequestError("rid is missing (or abort_all: true)", "rid")
    await call.reply(200, {"aborted": server.abort(None if values.get("abort_all") else values["rid"])})


async def flush_cache(server: Server, call: Call) -> None:
    """Empties the prefix cache."""
    server.require_ready()
    server.client.send(Flush())
    await call.reply(200, {"flushed": True})


async def model_info(server: Server, call: Call) -> None:
    """What the model is."""
    reader, options = server.reader, server.options
    await call.reply(
        200,
        {
            "model_path": options.model_path,
            "served_model_name": options.served_model_name,
            "is_generation": True,
            "context_length": reader.limits.context_length,
            "vocab_size": reader.limits.vocab_size,
            "has_tokenizer": reader.tokenizer is not None,
            "has_chat_template": reader.template is not None,
            "preferred_sampling_params": dict(reader.defaults),
        },
    )


async def server_info(server: Server, call: Call) -> None:
    """The resolved configuration, what the engine built, and how it does."""
    state = {
        "ready": server.trouble is None,
        "in_flight": len(server.client),
        "last_step_age_s": round(server.client.age, 3),
    }
    await call.reply(200, {**server.options.info, "engine": server.client.info, "state": state})


async def health(server: Server, call: Call) -> None:
    """200 while the step loop ticks and requests are taken, else 503 with the reason; both tell the last tick's age."""
    age = round(server.client.age, 3)
    trouble = server.trouble
    if trouble is None:
        await call.reply(200, {"status": "ok", "last_step_age_s": age, "in_flight": len(server.client)})
    else:
        await call.reply(503, {**error_body(503, trouble, code="unavailable"), "last_step_age_s": age})


async def health_generate(server: Server, call: Call) -> None:
    """200 when one token was really generated."""
    server.require_ready()
    try:
        seconds = await asyncio.wait_for(server.probe(), PROBE_SECONDS)
    except TimeoutError:
        await call.reply(503, error_body(503, f"no token within {PROBE_SECONDS:g} s", code="unavailable"))
    except TesseraError as error:
        await call.reply(503, error_body(503, f"generation failed: {error}", code="unavailable"))
    else:
        await call.reply(200, {"status": "ok", "seconds": round(seconds, 4)})


async def metrics(server: Server, call: Call) -> None:
    """Prometheus' text form."""
    await call.reply(200, server.metrics.text(), kind=CONTENT_TYPE)
