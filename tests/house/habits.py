"""Rules about habits: small files and functions, docstrings, no stubs, no hidden state, no swallowed errors."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from fnmatch import fnmatch

from house.source import FUNCTIONS, Finding, Function, Module, dotted

FILE_LINES = 400
FUNCTION_LINES = 60
MARK = re.compile(r"\b(TODO|FIXME|XXX)\b")
METHOD_LINES = 8  # a public method longer than this says what it does

# The edges at which the environment may be read; everything else gets a Config.
READS_ENVIRONMENT = ("core/config*", "cli.py", "serve/launch.py")
ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv"}


def small_files(module: Module) -> Iterator[Finding]:
    """At most 400 lines a file."""
    if (lines := len(module.text.splitlines())) > FILE_LINES:
        yield module.find(FILE_LINES + 1, f"{lines} lines, allowed {FILE_LINES}", "Split it by subject")


def small_functions(module: Module) -> Iterator[Finding]:
    """At most 60 lines a function."""
    for place, node in module.functions():
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > FUNCTION_LINES:
            yield module.find(node, f"{place}() has {lines} lines, allowed {FUNCTION_LINES}", "Name its parts")


def no_global(module: Module) -> Iterator[Finding]:
    """No `global` statement."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Global):
            yield module.find(node, f"`global {', '.join(node.names)}`", "Pass it, or hold it in an object")


def no_probing(module: Module) -> Iterator[Finding]:
    """No `hasattr`: what a thing has is in its type."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and dotted(node.func) == "hasattr":
            yield module.find(node, f"`{ast.unparse(node)}`", "State it in a protocol, or a field that may be None")


def no_marks(module: Module) -> Iterator[Finding]:
    """No TODO, FIXME or XXX in comments and docstrings."""
    for token in tokenize.generate_tokens(io.StringIO(module.text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING) and (mark := MARK.search(token.string)):
            line = token.start[0] + token.string[: mark.start()].count("\n")
            yield module.find(line, f"{mark[0]} left behind", "Do it now, or refuse the case by name")


def no_stubs(module: Module) -> Iterator[Finding]:
    """No NotImplementedError; no body of `...` or a bare `pass` outside protocols, abstract methods and overloads."""
    open_classes = {
        node
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef) and any("Protocol" in ast.unparse(base) for base in node.bases)
    }
    excused = {child for node in open_classes for child in node.body}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Raise) and node.exc and "NotImplementedError" in ast.unparse(node.exc):
            yield module.find(node, "raises NotImplementedError", "Implement it, or refuse it at start-up, saying why")
    for place, function in module.functions():
        marked = any(re.search(r"abstractmethod|overload", ast.unparse(d)) for d in function.decorator_list)
        if function not in excused and not marked and _is_stub(function):
            remedy = "Implement it or leave it out; one that does nothing on purpose has a docstring alone, saying why"
            yield module.find(function, f"{place}() is a stub", remedy)


def _is_empty(body: list[ast.stmt]) -> bool:
    return all(isinstance(s, ast.Pass) or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)) for s in body)


def _is_stub(function: Function) -> bool:
    last = function.body[-1]
    dots = isinstance(last, ast.Expr) and isinstance(last.value, ast.Constant) and last.value.value is ...
    return _is_empty(function.body) and (dots or ast.get_docstring(function) is None)


def docstrings(module: Module) -> Iterator[Finding]:
    """Modules, public classes, public functions, and public methods of more than a few lines have docstrings."""
    remedy = "Say what it does; shapes, units, errors and the source where there are any"
    if ast.get_docstring(module.tree) is None and module.text.strip():
        yield module.find(1, "module has no docstring", remedy)
    for scope in (module.tree, *(n for n in module.tree.body if isinstance(n, ast.ClassDef))):
        if isinstance(scope, ast.ClassDef) and scope.name.startswith("_"):
            continue
        for node in scope.body:
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and _wants_docstring(node, scope):
                yield module.find(node, f"public '{node.name}' has no docstring", remedy)


def _wants_docstring(node: Function | ast.ClassDef, scope: ast.Module | ast.ClassDef) -> bool:
    if node.name.startswith("_") or ast.get_docstring(node) is not None:
        return False
    short = (node.end_lineno or node.lineno) - node.lineno < METHOD_LINES
    return not (isinstance(scope, ast.ClassDef) and short)


def no_swallowing(module: Module) -> Iterator[Finding]:
    """No handler of everything that does nothing, and no `suppress(Exception)`."""
    remedy = "Catch what you expect, or log it and let the owner know"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler):
            everything = node.type is None or _catches_all(node.type)
            nothing = _is_empty([s for s in node.body if not isinstance(s, ast.Continue)])
        else:
            everything = isinstance(node, ast.Call) and any(map(_catches_all, node.args))
            nothing = isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] == "suppress"
        if everything and nothing:
            yield module.find(node, "swallows every exception", remedy)


def _catches_all(node: ast.expr) -> bool:
    names = node.elts if isinstance(node, ast.Tuple) else [node]
    return any(dotted(name) in {"Exception", "BaseException"} for name in names)


def no_environment(module: Module) -> Iterator[Finding]:
    """Only the edges read the environment; everything else gets a Config."""
    if any(fnmatch(module.path, pattern) for pattern in READS_ENVIRONMENT):
        return
    remedy = f"Take it from the Config; only {', '.join(READS_ENVIRONMENT)} read the environment"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and dotted(node) in ENVIRONMENT:
            yield module.find(node, f"uses {dotted(node)}", remedy)
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            for alias in node.names:
                if f"os.{alias.name}" in ENVIRONMENT:
                    yield module.find(node, f"imports os.{alias.name}", remedy)
