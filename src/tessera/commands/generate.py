"""`tessera generate`: prompts from arguments, a file or standard input; their completions on standard output."""

from __future__ import annotations

import asyncio
import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from pathlib import Path

from tessera.client import Ask, Client, Piece, answer
from tessera.commands.clients import session
from tessera.commands.terminal import progress, write
from tessera.core.errors import ConfigError, Conflict

MAX_TOKENS = 128


def run(options: Namespace, asked: Mapping[str, object], environ: Mapping[str, str]) -> int:
    """Completes every prompt, all at once; prints in their order."""
    prompts = read_prompts(options)
    asks = [_ask(prompt, options) for prompt in prompts]
    with session(options, asked, environ) as here:
        if len(asks) == 1 and not options.json:
            here.runner.run(_live(here.client, asks[0]))
        else:
            here.runner.run(_all(here.client, prompts, asks, options.json))
    return 0


def read_prompts(options: Namespace) -> list[str]:
    """The prompts, at least one. Raises ConfigError."""
    if options.prompt and options.file:
        raise _wrong(("--file", "a prompt"), "prompts come from one place", "Leave one of them out.")
    if options.prompt:
        return list(options.prompt)
    prompts = _from_file(options.file) if options.file else [_from_stdin()]
    if not any(prompts):
        where = f"--file {options.file}" if options.file else "standard input"
        raise _wrong((where,), "found no prompt", "Give a prompt as an argument, in a --file or on standard input.")
    return prompts


def _from_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise _wrong(("standard input",), str(error), "Give text.") from error


def _from_file(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise _wrong((f"--file {path}",), str(error), "Give a text file.") from error
    if path.suffix != ".jsonl":
        return lines
    return [_prompt_of(line, f"--file {path}", i) for i, line in enumerate(lines, 1)]


def _prompt_of(line: str, where: str, number: int) -> str:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str):
        raise _wrong(
            (where,), f"line {number} is no object with a text `prompt`", 'For instance {"prompt": "1 + 1 ="}.'
        )
    return prompt


def _wrong(flags: tuple[str, ...], reason: str, remedy: str) -> ConfigError:
    return ConfigError([Conflict(flags, reason, remedy)])


def _ask(prompt: str, options: Namespace) -> Ask:
    return Ask(
        text=None if options.chat else prompt,
        messages=({"role": "user", "content": prompt},) if options.chat else None,
        max_tokens=options.max_tokens or MAX_TOKENS,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
        ignore_eos=options.ignore_eos,
        stop=tuple(options.stop),
    )


async def _live(client: Client, ask: Ask) -> None:
    async with aclosing(client.stream(ask)) as pieces:
        async for piece in pieces:
            write(piece.text, end="")
    write()


async def _all(client: Client, prompts: Sequence[str], asks: Sequence[Ask], as_json: bool) -> None:
    """Prints each answer as soon as those before it are printed."""
    with progress("prompts") as advance:
        tasks = [asyncio.create_task(answer(client, ask)) for ask in asks]
        try:
            for i, (prompt, task) in enumerate(zip(prompts, tasks, strict=True), 1):
                _print(prompt, await task, as_json)
                advance(i, len(asks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _print(prompt: str, got: Piece, as_json: bool) -> None:
    if not as_json:
        write(got.text)
        return
    told = {
        "prompt": prompt,
        "text": got.text,
        "finish_reason": got.finish,
        "prompt_tokens": got.num_prompt,
        "completion_tokens": got.num_tokens,
    }
    write(json.dumps(told, ensure_ascii=False))
