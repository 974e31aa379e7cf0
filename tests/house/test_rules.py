"""Each house rule finds a small bad snippet and leaves its good neighbour alone: so the rules themselves can fail."""

from __future__ import annotations

import pytest

from house import habits, imports, tiling
from house.source import Module, Rule, modules

LONG_FUNCTION = "def f():\n" + "    x = 1\n" * 60
LONG_METHOD = "class A:\n    'doc'\n    def m(self):\n" + "        x = 1\n" * 8

# rule, file, bad source
BAD: list[tuple[Rule, str, str]] = [
    (imports.down_only, "core/a.py", "import tessera.plan.step"),
    (imports.down_only, "core/a.py", "from tessera import plan"),
    (imports.down_only, "core/a.py", "from ..plan import step"),
    (imports.down_only, "plan/a.py", "from tessera.models.registry import find"),
    (imports.down_only, "plan/a.py", "def f():\n    from tessera.serve import app"),
    (imports.down_only, "plan/a.py", "if TYPE_CHECKING:\n    from tessera.run import runner"),
    (imports.down_only, "run/a.py", "from tessera.cli import main"),
    (imports.down_only, "comm/a.py", "import tessera.ops.norm"),
    (imports.down_only, "utils/a.py", "'a folder that the design does not know'"),
    (imports.pure, "core/a.py", "import torch.nn"),
    (imports.pure, "plan/a.py", "from torch import Tensor"),
    (imports.pure, "plan/a.py", "import time"),
    (imports.pure, "plan/a.py", "from threading import Lock"),
    (imports.pure, "plan/a.py", "text = open('x').read()"),
    (imports.pure, "plan/a.py", "noise = np.random.rand(3)"),
    (imports.at_the_top, "run/a.py", "def f():\n    import json"),
    (imports.at_the_top, "run/a.py", "class A:\n    def f(self):\n        if x:\n            from json import loads"),
    (tiling.no_sharding_arithmetic, "models/a.py", "heads = num_heads // tp_size"),
    (tiling.no_sharding_arithmetic, "models/a.py", "heads = num_heads // self.attn_tp_size"),
    (tiling.no_sharding_arithmetic, "models/a.py", "head = rank % num_kv_heads"),
    (tiling.no_sharding_arithmetic, "models/a.py", "head = self.tp_rank // 2"),
    (tiling.no_sharding_arithmetic, "models/a.py", "a, b = divmod(units, world_size)"),
    (tiling.no_sharding_arithmetic, "models/a.py", "n = -(-vocab // mesh.size('tp'))"),
    (tiling.no_sharding_arithmetic, "models/a.py", "n = vocab // dist.get_world_size()"),
    (tiling.no_sharding_arithmetic, "models/a.py", "n = max(1, heads // max(tp, 1))"),
    (tiling.no_sharding_arithmetic, "models/a.py", "n = int(heads / sizes['ep'])"),
    (tiling.no_sharding_arithmetic, "models/a.py", "n = heads // group.tp.size()"),
    (tiling.no_sharding_arithmetic, "models/a.py", "n = tokens // num_ranks"),
    (tiling.no_sharding_arithmetic, "models/a.py", "heads //= tp_size"),
    (tiling.no_sharding_arithmetic, "models/a.py", "part = weight.chunk(tp_size, dim=0)[0]"),
    (tiling.no_sharding_arithmetic, "models/a.py", "start = self.rank * rows"),
    (tiling.no_sharding_arithmetic, "plan/a.py", "ok = pages % dp_size == 0"),
    (tiling.no_modes, "plan/a.py", "if batch.is_decode: pass"),
    (tiling.no_modes, "plan/a.py", "def is_prefill_only(self): return True"),
    (tiling.no_modes, "run/a.py", "f(forward_mode=1)"),
    (tiling.no_modes, "run/a.py", "from x import ForwardMode"),
    (tiling.no_modes, "run/a.py", "if step.label == 'DECODE': x = 1"),
    (tiling.no_modes, "run/a.py", "if step.label in ('MIXED', 'EXTEND'): x = 1"),
    (tiling.no_modes, "run/a.py", "class Phase(IntEnum):\n    EXTEND = 1\n    DECODE = 2"),
    (tiling.no_halves, "models/a.py", "if step.halves: x = 1"),
    (tiling.no_halves, "models/a.py", "def forward(self, x, tbo_index): return x"),
    (tiling.no_halves, "models/a.py", "async_overlap = overlapped(first_half, second)"),
    (habits.small_files, "run/a.py", "x = 1\n" * 401),
    (habits.small_functions, "run/a.py", LONG_FUNCTION),
    (habits.no_global, "run/a.py", "def f():\n    global x\n    x = 1"),
    (habits.no_probing, "run/a.py", "ok = hasattr(model, 'rope')"),
    (habits.no_marks, "run/a.py", "x = 1  # TODO: more"),
    (habits.no_marks, "run/a.py", "'''Doc.\n\nFIXME later.\n'''"),
    (habits.no_stubs, "run/a.py", "def f():\n    raise NotImplementedError('later')"),
    (habits.no_stubs, "run/a.py", "def f():\n    pass"),
    (habits.no_stubs, "run/a.py", "class A:\n    def f(self):\n        '''Doc.'''\n        ..."),
    (habits.docstrings, "run/a.py", "x = 1"),
    (habits.docstrings, "run/a.py", "'doc'\ndef f():\n    return 1"),
    (habits.docstrings, "run/a.py", "'doc'\nclass A:\n    x = 1"),
    (habits.docstrings, "run/a.py", "'doc'\n" + LONG_METHOD),
    (habits.no_swallowing, "run/a.py", "try:\n    f()\nexcept Exception:\n    pass"),
    (habits.no_swallowing, "run/a.py", "for x in y:\n    try:\n        f()\n    except:\n        continue"),
    (habits.no_swallowing, "run/a.py", "try:\n    f()\nexcept (ValueError, BaseException):\n    ..."),
    (habits.no_swallowing, "run/a.py", "with contextlib.suppress(Exception):\n    f()"),
    (habits.no_environment, "run/a.py", "x = os.environ['X']"),
    (habits.no_environment, "serve/app.py", "x = os.getenv('X')"),
    (habits.no_environment, "core/mesh.py", "from os import environ"),
]

