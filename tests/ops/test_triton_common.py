"""The ground our Triton kernels stand on: what they compute with means the same interpreted and compiled."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.compiler.errors import CompilationError
from triton.runtime.errors import InterpreterError

from ops.cases import assert_close
from tessera.ops import triton_common
from tessera.ops.triton_common import dot, num_processors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _product(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i
    tl.store(out + at, dot(tl.load(a + at), tl.load(b + at), None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dot(dtype):
    """Also of bf16, which the interpreter's own `tl.dot` gets wrong, and of fp32 beyond tf32."""
    a, b = (torch.randn(16, 16, device=DEVICE).to(dtype) for _ in range(2))
    out = torch.full((16, 16), float("nan"), device=DEVICE)
    _product[(1,)](a, b, out, N=16)
    assert_close(out, a.double() @ b.double(), torch.float32)


def test_too_few_columns_for_tensor_cores():
    """Known fault: a tile that a device refuses passed in the interpreter."""
    a = torch.zeros(8, 8, device=DEVICE)
    with pytest.raises((InterpreterError, CompilationError)):
        _product[(1,)](a, a, a.clone(), N=8)


def test_processors():
    assert num_processors(torch.device(DEVICE)) > 0


OPS = Path(triton_common.__file__).parent
MODULES = {path.name: ast.parse(path.read_text()) for path in sorted(OPS.glob("triton_*.py"))}


def _functions(tree: ast.AST) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


EVERYWHERE = {name: function for tree in MODULES.values() for name, function in _functions(tree).items()}


def _chained_kernels(tree: ast.AST) -> set[str]:
    """Kernels that some function launches with `chained(...)`, given in the call or by what it is given."""
    own, found = _functions(tree), set()
    for function in own.values():
        for call in ast.walk(function):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript)):
                continue
            spread = [k.value for k in call.keywords if k.arg is None]
            sources = [ast.unparse(own[s.func.id]) for s in spread if isinstance(s, ast.Call) and _named(s, own)]
            sources += [ast.unparse(function)] if any(isinstance(s, ast.Name) for s in spread) else []
            if any("chained(" in text for text in [ast.unparse(call), *sources]):
                found.add(ast.unparse(call.func.value))
    return found


def _named(call: ast.Call, functions: dict[str, ast.FunctionDef]) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id in functions


def _line_of_follow(function: ast.FunctionDef) -> int | None:
    """Where a kernel, or what it calls, waits for the launch before."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name = node.func.id
            if name == "follow" or (name in EVERYWHERE and name != function.name and _line_of_follow(EVERYWHERE[name])):
                return node.lineno
    return None


def _faults(function: ast.FunctionDef) -> str:
    """Why a chained launch of this kernel could read or end too early; empty: it could not."""
    line = _line_of_follow(function)
    if line is None:
        return f"{function.name} does not call follow()"
    early = [node.lineno for node in ast.walk(function) if isinstance(node, ast.Return) and node.lineno < line]
    return f"{function.name} returns in line {early[0]}, before it calls follow()" if early else ""


@pytest.mark.parametrize("module", MODULES)
def test_what_is_launched_chained_waits_for_the_launch_before(module):
    """In all of its programs: one that ended without would let the next launch go on while the last one runs."""
    tree = MODULES[module]
    kernels = EVERYWHERE | _functions(tree)  # names occur in several modules
    assert [fault for kernel in _chained_kernels(tree) if (fault := _faults(kernels[kernel]))] == []


def test_faults_of_chains_are_seen():
    """Known faults: a kernel that does not wait, and one whose programs without work leave before they do."""
    kernels = _functions(ast.parse("def a():\n    return 1\ndef b():\n    if x:\n        return\n    follow()\n"))
    assert [bool(_faults(kernel)) for kernel in kernels.values()] == [True, True]
    assert {"_product", "_by_head"} <= _chained_kernels(MODULES["triton_linear.py"])
    assert {"_gate_up", "_down"} <= _chained_kernels(MODULES["triton_moe.py"])
