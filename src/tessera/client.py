"""Asking a model, wherever it runs: one protocol for commands, evaluations and benchmarks, and its form over HTTP.

`HttpClient` speaks OpenAI's API, so that other servers can be measured beside ours; `commands/local.py` has the form
for an engine in this process.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx

from tessera.core.errors import DeadlineError, PeerError, RequestError

Message = Mapping[str, str]
CONNECT_SECONDS = 10.0
SILENT_SECONDS = 600.0  # a token may wait for a place in the queue, and for its prompt
DATA = b"data:"


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. Exactly one of `text`, `tokens` and `messages` (each with "role" and "content").

    `max_tokens` None: as many as fit. `more`: further fields of the request, as the server names them.
    """

    text: str | None = None
    tokens: Sequence[int] | None = None
    messages: Sequence[Message] | None = None
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = -1
    seed: int | None = None
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Piece:
    """What is new of an answer. Counts are those so far; `finish` is set on the last piece."""

    text: str
    num_tokens: int
    num_prompt: int = 0
    finish: str | None = None


class Client(Protocol):
    """Somebody who answers."""

    async def vocab_size(self) -> int | None:
        """Number of token ids that prompts may use; None when it is not known."""

    def stream(self, ask: Ask) -> AsyncGenerator[Piece]:
        """The answer as it comes. Closing the generator stops it. Raises TesseraError."""

    async def close(self) -> None:
        """Gives back what the client holds."""


async def answer(client: Client, ask: Ask) -> Piece:
    """The whole answer."""
    whole = Piece("", 0)
    async with aclosing(client.stream(ask)) as pieces:
        async for piece in pieces:
            piece.text = whole.text + piece.text
            whole = piece
    return whole


class HttpClient:
    """A server with OpenAI's completions and chat completions. `model` None: the first that it lists."""

    def __init__(
        self,
        url: str,
        model: str | None = None,
        api_key: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = _base(url)
        self._model = model
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
            transport=transport,
        )

    async def model(self) -> str:
        """The name of the model that is asked."""
        if self._model is None:
            listed = await self._get("/v1/models")
            names = [card.get("id") for card in (listed or {}).get("data", []) if isinstance(card, dict)]
            if not names or not isinstance(names[0], str):
                raise PeerError(f"{self.url} lists no model at /v1/models; name one with --model-path")
            self._model = names[0]
        return self._model

    async def vocab_size(self) -> int | None:
        """As our servers tell it; None elsewhere."""
        found = (await self._get("/model_info") or {}).get("vocab_size")
        return found if isinstance(found, int) else None

    async def stream(self, ask: Ask) -> AsyncGenerator[Piece]:
        """The answer as it comes."""
        chat = ask.messages is not None
        path = "/v1/chat/completions" if chat else "/v1/completions"
        last = Piece("", 0)
        try:
            async with self._http.stream("POST", path, json=self._body(ask, await self.model())) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, await response.aread())
                async for event in _events(response.aiter_bytes()):
                    piece = _piece(event, chat, last)
                    if piece is not None:
                        last = piece
                        yield piece
        except httpx.TimeoutException as error:
            raise DeadlineError(f"{self.url} was silent for longer than the limit ({type(error).__name__})") from error
        except httpx.HTTPError as error:
            raise PeerError(f"{self.url}: {_why(error)}") from error
        except UnicodeEncodeError as error:  # bytes of a command line or of a file that were no text
            raise RequestError(f"what is asked is no valid Unicode: {error.reason}") from error
        if last.finish is None:
            raise PeerError(f"{self.url} ended the stream before the answer was whole")

    async def flush(self) -> None:
        """Empties the server's prefix cache."""
        response = await self._send("POST", "/flush_cache")
        if response.status_code != 200:
            raise _refusal(response.status_code, response.content)

    async def start_profile(self, asked: Mapping[str, object]) -> None:
        """Starts a profile of the server; `asked`: fields of `/start_profile`."""
        response = await self._send("POST", "/start_profile", asked)
        if response.status_code != 200:
            raise _refusal(response.status_code, response.content)

    async def stop_profile(self) -> list[str]:
        """Ends the profile; the traces, where the server tells them."""
        response = await self._send("POST", "/stop_profile")
        if response.status_code != 200:
            raise _refusal(response.status_code, response.content)
        found = _json(response.content)
        return [str(file) for file in found.get("files", ())] if isinstance(found, dict) else []

    async def close(self) -> None:
        """Closes all connections."""
        await self._http.aclose()

    def _body(self, ask: Ask, model: str) -> dict[str, Any]:
        usage = {"include_usage": True, "continuous_usage_stats": True}
        body: dict[str, Any] = {"model": model, "stream": True, "stream_options": usage, "temperature": ask.temperature}
        if ask.messages is not None:
            body["messages"] = list(ask.messages)
        else:
            body["prompt"] = ask.text if ask.text is not None else list(ask.tokens or ())
        optional: dict[str, tuple[Any, Any]] = {
            "max_tokens": (ask.max_tokens, None),
            "top_p": (ask.top_p, 1.0),
            "top_k": (ask.top_k, -1),
            "seed": (ask.seed, None),
            "ignore_eos": (ask.ignore_eos, False),
            "stop": (list(ask.stop), []),
        }
        return body | {name: value for name, (value, unsaid) in optional.items() if value != unsaid} | dict(ask.more)

    async def _get(self, path: str) -> dict[str, Any] | None:
        """A JSON object; None where the server has no such page."""
        response = await self._send("GET", path)
        if response.status_code in (401, 403):
            raise _refusal(response.status_code, response.content)
        found = _json(response.content) if response.status_code == 200 else None
        return found if isinstance(found, dict) else None

    async def _send(self, method: str, path: str, body: Mapping[str, object] | None = None) -> httpx.Response:
        try:
            return await self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise PeerError(f"no server answers at {self.url}: {_why(error)}") from error


