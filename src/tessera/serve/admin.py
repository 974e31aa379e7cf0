"""Endpoints around generation: models, tokenizing, abort, cache, information, health, metrics."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.responses import Response

from tessera.core.errors import RequestError, TesseraError
from tessera.core.messages import Flush
from tessera.serve import profile
from tessera.serve.checks import Fields, Refused, anything, bad, boolean, integer, listed, string
from tessera.serve.fields import CHAT, MAX_TOKENS
from tessera.serve.http import Call, Json, error_body, read_json, refusal
from tessera.serve.metrics import CONTENT_TYPE
from tessera.serve.server import Server

PROBE_SECONDS = 20.0

TOKENIZE = Fields(
    honoured={
        "model": string,
        "prompt": anything,
        "text": anything,
        "add_special_tokens": boolean,
        **{name: CHAT.honoured[name] for name in ("messages", "add_generation_prompt", "continue_final_message")},
        "chat_template_kwargs": CHAT.honoured["chat_template_kwargs"],
        "reasoning_effort": CHAT.honoured["reasoning_effort"],
        "return_token_strs": boolean,
    },
    refused={"tools": CHAT.refused["tools"], "chat_template": CHAT.refused["chat_template"]},
)
DETOKENIZE = Fields(
    honoured={"model": string, "tokens": listed(integer(0, MAX_TOKENS), 1 << 22), "skip_special_tokens": boolean},
)
ABORT = Fields(
    honoured={"rid": string, "abort_all": boolean},
    passed={"abort_message": "the finish reason says it"},
    refused={"finished_reason": Refused("leave it out")},
)


async def models(server: Server, call: Call) -> Json:
    """The one model that is served."""
    return Json({"object": "list", "data": [_card(server)]})


async def model(server: Server, call: Call) -> Json:
    """One model by its name."""
    server.require_model(call.path_params["name"])
    return Json(_card(server))


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


async def tokenize(server: Server, call: Call) -> Json:
    """Token ids of a prompt, or of messages."""
    values = TOKENIZE.read(await read_json(call, server.reader.limits.max_body))
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
    return Json(answer)


async def detokenize(server: Server, call: Call) -> Json:
    """Text of token ids (`text` as SGLang names it, `prompt` as vLLM does)."""
    values = DETOKENIZE.read(await read_json(call, server.reader.limits.max_body))
    server.require_model(values.get("model"))
    tokenizer = server.reader.tokenizer
    if tokenizer is None:
        raise RequestError("tokens: this server runs with --skip-tokenizer-init", "tokens")
    if "tokens" not in values:
        raise RequestError("tokens is missing", "tokens")
    text = tokenizer.decode(values["tokens"], values.get("skip_special_tokens", False))
    return Json({"text": text, "prompt": text})


async def abort_request(server: Server, call: Call) -> Json:
    """Ends a request by its id, a batch of `/generate` by its own, or all that runs."""
    values = ABORT.read(await read_json(call, server.reader.limits.max_body))
    if not values.get("abort_all") and "rid" not in values:
        raise RequestError("rid is missing (or abort_all: true)", "rid")
    return Json({"aborted": server.abort(None if values.get("abort_all") else values["rid"])})


async def flush_cache(server: Server, call: Call) -> Json:
    """Empties the prefix cache."""
    server.require_ready()
    server.client.send(Flush())
    return Json({"flushed": True})


async def start_profile(server: Server, call: Call) -> Json:
    """Starts a profile of all ranks; every field may be left out, and so may the body."""
    server.require_ready()
    body = await read_json(call, server.reader.limits.max_body, empty={})
    return Json(await profile.start(server.client, body, server.options.profiles))


async def stop_profile(server: Server, call: Call) -> Json:
    """Ends the profile and answers when its traces are written."""
    server.require_ready()
    return Json(await profile.end(server.client))


async def model_info(server: Server, call: Call) -> Json:
    """What the model is."""
    reader, options = server.reader, server.options
    return Json(
        {
            "model_path": options.model_path,
            "served_model_name": options.served_model_name,
            "is_generation": True,
            "context_length": reader.limits.context_length,
            "vocab_size": reader.limits.vocab_size,
            "has_tokenizer": reader.tokenizer is not None,
            "has_chat_template": reader.template is not None,
            "preferred_sampling_params": dict(reader.defaults),
        }
    )


async def server_info(server: Server, call: Call) -> Json:
    """The resolved configuration, what the engine built, and how it does."""
    state = {
        "ready": server.trouble is None,
        "in_flight": len(server.client),
        "last_step_age_s": round(server.client.age, 3),
    }
    engines = [replica.info for replica in server.client.replicas]
    return Json({**server.options.info, "engine": engines[0], "state": {**state, **_replicas(server)}})


def _replicas(server: Server) -> dict[str, Any]:
    """How each of several replicas does."""
    replicas = server.client.replicas
    if len(replicas) == 1:
        return {}
    return {
        "replicas": [
            {"replica": r.number, "status": r.trouble or "ok", "last_step_age_s": round(r.age, 3)} for r in replicas
        ]
    }


async def health(server: Server, call: Call) -> Json:
    """200 while a step loop ticks and requests are taken, else 503 with the reason; both tell the last tick's age.

    Of several replicas one is enough; how each does is told.
    """
    age = round(server.client.age, 3)
    trouble = server.trouble
    if trouble is None:
        return Json({"status": "ok", "last_step_age_s": age, "in_flight": len(server.client), **_replicas(server)})
    else:
        return Json({**error_body(503, trouble), "last_step_age_s": age, **_replicas(server)}, 503)


async def health_generate(server: Server, call: Call) -> Json:
    """200 when one token was really generated, by every replica that takes requests."""
    server.require_ready()
    probes = [server.probe(replica.number) for replica in server.client.replicas if replica.trouble is None]
    try:
        seconds = max(await asyncio.wait_for(asyncio.gather(*probes), PROBE_SECONDS))
    except TimeoutError:
        return refusal(503, f"no token within {PROBE_SECONDS:g} s")
    except TesseraError as error:
        return refusal(503, f"generation failed: {error}")
    else:
        return Json({"status": "ok", "seconds": round(seconds, 4)})


async def metrics(server: Server, call: Call) -> Response:
    """Prometheus' text form."""
    return Response(server.metrics.text(), headers={"content-type": CONTENT_TYPE})
