"""Whom a command asks: a running server, or an engine in this process that lives as long as the command."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module

import httpx
import uvloop

from tessera.client import Client, HttpClient
from tessera.commands.settings import flags
from tessera.commands.terminal import progress, say
from tessera.core.config import BY_KEY, read_environment
from tessera.core.errors import ConfigError, Conflict

PORT = 30000
THEIRS = frozenset({"model_path"})  # flags that mean something to a client of a server
TOLD = ("debug", "info")  # log levels at which the choices of an engine are told


@dataclass(frozen=True, slots=True)
class Session:
    """A client, and the runner of the event loop that it lives on. `where`: for people."""

    client: Client
    runner: asyncio.Runner
    where: str


@contextmanager
def session(options: Namespace, asked: Mapping[str, object], environ: Mapping[str, str]) -> Iterator[Session]:
    """Connects, or loads a model; closes it afterwards, whatever happens."""
    url = address(options)
    client = _remote(url, options, asked, environ) if url else _local(options, asked, environ)
    # uvloop: at a thousand tokens a second the loop of the standard library is felt in what is measured.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            yield Session(client, runner, url or "this process")
        finally:
            runner.run(client.close())


def address(options: Namespace) -> str | None:
    """The server's address; None when there is none."""
    if options.url and (options.host or options.port):
        flag = "--host" if options.host else "--port"
        raise ConfigError([Conflict(("--url", flag), "both say where the server is", "Leave one of them out.")])
    if options.host or options.port:
        return f"http://{options.host or '127.0.0.1'}:{options.port or PORT}"
    return str(options.url) if options.url else None


def _remote(url: str, options: Namespace, asked: Mapping[str, object], environ: Mapping[str, str]) -> HttpClient:
    given = flags(options, asked)
    if wrong := [name for name in given if name not in THEIRS]:
        reason, remedy = "a server has its own", "Leave it out, or leave the server's address out."
        names = [BY_KEY[name].spellings[0] if name in BY_KEY else name for name in wrong]
        raise ConfigError([Conflict((name, "a running server"), reason, remedy) for name in names])
    name, key = given.get("model_path"), options.key or read_environment(environ).asked.get("api_key")
    try:
        return HttpClient(url, str(name) if name is not None else None, str(key) if key is not None else None)
    except httpx.InvalidURL as error:
        raise ConfigError([Conflict((f"--url {url}",), str(error), "For instance http://127.0.0.1:30000.")]) from error


def _local(options: Namespace, asked: Mapping[str, object], environ: Mapping[str, str]) -> Client:
    if options.key:
        raise ConfigError(
            [Conflict(("--api-key",), "there is no server to send it to", "Give --url, or leave it out.")]
        )
    given = flags(options, asked)
    path = given.pop("model_path", None) or read_environment(environ).asked.get("model_path")
    if path is None:
        remedy = "Give --model-path, for instance abacus-hybrid, or --url of a running server."
        raise ConfigError([Conflict(("--model-path",), "no model was named", remedy)])
    local, engine = import_module("tessera.commands.local"), import_module("tessera.serve.engine")  # torch
    with progress("loading weights", count=False) as advance:
        made = engine.Engine(str(path), progress=advance, **given)
    if made.config.logging.level in TOLD:
        say("\n".join([f"{made.config.model.served_name} in this process with:", *_indented(made.info["decisions"])]))
    client: Client = local.LocalClient(made)
    return client


def _indented(lines: Iterable[object]) -> list[str]:
    return [f"  {line}" for line in lines]
