"""What the house rules read: the modules of the package as syntax trees, and the form of a finding."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "tessera"

Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Finding:
    """One breach of a rule: where it is, what it is and what to do about it."""

    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. {self.remedy}"


@dataclass(frozen=True)
class Module:
    """One source file. `path` is relative to the package: `core/layout.py`."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.text, self.path)

    @property
    def parts(self) -> tuple[str, ...]:
        """`core/layout.py` -> `("core", "layout")`; `core/__init__.py` -> `("core",)`."""
        parts = tuple(self.path.removesuffix(".py").split("/"))
        return parts[:-1] if parts[-1] == "__init__" else parts

    @property
    def name(self) -> str:
        """The dotted name: `tessera.core.layout`."""
        return ".".join(("tessera", *self.parts))

    @property
    def room(self) -> str:
        """Its layer: the folder, or for a file beside the folders its own name; empty for the package itself."""
        return self.path.split("/")[0].removesuffix(".py").replace("__init__", "")

    def find(self, node: ast.AST | int, what: str, remedy: str) -> Finding:
        """A finding at a node, or at a line."""
        line = node if isinstance(node, int) else getattr(node, "lineno", 1)
        return Finding(f"src/tessera/{self.path}:{line}", what, remedy)

    def functions(self) -> Iterator[tuple[str, Function]]:
        """All functions with their dotted place in the file: `Class.method.inner`."""
        yield from _functions(self.tree, "")


Rule = Callable[[Module], Iterator[Finding]]


def _functions(node: ast.AST, place: str) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        inner = place
        if isinstance(child, (*FUNCTIONS, ast.ClassDef)):
            inner = f"{place}.{child.name}" if place else child.name
        if isinstance(child, FUNCTIONS):
            yield inner, child
        yield from _functions(child, inner)


def modules() -> list[Module]:
    """Every source file of the package."""
    return [
        Module(path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


def imported(module: Module, node: ast.stmt) -> list[str]:
    """Dotted names that an import statement may bring in: of `from a import b` both `a` and `a.b`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        package = module.name.split(".")
        keep = len(package) - node.level + module.path.endswith("__init__.py")
        base = ".".join([*package[:keep], *([base] if base else [])])
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of names; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""
