"""The `tessera` command. Each subcommand lives in `tessera/commands/` and is imported only when it runs.

Exit codes: 0 done, 1 failed, 2 what was asked cannot be done, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence

from tessera.core.errors import ConfigError, TesseraError

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Ctrl-C ends in one line, without a traceback."""
    try:
        # Not at the top: reading the flags takes a while to load, in which a Ctrl-C may come already.
        loaded = importlib.import_module("tessera.commands.dispatch")
        return int(loaded.dispatch(list(sys.argv[1:] if argv is None else argv)))
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


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
