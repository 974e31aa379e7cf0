"""`tessera chat`: a conversation in a terminal. Ctrl-C stops an answer, Ctrl-D leaves."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import aclosing

from tessera.client import Ask, Client, Message
from tessera.commands.clients import Session, session
from tessera.commands.terminal import editing, say, write
from tessera.core.errors import RequestError

PROMPT = "> "


def run(options: Namespace, asked: Mapping[str, object], environ: Mapping[str, str]) -> int:
    """Talks until the input ends."""
    with session(options, asked, environ) as here:
        interactive = sys.stdin.isatty()
        if interactive:
            editing()
            say(f"Talking with {here.where}. Ctrl-C stops an answer, Ctrl-D leaves.")
        messages: list[Message] = [{"role": "system", "content": options.system}] if options.system else []
        while (line := _line(PROMPT if interactive else "")) is not None:
            if line.strip():
                _turn(here, messages, line, options)
    return 0


def _line(prompt: str) -> str | None:
    """What the user says; None at the end of the input. Ctrl-C drops the line."""
    while True:
        try:
            return input(prompt)
        except EOFError:
            if prompt:
                write()
            return None
        except UnicodeDecodeError as error:
            raise RequestError(f"standard input is no text: {error}") from error
        except KeyboardInterrupt:
            if not prompt:
                raise
            write()


def _turn(here: Session, messages: list[Message], line: str, options: Namespace) -> None:
    """One question and its answer, which joins the conversation as far as it came. A refused question does not."""
    messages.append({"role": "user", "content": line})
    said: list[str] = []
    try:
        here.runner.run(_answer(here.client, messages, options, said))
    except KeyboardInterrupt:
        write()
        say("(stopped)")
    except RequestError as error:
        say(f"tessera: {error}")
        messages.pop()
        return
    messages.append({"role": "assistant", "content": "".join(said)})


async def _answer(client: Client, messages: Sequence[Message], options: Namespace, said: list[str]) -> None:
    ask = Ask(
        messages=tuple(messages),
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
    )
    async with aclosing(client.stream(ask)) as pieces:
        async for piece in pieces:
            said.append(piece.text)
            write(piece.text, end="")
    write()
