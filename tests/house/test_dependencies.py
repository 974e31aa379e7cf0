"""What the package imports is declared, so that no other package may take it away; what is declared is imported."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions

from house.source import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOADED_BY_NAME = {"httptools", "transformers"}  # by uvicorn, and by serve/assets.py


def plain(names: Iterable[str]) -> set[str]:
    """Names of packages in one spelling, without versions and conditions."""
    return {re.split(r"[^\w.-]", name, maxsplit=1)[0].lower().replace("_", "-") for name in names}


def imported() -> Iterator[str]:
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module.partition(".")[0]


def test_what_is_imported_is_declared_and_the_other_way_round() -> None:
    homes = packages_distributions()
    modules = set(imported()) - sys.stdlib_module_names - {"tessera"}
    core, extras = plain(PROJECT["dependencies"]), PROJECT["optional-dependencies"].values()
    optional = plain(name for extra in extras for name in extra)
    used = {name: plain(homes[name]) for name in modules if name in homes}
    assert not {name for name, found in used.items() if not found & (core | optional)}
    assert core - {home for found in used.values() for home in found} == LOADED_BY_NAME
