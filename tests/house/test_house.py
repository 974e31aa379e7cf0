"""The house rules hold in `src/tessera`: each guards a promise of the design, or keeps the code small."""

from __future__ import annotations

import pytest

from house import habits, imports, tiling
from house.source import Finding, Module, Rule, modules

RULES: list[Rule] = [
    imports.down_only,
    imports.pure,
    imports.at_the_top,
    tiling.no_sharding_arithmetic,
    tiling.no_modes,
    tiling.no_halves,
    habits.small_files,
    habits.small_functions,
    habits.no_global,
    habits.no_probing,
    habits.no_marks,
    habits.no_stubs,
    habits.docstrings,
    habits.no_swallowing,
    habits.no_environment,
]


@pytest.fixture(scope="module")
def package() -> list[Module]:
    return modules()


def report(findings: list[Finding]) -> None:
    if findings:
        pytest.fail(f"{len(findings)} to mend:\n" + "\n".join(map(str, findings)), pytrace=False)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule: Rule, package: list[Module]) -> None:
    report([finding for module in package for finding in rule(module)])


def test_no_import_cycles(package: list[Module]) -> None:
    report(list(imports.no_cycles(package)))


def test_every_late_import_that_is_excused_is_there(package: list[Module]) -> None:
    report(list(imports.late_in_use(package)))
