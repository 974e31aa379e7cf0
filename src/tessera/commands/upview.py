"""What `tessera up` shows: every line of every process with its name, and on a terminal a table of their states."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from tessera.serve.up import Running

COLOURS = ("cyan", "magenta", "green", "blue", "yellow", "bright_cyan", "bright_magenta")
STATES = {"starting": "yellow", "ready": "green", "ended": "red"}
OWN = "up"


class Screen:
    """Shows a deployment. `folder`: where each process' lines are kept as well."""

    def __init__(self, console: Console, folder: Path | None, files: ExitStack) -> None:
        self._console, self._folder, self._files = console, folder, files
        self._running: list[Running] = []
        self._colours: dict[str, str] = {}
        self._open: dict[str, TextIO] = {}
        self._unread = False

    def line(self, name: str, text: str) -> None:
        """See `View`."""
        if self._folder is not None:
            if name not in self._open:
                path = self._folder / f"{name}.log"
                self._open[name] = self._files.enter_context(path.open("a", encoding="utf-8", buffering=1))
            self._open[name].write(text + "\n")
        colour = self._colours.setdefault(name, COLOURS[len(self._colours) % len(COLOURS)])
        self._print(name, text, colour, "")

    def change(self, what: str, running: Iterable[Running]) -> None:
        """See `View`."""
        self._running = list(running)
        self._print(OWN, what, "bold", "bold")

    def _print(self, name: str, text: str, name_style: str, style: str) -> None:
        """Raises BrokenPipeError once, when whoever read this has left; after that nothing is shown."""
        if self._unread:
            return
        try:
            if self._console.is_terminal:
                self._console.print(Text.assemble((f"[{name}] ", name_style), (text, style)), soft_wrap=True)
            else:  # plain, since a worker waits while its lines are not read
                sys.stdout.write(f"[{name}] {text}\n")
                sys.stdout.flush()
        except BrokenPipeError:
            self._unread = True
            raise

    def table(self) -> Table:
        """The states, now."""
        address = Column("address", no_wrap=True)  # in a narrow terminal the others are cut
        shown = Table("name", "state", "for", address, "where", header_style="bold")
        for one in self._running:
            age = f"{time.monotonic() - one.since:.0f} s"
            shown.add_row(one.process.name, Text(one.state, STATES[one.state]), age, one.process.url, one.child.where)
        return shown


@contextmanager
def screen(folder: Path | None) -> Iterator[Screen]:
    """A screen, as long as the block runs."""
    console = Console(highlight=False, markup=False, emoji=False)
    with ExitStack() as stack:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        made = Screen(console, folder, stack)
        if console.is_terminal:
            stack.enter_context(Live(get_renderable=made.table, console=console, refresh_per_second=4))
        yield made