GOOD: list[tuple[Rule, str, str]] = [
    (imports.down_only, "plan/a.py", "from tessera.core.mesh import Mesh\nfrom tessera.plan import step\nimport numpy"),
    (imports.down_only, "core/a.py", "from tessera import __version__\nfrom .mesh import Mesh"),
    (imports.down_only, "cli.py", "from tessera.serve import launch\nfrom tessera.run import runner"),
    (imports.pure, "plan/a.py", "import heapq\nimport numpy as np"),
    (imports.pure, "run/a.py", "import time, torch"),
    (imports.at_the_top, "run/a.py", "try:\n    import zmq\nexcept ImportError:\n    zmq = None"),
    (tiling.no_sharding_arithmetic, "core/layout.py", "heads = num_heads // tp_size"),
    (tiling.no_sharding_arithmetic, "models/a.py", "pages = length // page_size\ngroup = q_heads // kv_heads"),
    (tiling.no_sharding_arithmetic, "models/a.py", "free = pools[rank].free // page_size"),
    (tiling.no_sharding_arithmetic, "models/a.py", "text = 'rank %d' % rank\nscale = 1 / kv_lora_rank"),
    (tiling.no_sharding_arithmetic, "serve/a.py", "port = base + rank * 2\nstep = steps % depth"),
    (tiling.no_modes, "plan/a.py", "role = 'decode'\nis_decoder = num_decode_tokens\nlabel = 'DECODE'"),
    (tiling.no_halves, "models/a.py", "behalf = x.half()\nshortcuts = y"),
    (tiling.no_halves, "run/a.py", "for half in step.halves: launch(half)"),
    (habits.small_files, "run/a.py", "x = 1\n" * 400),
    (habits.small_functions, "run/a.py", LONG_FUNCTION.removesuffix("    x = 1\n")),
    (habits.no_marks, "run/a.py", "todo = 'to do: nothing'"),
    (habits.no_stubs, "run/a.py", "class A(Protocol):\n    def f(self): ..."),
    (habits.no_stubs, "run/a.py", "class A(ABC):\n    @abstractmethod\n    def f(self): ..."),
    (habits.no_stubs, "run/a.py", "class A:\n    def f(self):\n        '''Nothing to wait for: the copy is done.'''"),
    (
        habits.docstrings,
        "run/a.py",
        "'doc'\ndef _f():\n    return 1\nclass A:\n    'doc'\n    def m(self):\n        return 1",
    ),
    (habits.docstrings, "run/__init__.py", ""),
    (habits.no_swallowing, "run/a.py", "try:\n    f()\nexcept OSError:\n    pass"),
    (habits.no_swallowing, "run/a.py", "try:\n    f()\nexcept Exception as error:\n    log.exception(error)"),
    (habits.no_environment, "core/config.py", "x = os.environ['X']"),
    (habits.no_environment, "core/config_env.py", "x = os.environ['X']"),
]


def _id(value: object) -> str:
    return value.__name__ if callable(value) else repr(value)[:40]


@pytest.mark.parametrize(("rule", "path", "text"), BAD, ids=_id)
def test_rule_finds(rule: Rule, path: str, text: str) -> None:
    findings = list(rule(Module(path, text)))
    assert findings, f"{rule.__name__} found nothing in:\n{text}"
    assert all(str(f).startswith(f"src/tessera/{path}:") and f.remedy for f in findings)


@pytest.mark.parametrize(("rule", "path", "text"), GOOD, ids=_id)
def test_rule_leaves_alone(rule: Rule, path: str, text: str) -> None:
    assert [str(f) for f in rule(Module(path, text))] == []


def test_a_finding_names_the_line() -> None:
    found = list(habits.no_global(Module("run/a.py", "\ndef f():\n    global x\n")))
    assert str(found[0]).startswith("src/tessera/run/a.py:3: `global x`")


def _package(**files: str) -> list[Module]:
    return [Module(f"{name.replace('__', '/')}.py", text) for name, text in files.items()]


def test_import_cycles_are_found() -> None:
    circle = _package(
        core__a="from tessera.core import b", core__b="import tessera.core.c", core__c="from tessera.core.a import x"
    )
    (finding,) = imports.no_cycles(circle)
    assert "tessera.core.a -> tessera.core.b -> tessera.core.c -> tessera.core.a" in finding.what


def test_a_type_checking_import_makes_no_cycle() -> None:
    fine = _package(
        core__a="from tessera.core import b",
        core__b="if TYPE_CHECKING:\n    from tessera.core.a import x\ndef f():\n    import tessera.core.a",
    )
    assert list(imports.no_cycles(fine)) == []


def test_an_excuse_that_is_not_needed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(imports.LATE, ("run/a.py", "make"), "optional")
    assert list(imports.late_in_use(_package(run__a="def make():\n    return 1")))
    assert not list(imports.late_in_use(_package(run__a="def make():\n    import json")))


def test_the_package_is_there_to_be_read() -> None:
    assert "__init__.py" in {module.path for module in modules()}
