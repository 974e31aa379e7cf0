"""Rules that keep the layout algebra in one place: nothing else divides by a parallel size or branches on a mode.

What counts as layout arithmetic, outside `HOME`:

- `//`, `/`, `%` or `divmod` with an operand that names a parallel size, a rank or the mesh;
- `chunk`, `tensor_split` or `array_split` with such an argument;
- `rank * something` in the layers that hold tensors (`models`, `run`, `transfer`): an offset by hand.

An operand *names* one through its last name (`self.tp_size`, `cfg.ep`, `get_world_size()`), through what is asked for
a size or a rank (`mesh.size`, `self.tp.size()`, `group.rank()`), through a key (`sizes["tp"]`) or through an argument
of a plain number function (`max(tp_size, 1)`, `len(ranks)`). The index of a subscript does not count:
`pools[rank].free // page_size` is about pages.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from house.source import Finding, Module

HOME = {"core/layout.py", "core/mesh.py", "core/reshard.py"}  # the layout algebra

PARALLEL = re.compile(
    r"(^|_)(tp|dp|ep|pp|cp|(?<!lora_)rank|ranks|mesh|nranks)(_|$)|(^|_)(world_size|num_shards|parallel_size|axis_size)$",
    re.I,
)
RANK = re.compile(r"(^|_)(?<!lora_)rank$", re.I)
ASKED = {"size", "rank", "degree", "ranks", "world", "size_of", "coordinate"}
NUMBERS = {"int", "len", "max", "min", "abs", "float", "round", "sum", "prod", "gcd", "lcm", "ceil", "floor", "sqrt"}
DIVIDES = (ast.FloorDiv, ast.Div, ast.Mod)
SPLITS = {"chunk", "tensor_split", "array_split"}
LOCAL = {"models", "run", "transfer"}

REMEDY = "Ask the layout (core/layout.py): held units, local shapes, offsets and copies all follow from it"


def names_parallel(node: ast.AST) -> str:
    """The name by which an operand is a parallel size or a rank; empty if it is none."""
    if isinstance(node, ast.Name):
        return node.id if PARALLEL.search(node.id) else ""
    if isinstance(node, ast.Attribute):
        if PARALLEL.search(node.attr):
            return node.attr
        return names_parallel(node.value) if node.attr in ASKED else ""
    if isinstance(node, ast.Call):
        if found := names_parallel(node.func):
            return found
        name = getattr(node.func, "id", None) or getattr(node.func, "attr", "")
        return next(filter(None, map(names_parallel, node.args)), "") if name in NUMBERS else ""
    if isinstance(node, ast.Subscript):
        key = node.slice
        if isinstance(key, ast.Constant) and isinstance(key.value, str) and PARALLEL.search(key.value):
            return key.value
        return names_parallel(node.value)
    if isinstance(node, ast.BinOp):
        return names_parallel(node.left) or names_parallel(node.right)
    return names_parallel(node.operand) if isinstance(node, ast.UnaryOp) else ""


def _operands(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, DIVIDES):
        formats = isinstance(node.op, ast.Mod) and isinstance(node.left, (ast.Constant, ast.JoinedStr))
        return [] if formats and not _is_number(node.left) else [node.left, node.right]
    if isinstance(node, ast.AugAssign) and isinstance(node.op, DIVIDES):
        return [node.target, node.value]
    if isinstance(node, ast.Call):
        name = getattr(node.func, "id", None) or getattr(node.func, "attr", "")
        if name == "divmod" or name in SPLITS:
            return [*node.args, *(keyword.value for keyword in node.keywords)]
    return []


def _is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, (int, float))


def no_sharding_arithmetic(module: Module) -> Iterator[Finding]:
    """Head counts, offsets and shares per rank are computed in the layout algebra alone."""
    if module.path in HOME:
        return
    for node in ast.walk(module.tree):
        if name := next(filter(None, map(names_parallel, _operands(node))), ""):
            yield module.find(node, f"`{ast.unparse(node)}` divides by or shares out '{name}'", REMEDY)
        elif module.room in LOCAL and isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            sides = [getattr(side, "id", None) or getattr(side, "attr", "") for side in (node.left, node.right)]
            if any(map(RANK.search, sides)):
                yield module.find(node, f"`{ast.unparse(node)}` computes an offset of a rank", REMEDY)


MODE = re.compile(r"^_*is_(pure_|only_)?(decode|prefill|extend|mixed|target_verify|draft_extend|prebuilt)(_\w+)?$")
MODE_NAME = re.compile(r"^_*(capture_|batch_)?forward_?(batch_)?modes?$", re.I)
LABELS = {"EXTEND", "MIXED", "DECODE", "TARGET_VERIFY", "IDLE", "PREBUILT", "DRAFT_EXTEND"}


def no_modes(module: Module) -> Iterator[Finding]:
    """Progress, not phase: no mode predicate, no forward-mode enum, no comparison with a label of one."""
    remedy = "A step gives each sequence a range of tokens: branch on ranges; labels are for logs and metrics only"
    for node in ast.walk(module.tree):
        for name in _introduced(node):
            if MODE.match(name) or MODE_NAME.match(name):
                yield module.find(node, f"'{name}' is a mode", remedy)
        if isinstance(node, ast.Compare):
            words = {n.value for side in (node.left, *node.comparators) for n in ast.walk(side) if _is_text(n)}
            if words & LABELS:
                yield module.find(node, f"`{ast.unparse(node)}` branches on a label", remedy)
        if isinstance(node, ast.ClassDef) and any("Enum" in ast.unparse(base) for base in node.bases):
            members = {
                t.id for s in node.body if isinstance(s, ast.Assign) for t in s.targets if isinstance(t, ast.Name)
            }
            if len(members & LABELS) > 1:
                yield module.find(node, f"enum {node.name} lists modes", remedy)


HALVES = re.compile(r"(^|_)(halves|tbo|overlap\w*|split_from)(_|$)", re.IGNORECASE)


def no_halves(module: Module) -> Iterator[Finding]:
    """Layers yield where they wait on the wire, and that is all that a model file has to do with two-batch overlap."""
    if module.path.startswith("models/"):
        for node in ast.walk(module.tree):
            for name in _introduced(node):
                if HALVES.search(name):
                    remedy = "Yield where it waits; the planner cuts steps, and one driver interleaves (comm/waits.py)"
                    yield module.find(node, f"'{name}' knows of halves of a step", remedy)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _introduced(node: ast.AST) -> list[str]:
    for field in ("id", "attr", "name", "arg"):
        if isinstance(value := getattr(node, field, None), str):
            return [value]
    return []
