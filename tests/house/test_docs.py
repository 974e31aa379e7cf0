"""What the README and `docs/` speak of exists: files, flags, make's targets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from house.source import ROOT
from tessera.commands.options import COMMANDS, _parser

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("src", "tests", "bench", "tools", "docs", "recipes")
PATH = re.compile(r"[a-z_0-9.-]+(/[a-z_0-9.-]+)*\.(py|md|yaml|sh|png)")
FLAG = r"(--[a-z][a-z0-9-]+)"


@pytest.fixture(scope="module")
def files() -> str:
    """The path of every file, each after a slash, a line each."""
    return "\n".join(f"/{path.relative_to(ROOT).as_posix()}" for name in FOLDERS for path in (ROOT / name).rglob("*.*"))


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """Every flag of every command, and of the scripts beside it."""
    own = {word for command in COMMANDS for action in _parser(command)._actions for word in action.option_strings}
    scripts = [path for name in ("bench", "tools", "tests") for path in (ROOT / name).rglob("*.py")]
    return own | {flag for path in scripts for flag in re.findall(f'"{FLAG}"', path.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_spoken_of_exists(page: Path, files: str, flags: set[str]) -> None:
    text = page.read_text(encoding="utf-8")
    words = {word.split("::")[0].strip("(),") for code in re.findall(r"`([^`\n]+)`", text) for word in code.split()}
    named = {word for word in words if PATH.fullmatch(word)}
    assert [name for name in sorted(named) if not re.search(f"/{re.escape(name)}$", files, re.MULTILINE)] == []
    assert sorted(set(re.findall(rf"(?<![\w-]){FLAG}", text)) - flags) == []
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert sorted(set(re.findall(r"`make ([a-z-]+)", text)) - targets) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_whole(page: Path) -> None:
    """A row after an empty line is no row of a table, but text with bars in it."""
    lines = ["", *page.read_text(encoding="utf-8").splitlines(), ""]
    tops = [i for i, line in enumerate(lines) if line.startswith("|") and not lines[i - 1].startswith("|")]
    assert [lines[i] for i in tops if not re.fullmatch(r"\|[-:| ]+\|", lines[i + 1])] == []
