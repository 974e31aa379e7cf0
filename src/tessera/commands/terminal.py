"""What commands print: tables, progress. Coloured and live on a terminal, plain text anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Protocol

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

Row = Sequence[object]
SHORT = 24  # characters of a cell that is not wrapped
WIDE = 1 << 16


def write(text: str = "", end: str = "\n") -> None:
    """Standard output, at once."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def say(text: str) -> None:
    """Standard error: whatever is not the answer."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def table(title: str, rows: Sequence[Row], head: Sequence[str] = ()) -> None:
    """A table of texts; numbers are shown as they come."""
    cells = [[str(cell) for cell in row] for row in rows]
    console = Console(highlight=False, markup=False)
    if sys.stdout.isatty() and _fits(shown := _drawn(title, cells, head), console):
        console.print(shown)
        return
    lines = [list(head), *cells] if head else cells
    widths = [max(len(row[i]) for row in lines if i < len(row)) for i in range(max(map(len, lines), default=0))]
    write(title)
    for row in lines:
        write("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip())
    write()


def _drawn(title: str, cells: Sequence[Sequence[str]], head: Sequence[str]) -> Table:
    """Columns of short cells keep their width, the others are wrapped."""
    shown = Table(title=title, title_justify="left", show_header=bool(head), header_style="bold")
    for i, name in enumerate(head or [""] * max((len(row) for row in cells), default=1)):
        short = all(len(row[i]) <= SHORT for row in cells if i < len(row))
        shown.add_column(name, overflow="fold", no_wrap=short)
    for row in cells:
        shown.add_row(*row)
    return shown


def _fits(shown: Table, console: Console) -> bool:
    """Whether a terminal is wide enough for it without breaking words or numbers."""
    wide = console.options.update(width=WIDE, max_width=WIDE)
    return Measurement.get(console, wide, shown).minimum <= console.width


def pairs(title: str, values: Mapping[str, object]) -> None:
    """A table of names and values."""
    table(title, list(values.items()))


def editing() -> None:
    """Lines read with `input` can be edited, and earlier ones come back."""
    with suppress(ImportError):  # not every Python has it
        import_module("readline")


class Advance(Protocol):
    """Told how far a work is."""

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` pieces are finished."""


@contextmanager
def progress(what: str, count: bool = True) -> Iterator[Advance]:
    """A bar on standard error while the block runs; nothing where that is no terminal."""
    console = Console(stderr=True, highlight=False)
    share = MofNCompleteColumn() if count else TaskProgressColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), share, TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
