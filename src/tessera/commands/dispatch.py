"""Finds the command that was asked for, and runs it."""

from __future__ import annotations

import difflib
import importlib
import sys

from tessera import __version__
from tessera.commands.options import COMMANDS, Command, parsed
from tessera.core.config import current
from tessera.core.errors import ConfigError


def dispatch(argv: list[str]) -> int:
    """Runs one command and returns its exit code."""
    if argv[:1] in (["version"], ["--version"], ["-V"]):
        _write(f"tessera {__version__}")
        return 0
    if argv[:1] in (["--help"], ["-h"], ["help"]):
        _write(_usage())
        return 0
    command = next((c for c in COMMANDS if argv[:1] == [c.name]), None)
    if command is None:
        return _unknown(argv)
    return _start(command, argv[1:])


def _start(command: Command, argv: list[str]) -> int:
    options, asked, wrong = parsed(command, argv)
    if wrong and command.engine:
        judged = importlib.import_module("tessera.commands.judged")
        wrong = judged.everything(options, asked, current(), wrong)
    if wrong:
        raise ConfigError(wrong)
    handler = importlib.import_module(f"tessera.commands.{command.name}")
    code: int = handler.run(options, asked, current())
    sys.stdout.flush()
    return code


def _unknown(argv: list[str]) -> int:
    names = [command.name for command in COMMANDS]
    near = difflib.get_close_matches(argv[0], names, 1) if argv else []
    found = f"tessera: there is no command '{argv[0]}'" if argv else "tessera: a command is needed"
    sys.stderr.write(found + (f"; did you mean {near[0]}?" if near else "") + f"\n\n{_usage()}\n")
    return 2


def _usage() -> str:
    width = max(len(command.name) for command in COMMANDS)
    lines = [f"  {command.name:{width}}  {command.help}" for command in COMMANDS]
    return "\n".join(
        [
            "usage: tessera COMMAND [FLAGS]",
            "",
            "Serves large language models: the layout never changes the answer.",
            "",
            *lines,
            f"  {'version':{width}}  Print the version.",
            "",
            "`tessera COMMAND --help` lists its flags.",
        ]
    )


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
