"""The `tessera` command. Each subcommand lives in `tessera/commands/` and is imported only when it runs.

Exit codes: 0 done, 1 failed, 2 what was asked cannot be done, 130 interrupted.
"""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from tessera import __version__
from tessera.commands.options import COMMANDS, Command, parse
from tessera.core.config import current
from tessera.core.errors import ConfigError, TesseraError

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Ctrl-C ends in one line, without a traceback."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except ConfigError as error:
        _say(f"tessera: this cannot be started:\n{error}")
        return 2
    except TesseraError as error:
        _say(f"tessera: {error}")
        return 1
    except BrokenPipeError:
        # Whoever read our output has left; what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except BaseException as error:
        if not _was_interrupted(error):
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the way out is short: a second Ctrl-C changes nothing
        _say("tessera: interrupted")
        return INTERRUPTED


def _was_interrupted(error: BaseException | None) -> bool:
    """True for a KeyboardInterrupt, also where a library turned it into an error of its own."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _run(argv: list[str]) -> int:
    if argv[:1] in (["version"], ["--version"], ["-V"]):
        _write(f"tessera {__version__}")
        return 0
    if argv[:1] in (["--help"], ["-h"], ["help"]):
        _write(_usage())
        return 0
    command = next((c for c in COMMANDS if argv[:1] == [c.name]), None)
    if command is None:
        return _unknown(argv)
    return _dispatch(command, argv[1:])


def _dispatch(command: Command, argv: list[str]) -> int:
    options, asked = parse(command, argv)
    handler = importlib.import_module(f"tessera.commands.{command.name}")
    code: int = handler.run(options, asked, current())
    sys.stdout.flush()
    return code


def _unknown(argv: list[str]) -> int:
    names = [command.name for command in COMMANDS]
    near = difflib.get_close_matches(argv[0], names, 1) if argv else []
    found = f"tessera: there is no command '{argv[0]}'" if argv else "tessera: a command is needed"
    _say(found + (f"; did you mean {near[0]}?" if near else "") + f"\n\n{_usage()}")
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


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
