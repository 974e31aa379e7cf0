"""Rules about imports: they go down only, without cycles, at the top of a file, and the pure layers stay pure."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

from house.source import FUNCTIONS, Finding, Module, dotted, imported

# What each layer may import of ours, besides itself (design: "Layers: imports go down only").
LAYERS = {
    "core": set(),
    "plan": {"core"},
    "ops": {"core"},
    "comm": {"core"},
    "transfer": {"core"},
    "models": {"core", "ops", "comm"},
    "run": {"core", "plan", "ops", "comm", "transfer", "models"},
}
# These, and the files beside the folders, may import everything; no layer above may import them.
TOP = {"serve", "evals", "bench", "commands"}

HEAVY = {"torch", "triton", "transformers", "tokenizers", "safetensors", "zmq", "starlette", "uvicorn", "httpx", "ray"}
CLOCK_AND_IO = {
    *("time", "datetime", "threading", "multiprocessing", "concurrent", "asyncio", "signal", "sched", "queue"),
    *("socket", "socketserver", "selectors", "select", "ssl", "http", "urllib", "subprocess"),
    *("io", "os", "pathlib", "shutil", "tempfile", "mmap", "logging", "random", "secrets", "uuid"),
}
FORBIDDEN = {"core": HEAVY, "plan": HEAVY | CLOCK_AND_IO}

# Imports inside functions: only factories of optional back ends, and commands that must start without loading all.
# (file, function; * is any) -> the reason.
LATE: dict[tuple[str, str], str] = {
    ("ops/backend.py", "backend"): "Triton and FlashInfer are not there on every machine",
    ("ops/backend.py", "deep_gemm_products"): "DeepGEMM is not there on every machine",
    ("comm/dist.py", "_mapped"): "Triton is not there on every machine",
    ("run/ahead.py", "start"): "Triton is not there on every machine",
}


def _imports(module: Module) -> Iterator[tuple[ast.stmt, str]]:
    for node in ast.walk(module.tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((node, name) for name in imported(module, node))


def down_only(module: Module) -> Iterator[Finding]:
    """A layer imports only layers below it; under `TYPE_CHECKING` and inside functions too."""
    room = module.room
    if "/" in module.path and room not in LAYERS and room not in TOP:
        remedy = "Put it into a folder of the design, or add the folder to LAYERS in tests/house/imports.py"
        yield module.find(1, f"folder '{room}' is no layer of the design", remedy)
    allowed = LAYERS.get(room)
    if allowed is None:
        return
    for node, name in _imports(module):
        ours, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if ours == "tessera" and target and target != room and target not in allowed and target != "__version__":
            may = ", ".join(sorted(allowed)) or "nothing of ours"
            yield module.find(node, f"{room} imports {name}", f"{room} may import {may}; move what is shared down")


def pure(module: Module) -> Iterator[Finding]:
    """No torch and no service library in `core` and `plan`; no clock, thread, socket, file or chance in `plan`."""
    banned = FORBIDDEN.get(module.room, set())
    for node, name in _imports(module):
        if (top := name.split(".")[0]) in banned:
            remedy = "Hand the value in (time is an event), or move the code up a layer"
            yield module.find(node, f"{module.room} imports {top}", remedy)
            break
    if module.room != "plan":
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and dotted(node.func) in {"open", "print", "input"}:
            yield module.find(node, f"plan calls {dotted(node.func)}()", "The planner is pure: return a value instead")
        if isinstance(node, ast.Attribute) and dotted(node) in {"np.random", "numpy.random"}:
            yield module.find(node, f"plan uses {dotted(node)}", "Noise is a function of (seed, position, token id)")


def at_the_top(module: Module) -> Iterator[Finding]:
    """No imports inside functions, except in the factories of `LATE`."""
    for place, function in module.functions():
        if {(module.path, place), (module.path, "*")} & LATE.keys():
            continue
        for node in _own(function):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                remedy = "Import at the top; a factory of an optional back end goes into LATE in tests/house/imports.py"
                yield module.find(node, f"import inside {place}()", remedy)


def _own(function: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, FUNCTIONS):
            yield child
            yield from _own(child)


def late_in_use(all_modules: Iterable[Module]) -> Iterator[Finding]:
    """Each line of `LATE` about a file that exists still excuses an import."""
    for module in all_modules:
        for path, place in LATE:
            if path != module.path:
                continue
            nodes = [n for name, f in module.functions() if place in (name, "*") for n in _own(f)]
            if not any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in nodes):
                yield module.find(1, f"LATE excuses {place}, which imports nothing", "Delete its line in LATE")


def no_cycles(all_modules: Iterable[Module]) -> Iterator[Finding]:
    """No circle of imports at module level (`TYPE_CHECKING` blocks do not count)."""
    known = {module.name: module for module in all_modules}
    edges = {name: _edges(module, known.keys()) for name, module in known.items()}
    done: set[str] = set()
    for start in known:
        if circle := _circle(start, edges, done, []):
            where = known[circle[0]]
            yield where.find(1, "import cycle: " + " -> ".join(circle), "Move what both need into a file below them")


def _edges(module: Module, known: Iterable[str]) -> set[str]:
    found: set[str] = set()
    stack: list[ast.AST] = [module.tree]
    while stack:
        node = stack.pop()
        if isinstance(node, FUNCTIONS):
            continue
        if isinstance(node, ast.If) and dotted(node.test).endswith("TYPE_CHECKING"):
            stack.extend(node.orelse)
            continue
        if isinstance(node, ast.ImportFrom):
            base, *names = imported(module, node)
            inside = {name for name in names if name in known}
            found |= inside or {base}
        elif isinstance(node, ast.Import):
            found |= set(imported(module, node))
        stack.extend(ast.iter_child_nodes(node))
    return (found & set(known)) - {module.name}


def _circle(name: str, edges: dict[str, set[str]], done: set[str], path: list[str]) -> list[str]:
    if name in path:
        return [*path[path.index(name) :], name]
    if name in done:
        return []
    for target in sorted(edges[name]):
        if circle := _circle(target, edges, done, [*path, name]):
            done.update(circle)
            return circle
    done.add(name)
    return []