def _base(url: str) -> str:
    """A server's address as people write it: with or without http:// before and /v1 behind."""
    whole = url if "://" in url else f"http://{url}"
    return whole.rstrip("/").removesuffix("/v1")


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """Server-sent events as JSON objects, until `[DONE]` (https://html.spec.whatwg.org/#server-sent-events)."""
    held = b""
    async for chunk in chunks:
        *lines, held = (held + chunk).split(b"\n")
        for line in lines:
            data = line.removeprefix(DATA).strip()
            if not line.startswith(DATA) or not data:
                continue
            if data == b"[DONE]":
                return
            event = _json(data)
            if not isinstance(event, dict):
                raise PeerError(f"the server sent an event that is no JSON object: {data[:200]!r}")
            if event.get("error"):
                raise PeerError(f"the server gave up: {_message(event)}")
            yield event


def _piece(event: Mapping[str, Any], chat: bool, last: Piece) -> Piece | None:
    """What an event adds; None for one that adds nothing. Without usage a piece counts as one token."""
    choices, usage = event.get("choices") or [], event.get("usage") or {}
    if not choices and not usage:
        return None
    choice = choices[0] if choices else {}
    text = (choice.get("delta") or {}).get("content") if chat else choice.get("text")
    count = usage.get("completion_tokens", last.num_tokens + bool(text))
    prompt = usage.get("prompt_tokens", last.num_prompt)
    return Piece(text or "", count, prompt, choice.get("finish_reason") or last.finish)


def _refusal(status: int, body: bytes) -> RequestError | PeerError:
    text = f"status {status}: {_message(_json(body)) or body[:300].decode(errors='replace')}"
    return RequestError(text, status=status) if 400 <= status < 500 else PeerError(text)


def _message(body: Any) -> str:
    """The message of an error in OpenAI's form (or SGLang's)."""
    error = body.get("error", body) if isinstance(body, dict) else body
    found = error.get("message", error) if isinstance(error, dict) else error
    return str(found) if found else ""


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def _why(error: httpx.HTTPError) -> str:
    return str(error) or type(error).__name__
